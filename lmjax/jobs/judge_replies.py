"""Replies of two models compared by a third: win rate, ties, and the ratio of their scores."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

import jax
import numpy as np

from lmjax.config import UserError, config
from lmjax.console import CountBar, RunLog, Table, make_console
from lmjax.data.documents import digest
from lmjax.data.json_log import JsonLog
from lmjax.evaluation.chat_endpoint import ChatEndpoint, LocalModel, ReplyModel
from lmjax.evaluation.comparison import score_ratio
from lmjax.evaluation.judge import Form, Judge, Judgements, ReplyPair
from lmjax.evaluation.tasks.records import Record, read_records
from lmjax.evaluation.win_rates import Rule, judged_wins
from lmjax.jobs.evaluate import model_key
from lmjax.jobs.job import Job
from lmjax.jobs.report import write_report
from lmjax.jobs.results import Results
from lmjax.jobs.settings import at_least
from lmjax.launch import import_modules
from lmjax.parallel import Mesh
from lmjax.remote import check_path
from lmjax.runs.folder import REPLIES, REPORT, RESULTS, RunFolder
from lmjax.runs.lock import lock_run_folder

VERDICTS = "verdicts.jsonl"
SHOWN = 8  # requests in the report
WINS = (
    "Requests of which the judge says, in both orders, that the first model's reply is better, and "
    "half of the ties; with the ends of the 95% interval. First: share of judgements for the reply "
    "that stood first, 0.5 of a judge whom the order does not lead."
)
SCORES = (
    "Mean score of a reply, 1 to 10, over both orders; and the sum of the first model's scores "
    "over that of the second's, with the ends of its 95% interval (BCa bootstrap over requests)."
)


class JudgedModels(NamedTuple):
    """Two models with their replies to the same requests."""

    ours: str
    theirs: str
    pairs: tuple[ReplyPair, ...]


@config
class JudgeReplies(Job):
    """Compare the replies of two models by a third, which sees each pair in both orders.

    Models are public or run folders (`LocalModel`), or stand behind any endpoint for chat
    completions (`ChatEndpoint`). Replies and verdicts are kept in output/replies as they come.
    """

    output: str = "runs/judge"  # folder of replies, verdicts and results; the same command goes on
    requests: str | None = None  # file of requests: JSON lines, JSON or CSV
    field: str = "prompt"  # of a line: the request, or a list whose first text it is
    limit: int | None = None  # only so many requests, the first ones; none: all
    ours: ReplyModel | None = None  # the model that is judged
    theirs: ReplyModel | None = None  # the one beside it, such as a reference
    # replies.jsonl of a side-by-side job, in place of requests, ours and theirs
    replies: str | None = None
    judge: ReplyModel | None = None  # the model that compares
    form: Form = "verdict"  # what it is asked for: the better reply, or a score of each
    rule: Rule = "agree"  # a win needs both orders, or is the mean of them
    mesh: Mesh = Mesh()  # how the devices are arranged, for models in folders
    imports: tuple[str, ...] = ()  # modules of your own whose models there are

    def validate(self) -> None:
        """Raises UserError for settings that cannot be meant."""
        check_path(self.output, "output", write=True)
        at_least(1, self, "limit")

    def may_change(self, setting: str) -> bool:
        """See `Job.may_change`: replies and verdicts are kept by all that they depend on."""
        return True

    def run(self) -> None:
        """Asks what is not answered yet, and reports; see `Job.run`."""
        import_modules(self.imports)
        self._check()
        log = RunLog(make_console())
        with jax.set_mesh(self.mesh.build()), lock_run_folder(self) as folder:
            log.title(folder.path.name, folder.location)
            tables = tuple(self._tables(folder, log))
            folder.write_config(self)
            folder.write_json(RESULTS, Results(step=1, tables=tables).to_json())
            write_report(folder)
            for table in tables:
                log.table(table)
            files = (
                (REPORT, "the comparison, for a browser"),
                (RESULTS, "the same numbers"),
                (f"{REPLIES}/*.jsonl", "every reply, and every verdict with its reasons"),
            )
            log.files(folder.location, files)

    def _check(self) -> None:
        """Raises UserError where a setting is missing."""
        if self.judge is None:
            raise UserError(
                "judge: give the model that compares, as in judge=ChatEndpoint "
                "judge.address=http://127.0.0.1:8000/v1 judge.model=NAME, or judge=LocalModel "
                "judge.folder=FOLDER"
            )
        names = ("requests", "ours", "theirs")
        given = [name for name in names if getattr(self, name) is not None]
        if self.replies is None and (missing := [name for name in names if name not in given]):
            raise UserError(f"{missing[0]} is missing: give {', '.join(names)}, or else replies")
        if self.replies is not None and given:
            raise UserError(f"replies={self.replies} has requests and replies: leave {given[0]}")
        if jax.process_count() > 1:
            raise UserError("a judge needs all devices in one process")

    def _tables(self, folder: RunFolder, log: RunLog) -> list[Table]:
        judge, rows, ratios, shown = Judge(model=self.judge, form=self.form), [], [], []
        for one in self._comparisons(folder, log):
            with CountBar("verdicts", log.console) as bar:
                found = judge.compare(one.pairs, folder.replies / VERDICTS, bar)
            name = f"{one.ours} over {one.theirs}"
            wins = judged_wins(found.outcomes, self.rule)
            counts = wins.wins, wins.losses, wins.ties, wins.missing
            rest = wins.agreement, wins.first, wins.rate.low, wins.rate.high, wins.rate.value
            rows.append((name, *counts, *rest))
            if self.form == "scores" and (row := _ratio(found)):
                ratios.append((name, *row))
            shown.append(_examples(one, found))
        columns = (
            *("models", "wins", "losses", "ties", "without verdict"),
            *("both orders agree", "first", "2.5 %", "97.5 %", "win rate"),
        )
        tables = [Table("Wins", columns, tuple(rows), WINS)]
        if ratios:
            columns = ("models", "requests", "score", "of the second", "2.5 %", "97.5 %", "ratio")
            tables.append(Table("Scores", columns, tuple(ratios), SCORES))
        return [*tables, *shown]

    def _comparisons(self, folder: RunFolder, log: RunLog) -> list[JudgedModels]:
        """The models that are compared, with their replies."""
        if self.replies is not None:
            return _read_comparisons(self.replies, self.limit)
        asked = [_request(one, self.field) for one in read_records(self.requests)][: self.limit]
        names = _name(self.ours), _name(self.theirs)
        if names[0] == names[1]:
            names = tuple(f"{name} ({which})" for name, which in zip(names, ("ours", "theirs")))
        found = []
        for model, name in zip((self.ours, self.theirs), names):
            with CountBar(name, log.console) as bar:
                found.append(replies_of(model, asked, folder, bar))
        return [JudgedModels(*names, tuple(map(ReplyPair, asked, *found)))]


def replies_of(
    model: ReplyModel, requests: Sequence[str], folder: RunFolder, bar: CountBar
) -> list[str]:
    """Replies of a model, each of which is kept in the folder as soon as it is there.

    Args:
      model: that is asked.
      requests: what it is asked.
      folder: where replies are kept, in a file of the model's settings, and of its parameters.
      bar: is told how many are there, and of how many.

    Raises:
      UserError: the model does not reply, or the folder cannot be written.
    """
    parts = [json.dumps(model.settings, sort_keys=True)]
    if isinstance(model, LocalModel):
        parts.append(model_key(model.folder, None))
    log = JsonLog(folder.replies / f"{digest(*parts)}.jsonl")
    known = {one.get("request"): one.get("reply") for one in log.records}
    for number, request in enumerate(requests, 1):
        if request not in known:
            known[request] = model.reply(request)
            log.append({"request": request, "reply": known[request], "model": model.settings})
        bar(number, len(requests))
    return [known[request] for request in requests]


def _request(record: Record, field: str) -> str:
    """The request of a line: a text, or the first of several turns."""
    value = record.value(field)
    return value if isinstance(value, str) else record.texts(field)[0]


def _read_comparisons(path: str, limit: int | None) -> list[JudgedModels]:
    """Each model but the first beside the one before, as a side-by-side job has sampled them."""
    lines = read_records(path)[:limit]
    models = lines[0].texts("models")
    asked = [_request(line, "prompt") for line in lines]
    answers = [line.texts("answers") for line in lines]
    for line, given in zip(lines, answers, strict=True):
        if line.texts("models") != models or len(given) != len(models):
            wanted = f"{', '.join(models)}, with a reply of each"
            raise line.wrong("models", line.value("models"), wanted)
    if len(models) < 2:
        raise lines[0].wrong("models", models, "two or more")
    names, found = [PurePath(model).name or model for model in models], []
    for before, now in itertools.pairwise(range(len(models))):
        pairs = [ReplyPair(r, given[now], given[before]) for r, given in zip(asked, answers)]
        found.append(JudgedModels(names[now], names[before], tuple(pairs)))
    return found


def _name(model: ReplyModel) -> str:
    """Name of a model in tables."""
    if isinstance(model, ChatEndpoint):
        return model.model
    return PurePath(model.folder).name if isinstance(model, LocalModel) else type(model).__name__


def _ratio(found: Judgements) -> tuple[int | float, ...] | None:
    """Number of pairs with scores in both orders, both means, and the ratio with its ends."""
    scores = found.scores.mean(axis=1)
    scores = scores[~np.isnan(scores).any(axis=1)]
    if len(scores) < 2:
        return None
    ratio = score_ratio(scores[:, 0], scores[:, 1])
    return (len(scores), *map(float, scores.mean(axis=0)), ratio.low, ratio.high, ratio.value)


def _examples(one: JudgedModels, found: Judgements) -> Table:
    """Some requests with both replies, and the judge's verdict on them in both orders."""
    words = {1.0: one.ours, 0.5: "tie", 0.0: one.theirs}
    chosen = range(0, len(one.pairs), max(1, len(one.pairs) // SHOWN))[:SHOWN]
    rows = tuple(
        (
            one.pairs[n].request,
            *(f"\n{' '.join(text.split())}" for text in one.pairs[n][1:]),
            "\n" + ", ".join(words.get(float(value), "none") for value in found.outcomes[n]),
        )
        for n in chosen
    )
    columns = ("request", one.ours, one.theirs, "better")
    return Table(f"Replies of {one.ours} and {one.theirs}", columns, rows)
