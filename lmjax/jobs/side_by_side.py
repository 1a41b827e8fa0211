"""Models compared side by side: win rates by judges, on replies to held-out requests."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import PurePath

import jax
import numpy as np
from jaxtyping import Float

from lmjax.alignment.reward_functions import Reply, Reward, make_ready, total_rewards
from lmjax.alignment.rollouts import sample_replies
from lmjax.config import UserError, config, replace
from lmjax.console import RunLog, Table, make_console
from lmjax.data import Data
from lmjax.data.chat.templated import template_of
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.evaluation.text_samples import describe_sampling
from lmjax.evaluation.win_rates import win_rate
from lmjax.generation.run import load
from lmjax.generation.sampling import Sampling
from lmjax.interop.folder import model_folder, tokenizer_folder
from lmjax.jobs.begin_with import tokenizer_of
from lmjax.jobs.job import Job
from lmjax.jobs.report import write_report
from lmjax.jobs.results import Results
from lmjax.jobs.settings import at_least
from lmjax.jobs.text import prepare_text, warn_of_rows
from lmjax.launch import is_first
from lmjax.parallel import Mesh
from lmjax.runs.folder import RESULTS, RunFolder
from lmjax.runs.lock import lock_run_folder
from lmjax.training.feed import RequestFeed, RolloutRequest

ANSWERS = "replies.jsonl"  # every request with the reply of each model
SHOWN = 8  # requests in the report
SEED = 1 << 21  # of the first reply; those of training have other ones
INTERVAL = "With ends of its 95% interval; ties count half."


@config
class SideBySide(Job):
    """Compare models by their replies to the same held-out requests.

    Each model but the first is compared with the one before it.
    """

    models: tuple[str, ...]  # run folders or public model folders, in their order
    data: Data  # requests, of which the held-out ones are used; data.length is the most tokens
    judges: tuple[Reward, ...]  # what scores replies; each judges by itself
    requests: int = 128  # most of them, of each held-out set
    reply_length: int = 128  # most tokens of a reply
    sampling: Sampling = Sampling()  # how replies are drawn
    mesh: Mesh = Mesh()  # how the devices are arranged

    def validate(self) -> None:
        """Raises UserError for settings that do not go together."""
        if len(self.models) < 2 or not self.judges:
            raise UserError("give at least two models, and a judge")
        names = [judge.name for judge in self.judges]
        for given, what in ((self.models, "models"), (names, "judges")):
            if len(set(given)) < len(given):
                raise UserError(f"{what}: {', '.join(given)}: they must differ")
        at_least(1, self, "requests", "reply_length")
        if self.data.rows != "groups":
            raise UserError(f"data.rows={self.data.rows}: requests are read with data.rows=groups")

    def run(self) -> None:
        """See `Job.run`."""
        log = RunLog(make_console())
        with jax.set_mesh(self.mesh.build()), lock_run_folder(self) as folder:
            log.title(folder.path.name, folder.location)
            results = Results.from_json(folder.results())
            if not results.step:
                results = Results(step=1, tables=tuple(self._tables(folder, log)))
                if is_first():
                    folder.write_json(RESULTS, results.to_json())
                    write_report(folder)
            for table in results.tables:
                log.table(table)
            log.files(folder.path, [("the report", str(folder.report))])

    def _tables(self, folder: RunFolder, log: RunLog) -> Iterator[Table]:
        """Samples, scores, and compares."""
        feed = self._feed(folder, log)
        asked = [request for name in feed.prepared.held_out for request in self._some(feed, name)]
        if not asked:
            raise UserError(f"data.held_out={self.data.held_out}: no request is held out")
        replies = {}
        for model in self.models:
            with log.phase(f"replies of {model}"):
                replies[model] = self._replies(model, feed, asked)
        length = feed.length + self.reply_length
        judges = make_ready(self.judges, feed.tokenizer, length, self.models[0])
        scores = {
            judge.name: {m: total_rewards([judge], found)[0] for m, found in replies.items()}
            for judge in judges
        }
        if is_first():
            folder.write(ANSWERS, "".join(_lines(asked, replies)))
        for name, of_models in scores.items():
            yield _mean_scores(name, of_models)
            yield _win_rates(name, of_models)
        shown = list(range(0, len(asked), max(1, len(asked) // SHOWN)))[:SHOWN]
        rows = tuple(
            (asked[n].text, *(f"\n{label(m)}: {_on_a_line(replies[m][n])}" for m in self.models))
            for n in shown
        )
        columns = ("request", *map(label, self.models))
        yield Table("Replies", columns, rows, describe_sampling(self.sampling))

    def _feed(self, folder: RunFolder, log: RunLog) -> RequestFeed:
        """The requests, in the tokens of the models."""
        data = replace(self.data, tokenizer=tokenizer_of(self.data.tokenizer, self.models[0]))
        sizes = [model_folder(model).vocab_size for model in self.models]
        prepared = prepare_text(data, folder.tokenizer, min(sizes), log, {})
        for model in self.models:
            theirs = read_tokenizer(tokenizer_folder(model)).fingerprint
            if theirs != prepared.tokenizer.fingerprint:
                raise UserError(f"models: {self.models[0]} and {model} have different tokenizers")
        feed = RequestFeed(prepared, data.plan(0), data.length)
        warn_of_rows(log, feed.held_out_rows)
        return feed

    def _some(self, feed: RequestFeed, name: str) -> list[RolloutRequest]:
        """Requests from all of a held-out set."""
        count = feed.held_out_rows[name].count
        found = feed.held_out(name, count)
        chosen = np.linspace(0, count - 1, min(count, self.requests)).astype(int)
        return [found[n] for n in chosen]

    def _replies(
        self, folder: str, feed: RequestFeed, asked: Sequence[RolloutRequest]
    ) -> list[Reply]:
        """Replies of the model in a folder."""
        text = load(folder)
        formats = feed.tokenizer, template_of(feed.prepared.data)
        settings = self.sampling, self.reply_length, SEED
        found = sample_replies(text.generator, *formats, asked, *settings, prefix=text.reads_prefix)
        return [one.reply for one in found]


def label(folder: str) -> str:
    """Last part of a model's path."""
    return PurePath(folder).name or folder


def _on_a_line(reply: Reply) -> str:
    return " ".join(reply.text.split())


def _mean_scores(judge: str, scores: dict[str, Float[np.ndarray, "requests"]]) -> Table:
    """Table of the mean score of each model."""
    rows = tuple(
        (label(model), float(found.std() / np.sqrt(len(found))), float(found.mean()))
        for model, found in scores.items()
    )
    columns = ("model", "standard error", "score")
    return Table(f"Scores by {judge}", columns, rows, "Of replies to held-out requests.")


def _win_rates(judge: str, scores: dict[str, Float[np.ndarray, "requests"]]) -> Table:
    """Table of the win rate of each model over the one before."""
    models = list(scores)
    rows = []
    for before, model in itertools.pairwise(models):
        found = win_rate(scores[model], scores[before])
        rows.append((f"{label(model)} over {label(before)}", found.low, found.high, found.rate))
    columns = ("models", "low", "high", "win rate")
    return Table(f"Wins by {judge}", columns, tuple(rows), INTERVAL)


def _lines(asked: Sequence[RolloutRequest], replies: dict[str, list[Reply]]) -> Iterator[str]:
    """A JSON line for each request, with the answers of all models."""
    for request, *answers in zip(asked, *replies.values(), strict=True):
        line = {"prompt": request.text, "answers": [one.text for one in answers]}
        line |= {"models": list(replies)} | request.metadata
        yield json.dumps(line, ensure_ascii=False) + "\n"
