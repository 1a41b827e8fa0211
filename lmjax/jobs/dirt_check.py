"""Checks a cleaning on pages with planted dirt: found, kept, repaired?"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

from lmjax.config import UserError, config
from lmjax.data.cleaned import CleanedDocuments
from lmjax.data.cleaning.dirt import NGRAM, DirtyPages, Kind
from lmjax.data.cleaning.main_text import MainText
from lmjax.data.cleaning.near_duplicates import ngrams
from lmjax.data.cleaning.repair import RepairText
from lmjax.data.cleaning.shard_pass import LEFT_OUT
from lmjax.data.documents import Document
from lmjax.files import local_path
from lmjax.jobs.job import Job

ALIKE = 0.6  # similarity of texts that may be taken for copies of each other
DUPLICATES = ("ExactDuplicates", "NearDuplicates")


@config
class DirtCheck(Job):
    """Compare the output of a cleaning with what was planted in its source.

    Fails where less is found or kept than it should be.
    """

    cleaned: str  # output of the cleaning
    collection: str  # its collection with the pages
    pages: DirtyPages  # source of that collection
    similarity: float = 0.8  # from which on an edited copy has to be found
    least_found: float = 0.99  # share of copies, edited copies, leaks and junk
    least_kept: float = 0.98  # share of good pages

    def run(self) -> None:
        """See `Job.run`. UserError: the cleaning falls short."""
        from lmjax.console import RunLog, Table, make_console
        from lmjax.jobs.report import write_report
        from lmjax.jobs.results import Results
        from lmjax.runs.folder import RESULTS
        from lmjax.runs.lock import lock_run_folder

        with lock_run_folder(self) as folder:
            rows = tuple(self._rows())
            caption = "Shares of the planted pages, and what they must be at least."
            columns = ("pages", "number", "at least", "share")
            table = Table("Planted dirt", columns, rows, caption)
            folder.write_json(RESULTS, Results(step=1, tables=(table,)).to_json())
            write_report(folder)
            RunLog(make_console()).table(table)
            short = [name for name, _, least, share in rows if share < least]
            if short:
                raise UserError(
                    f"the cleaning falls short: {', '.join(short)}; see {folder.report}"
                )

    def _rows(self) -> Iterator[tuple[str, int, float, float]]:
        """A name, a number of pages, the least share, and the share."""
        texts = {d.identity: d.text for d in self._cleaned()}
        by_step = {line["id"]: line["step"] for line in self._left_out()}
        planted: dict[str, list[Document]] = {}
        for page in self.pages.documents():
            planted.setdefault(page.metadata["planted"], []).append(page)
        pages = {kind: planted.get(kind, []) for kind in Kind.__args__}
        # Where the first one was dropped for its quality, its copy was too.
        copies = [page for page in pages["copy"] if page.metadata["of"] in texts]
        edited = [page for page in pages["edited"] if page.metadata["of"] in texts]
        similar = [page for page in edited if page.metadata["similarity"] >= self.similarity]

        def is_repeated(page: Document) -> bool:
            return by_step.get(page.identity, "").startswith(DUPLICATES)

        alike = self._alike([p for p in pages["good"] if is_repeated(p)], texts)
        good = [page for page in pages["good"] if page.identity not in alike]

        def is_junk(page: Document) -> bool:
            return page.identity not in texts

        def has_secret(page: Document) -> bool:
            return page.metadata["secret"] in texts.get(page.identity, "")

        found, kept = self.least_found, self.least_kept
        personal = [page for page in pages["personal"] if page.identity in texts]
        tells = _not(self._tells(texts))
        for name, some, holds, least in (
            ("good, kept", good, lambda page: page.identity in texts, kept),
            ("good, not taken for copies", good, _not(is_repeated), 1),
            ("copies, found", copies, is_repeated, found),
            (f"edited, similarity {self.similarity} or more, found", similar, is_repeated, found),
            ("related, not taken for copies", pages["related"], _not(is_repeated), 1),
            ("mojibake, repaired", pages["mojibake"], has_secret, found),
            ("personal data, replaced", personal, tells, 1),
            ("questions of the evaluation set, cut out", pages["leak"], _not(has_secret), 1),
            ("spam and navigation, dropped", pages["spam"] + pages["navigation"], is_junk, found),
        ):
            if some:
                yield name, len(some), float(least), sum(map(holds, some)) / len(some)

    def _alike(self, pages: list[Document], texts: dict[str, str]) -> set[str]:
        """Identities of the pages that do repeat a text that was kept: nobody planted them."""
        step = RepairText(mojibake=False)
        kept = [ngrams(text, NGRAM) for text in texts.values()]
        found = set()
        for page in pages:
            own = ngrams(step(MainText()(page)).text, NGRAM)
            best = max(len(own & other) / len(own | other) for other in kept)
            if best >= ALIKE:
                found.add(page.identity)
        return found

    def _tells(self, texts: dict[str, str]) -> Any:
        """Returns whether something personal of a page is left in its text."""

        def tells(page: Document) -> bool:
            words = page.metadata["secret"].split()
            personal = [w.strip(".,") for w in words if "@" in w or w[0].isdigit() or w[0] == "+"]
            return any(word in texts[page.identity] for word in personal if len(word) > 4)

        return tells

    def _cleaned(self) -> Iterator[Any]:
        return CleanedDocuments(path=self.cleaned, collection=self.collection).documents()

    def _left_out(self) -> Iterator[dict[str, Any]]:
        path = local_path(self.cleaned, "cleaned") / LEFT_OUT
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)


def _not(test: Any) -> Any:
    return lambda page: not test(page)
