"""A person's review of a cleaning: keep or drop? And the agreement with its filters.

python -m lmjax.data.review runs/clean
python -m lmjax.data.review runs/clean reviewer=ada each=10
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lmjax.config import UserError, config
from lmjax.console import RunLog, Table, make_console
from lmjax.data.cleaning.ledger import ShownDocument
from lmjax.data.cleaning.summary import SUMMARY, Summary
from lmjax.data.json_log import JsonLog
from lmjax.data.kappa import cohens_kappa, kappa_interval, share_interval
from lmjax.files import local_path
from lmjax.launch import run

FOLDER = "review"  # in the output of the cleaning
AGREEMENT = "agreement.json"
KEYS = "[k]eep  [d]rop  [s]kip  [u]ndo  [q]uit > "
ANSWERS = {"k": "keep", "d": "drop", "s": "skip"}


class ReviewItem(NamedTuple):
    """A document that is shown.

    Attributes:
        stratum: of documents that the filters have treated alike: kept, kept at the border of a
            rule, or dropped by one.
        filters: their verdict: "keep" or "drop".
        documents: of the whole cleaning in the stratum; 0 where their number is not known.
        shown: the document.
    """

    stratum: str
    filters: str
    documents: int
    shown: ShownDocument


@config
class Review:
    """Shows documents of a finished cleaning, a few of each kind, and asks to keep or drop.

    The reason is told after the answer. Each answer is on disk at once, and the same command goes
    on. The samples are those that the cleaning has kept for its report.
    """

    folder: str | None = None  # output of a cleaning
    reviewer: str = "reviewer"  # name of the file with the answers
    each: int = 4  # documents of each kind, at most
    seed: int = 0  # of the order

    def validate(self) -> None:
        """Raises UserError for settings that cannot be meant."""
        if self.each < 1 or not self.reviewer.replace("-", "").replace("_", "").isalnum():
            raise UserError(
                f"each={self.each}, reviewer={self.reviewer!r}: must be 1 or more, and a name of "
                "letters, digits, - and _"
            )

    def run(self) -> None:
        """Asks until all is judged, or the reviewer stops. UserError: there is no cleaning."""
        if self.folder is None:
            raise UserError("Which cleaning? For instance: python -m lmjax.data.review runs/clean")
        folder = local_path(self.folder, "folder")
        items = review_items(read_summary(folder), self.each, self.seed)
        log = RunLog(make_console())
        log.title("Review", str(folder))
        journal = ReviewJournal(folder / FOLDER / f"{self.reviewer}.jsonl")
        ask(items, journal, _asked(log), log.console.print)
        for table in agreement_tables(items, journal.answers()):
            log.table(table)
        found = agreement(items, journal.answers())
        path = folder / FOLDER / AGREEMENT
        if journal.path.is_file():
            path.write_text(json.dumps(found, indent=1), "utf-8")
        log.files(folder, [(str(journal.path), "the answers"), (str(path), "the agreement")])


class ReviewJournal:
    """Answers of a reviewer, each on disk when it is given."""

    def __init__(self, path: pathlib.Path) -> None:
        """Reads what is there. UserError: the file has something else."""
        self._log = JsonLog(path)
        self.path = path

    def answers(self) -> dict[str, str]:
        """The answer to each document, by its identity; undone ones are left out."""
        found: dict[str, str] = {}
        for record in self._log.records:
            found.pop(record["id"], None)  # the last one is also the last in order
            if record["answer"] != "undone":
                found[record["id"]] = record["answer"]
        return found

    def add(self, item: ReviewItem, answer: str) -> None:
        """Keeps an answer. UserError: it cannot be written."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = {"id": item.shown.identity, "answer": answer, "filters": item.filters}
        self._log.append(record | {"stratum": item.stratum, "time": now})


def read_summary(folder: pathlib.Path) -> Summary:
    """The summary of a finished cleaning. UserError: there is none."""
    path = folder / SUMMARY
    if not path.is_file():
        raise UserError(f"{folder} has no finished cleaning (there is no {SUMMARY})")
    return Summary.from_json(json.loads(path.read_text("utf-8")))


def review_items(summary: Summary, each: int, seed: int) -> list[ReviewItem]:
    """A few documents of each stratum, in an order that says nothing of it.

    Args:
        summary: of a cleaning.
        each: documents of a stratum, at most.
        seed: of the order.
    """
    total = summary.total()
    found: dict[str, ReviewItem] = {}

    def add(stratum: str, filters: str, documents: int, some: Sequence[ShownDocument]) -> None:
        for shown in some[:each]:
            found.setdefault(shown.identity, ReviewItem(stratum, filters, documents, shown))

    for name, counts in total.steps.items():
        for reason, some in counts.dropped.items():
            add(f"dropped, {name}: {reason}", "drop", counts.reasons[reason], some)
    kept = {shown.identity for shown in total.results}
    for name, counts in total.steps.items():
        for reason, some in counts.border.items():
            # Later steps may have dropped it.
            left = [one for one in some if one.identity not in found or one.identity in kept]
            add(f"at the border, {name}: {reason}", "keep", 0, left)
    add("kept", "keep", total.documents, total.results)
    return sorted(found.values(), key=lambda item: _hash(f"{seed} {item.shown.identity}"))


def ask(
    items: Sequence[ReviewItem],
    journal: ReviewJournal,
    question: Callable[[ReviewItem, int, int], str],
    tell: Callable[[str], None],
) -> None:
    """Asks about each item that has no answer yet.

    Args:
        items: in order.
        journal: of the answers.
        question: item, its number, number of items -> what was typed; EOFError ends the review.
        tell: shows a line.
    """
    by_identity = {item.shown.identity: item for item in items}
    while True:
        answers = journal.answers()
        left = [item for item in items if item.shown.identity not in answers]
        if not left:
            return
        try:
            typed = question(left[0], len(items) - len(left) + 1, len(items)).strip().lower()[:1]
        except EOFError:
            return
        if typed == "q":
            return
        if typed == "u":
            known = [identity for identity in answers if identity in by_identity]
            if known:
                journal.add(by_identity[known[-1]], "undone")
            else:
                tell("There is nothing to undo.")
        elif typed in ANSWERS:
            journal.add(left[0], ANSWERS[typed])
            measured = f" ({left[0].shown.measured})" if left[0].shown.measured else ""
            tell(f"{left[0].stratum}{measured}; the filters: {left[0].filters}\n")
        else:
            tell(f"{typed!r} is none of them.")


def judged(
    items: Iterable[ReviewItem], answers: Mapping[str, str]
) -> Iterator[tuple[ReviewItem, str]]:
    """Items with the answers that keep or drop."""
    for item in items:
        if answers.get(item.shown.identity) in ("keep", "drop"):
            yield item, answers[item.shown.identity]


def agreement(items: Sequence[ReviewItem], answers: Mapping[str, str]) -> dict[str, Any]:
    """Agreement of a reviewer with the filters, as JSON values; null where it is not known.

    Kappa is of the sample, which has as many documents of rare reasons as of common ones. The
    shares of what was wrongly dropped and kept weigh each reason by its documents.
    """
    pairs = list(judged(items, answers))
    one, other = [item.filters for item, _ in pairs], [answer for _, answer in pairs]
    same = sum(a == b for a, b in zip(one, other))
    numbers = {
        "judged": len(pairs),
        "same": same / len(pairs) if pairs else math.nan,
        "kappa": cohens_kappa(one, other),
        "kappa_95_percent": list(kappa_interval(one, other)),
        "wrongly_dropped": _wrong_share(pairs, "drop"),
        "wrongly_kept": _wrong_share(pairs, "keep"),
    }
    return {name: _known(value) for name, value in numbers.items()}


def _wrong_share(pairs: Sequence[tuple[ReviewItem, str]], filters: str) -> float:
    """Share of what the filters kept, or dropped, that the reviewer would not; by strata."""
    strata: dict[str, list[bool]] = {}
    documents: dict[str, int] = {}
    for item, answer in pairs:
        if item.filters == filters and item.documents:
            strata.setdefault(item.stratum, []).append(answer != filters)
            documents[item.stratum] = item.documents
    total = sum(documents.values())
    if not total:
        return math.nan
    return sum(documents[n] * sum(wrong) / len(wrong) for n, wrong in strata.items()) / total


def agreement_tables(items: Sequence[ReviewItem], answers: Mapping[str, str]) -> tuple[Table, ...]:
    """Tables of the agreement; none where nothing is judged."""
    found = agreement(items, answers)
    if not found["judged"]:
        return ()
    low, high = found["kappa_95_percent"]
    rows = (("all", found["judged"], found["same"], found["kappa"], low, high),)
    columns = ("documents", "judged", "same", "kappa", "from", "to")
    notes = [
        f"Of what was {name}, weighed by reasons, the reviewer would not have {share:.1%}."
        for name, share in (
            ("dropped", found["wrongly_dropped"]),
            ("kept", found["wrongly_kept"]),
        )
        if share is not None
    ]
    caption = "Cohen's kappa of reviewer and filters, with ends of its 95% interval."
    strata: dict[str, list[bool]] = {}
    for item, answer in judged(items, answers):
        strata.setdefault(item.stratum, []).append(answer == item.filters)
    by_stratum = tuple(
        (name, len(same), sum(same) / len(same), *share_interval(sum(same), len(same)))
        for name, same in sorted(strata.items())
    )
    return (
        Table("Agreement with the filters", columns, rows, caption, notes=tuple(notes)),
        Table(
            "Agreement by reason",
            ("documents", "judged", "same", "from", "to"),
            by_stratum,
            "Shares of equal verdicts, with ends of their 95% interval.",
        ),
    )


def _asked(log: RunLog) -> Callable[[ReviewItem, int, int], str]:
    """Shows a document in the terminal, and reads what is typed."""

    def question(item: ReviewItem, number: int, count: int) -> str:
        log.heading(f"{number} of {count}", item.shown.identity)
        # As it is: the text of a page is no markup of the console.
        log.console.print(item.shown.text, markup=False, highlight=False, soft_wrap=True)
        return input(f"\n{KEYS}")

    return question


def _known(value: Any) -> Any:
    """The value, with null in place of what is no number."""
    if isinstance(value, list):
        return [_known(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


if __name__ == "__main__":
    run(Review(), positional="folder")
