"""Trains the classifier of quality, and tells how well it separates held-out documents."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from lmjax.config import UserError, config
from lmjax.data.cleaning.quality import (
    QualityModel,
    area_under_curve,
    keep_probability,
    train_quality,
)
from lmjax.data.documents import Document, Source, is_held_out
from lmjax.jobs.job import Job
from lmjax.launch import run

MODEL = "quality.npz"


@config
class TrainQuality(Job):
    """Train a classifier of quality on documents of good sources and of raw ones.

    `QualityFilter(model="OUTPUT/quality.npz")` is the step that uses it.
    """

    output: str = "runs/quality"  # folder of the model and its report
    good: tuple[Source, ...] = ()  # such as encyclopaedias and books
    raw: tuple[Source, ...] = ()  # such as extracted pages of the web
    most: int = 20_000  # documents of each kind, the first ones
    bits: int = 18  # binary logarithm of the number of weights
    epochs: int = 5  # times that each document is learned from
    held_out: float = 0.1  # share of the documents that the report is about
    seed: int = 0  # of the order

    def validate(self) -> None:
        """Raises UserError for settings that cannot be meant."""
        if not 0 < self.held_out < 1 or not 8 <= self.bits <= 24 or self.epochs < 1:
            raise UserError(
                f"held_out={self.held_out}, bits={self.bits}, epochs={self.epochs}: must be between"
                " 0 and 1, from 8 to 24, and 1 or more"
            )

    def run(self) -> None:
        """See `Job.run`. UserError: a kind has too few documents."""
        from lmjax.console import RunLog, Table, make_console
        from lmjax.jobs.quality_audit import audit_tables
        from lmjax.jobs.report import write_report
        from lmjax.jobs.results import Results
        from lmjax.runs.folder import RESULTS
        from lmjax.runs.lock import lock_run_folder

        with lock_run_folder(self) as folder:
            log = RunLog(make_console())
            log.title(folder.path.name, folder.location)
            if not folder.results():
                kinds = {"good": self.good, "raw": self.raw}
                found = {name: self._documents(name, kind) for name, kind in kinds.items()}
                learned, held = (
                    {name: [d for d, h in both if h == part] for name, both in found.items()}
                    for part in (False, True)
                )
                with log.phase("training"):
                    texts = ([d.text for d in learned[name]] for name in kinds)
                    model = train_quality(*texts, self.bits, self.epochs, seed=self.seed)
                model.save(folder.path / MODEL)
                rows = tuple(_rows(model, held))
                columns = ("held-out documents", "number", "kept by GPT-3's rule", "score")
                area = area_under_curve(*([model.score(d.text) for d in held[n]] for n in kinds))
                note = f"The area under the curve (ROC) is {area:.4f}."
                table = Table("Quality", columns, rows, "Means of scores.", notes=(note,))
                tiles = (("area under the curve (ROC)", f"{area:.4f}"),)
                tables = (table, *audit_tables(model.score, held["raw"]))
                results = Results(step=1, tables=tables, tiles=tiles)
                folder.write_json(RESULTS, results.to_json())
                write_report(folder)
            for table in Results.from_json(folder.results()).tables:
                log.table(table)
            log.files(folder.path, [("the model", str(folder.path / MODEL))])

    def _documents(self, name: str, sources: tuple[Source, ...]) -> list[tuple[Document, bool]]:
        """Documents of a kind, and whether each is held out. UserError: there are too few."""
        every: Iterator[Document] = itertools.chain.from_iterable(s.documents() for s in sources)
        found = [(d, is_held_out(d, self.held_out)) for d in itertools.islice(every, self.most)]
        if len({held for _, held in found}) < 2:
            raise UserError(f"{name}: {len(found)} documents are too few to learn from and to test")
        return found


def _rows(
    model: QualityModel, held: dict[str, list[Document]]
) -> Iterator[tuple[str, int, float, float]]:
    """A kind's name, number of documents, share that is kept, and mean score."""
    for name, documents in held.items():
        scores = [model.score(document.text) for document in documents]
        kept = sum(map(keep_probability, scores)) / len(scores)
        yield name, len(scores), float(kept), sum(scores) / len(scores)


if __name__ == "__main__":
    run(TrainQuality())
