"""Trains the classifiers of toxicity, and tells how well they find held-out texts of each class."""

from __future__ import annotations

from collections.abc import Iterator

from lmjax.config import UserError, config
from lmjax.data.cleaning.quality import area_under_curve
from lmjax.data.cleaning.toxicity import ToxicityModel, classes_of, train_toxicity
from lmjax.data.documents import BadRecord, is_held_out
from lmjax.data.sources import JsonRecords
from lmjax.jobs.job import Job
from lmjax.launch import run

MODEL = "toxicity.npz"
Labelled = tuple[str, frozenset[str], bool]  # a text, its classes, whether it is held out


@config
class TrainToxicity(Job):
    """Train a classifier for each class of toxic text, from texts that people have labelled.

    `ToxicityFilter(model="OUTPUT/toxicity.npz")` is the step that uses them.
    """

    output: str = "runs/toxicity"  # folder of the model and its report
    texts: JsonRecords | None = None  # JSON lines, of which texts without a class are needed too
    field: str = "text"  # of a line: the text
    label: str = "labels"  # of a line: a class, a list of them, or an object of shares; or empty
    bits: int = 16  # binary logarithm of the number of weights of a class
    epochs: int = 5  # times that each text is learned from
    held_out: float = 0.1  # share of the texts that the report is about

    def validate(self) -> None:
        """Raises UserError for settings that cannot be meant."""
        if not 0 < self.held_out < 1 or not 8 <= self.bits <= 24 or self.epochs < 1:
            raise UserError(
                f"held_out={self.held_out}, bits={self.bits}, epochs={self.epochs}: must be between"
                " 0 and 1, from 8 to 24, and 1 or more"
            )

    def run(self) -> None:
        """See `Job.run`. UserError: there are no texts, or none of a class."""
        from lmjax.console import RunLog, Table, make_console
        from lmjax.jobs.report import write_report
        from lmjax.jobs.results import Results
        from lmjax.runs.folder import RESULTS
        from lmjax.runs.lock import lock_run_folder

        if self.texts is None:
            raise UserError("texts: give JSON lines with texts and their classes")
        with lock_run_folder(self) as folder:
            log = RunLog(make_console())
            log.title(folder.path.name, folder.location)
            if not folder.results():
                found = list(self._labelled())
                learned = [(text, own) for text, own, held in found if not held]
                with log.phase("training"):
                    model = train_toxicity(
                        [text for text, _ in learned],
                        [own for _, own in learned],
                        self.bits,
                        self.epochs,
                    )
                model.save(folder.path / MODEL)
                rows = tuple(_rows(model, [one for one in found if one[2]]))
                columns = ("class", "held-out texts of it", "area under the curve (ROC)")
                caption = "Of the texts that were not learned from; 0.5 is chance."
                tables = (Table("Toxicity", columns, rows, caption),)
                folder.write_json(RESULTS, Results(step=1, tables=tables).to_json())
                write_report(folder)
            for table in Results.from_json(folder.results()).tables:
                log.table(table)
            log.files(folder.path, [("the model", str(folder.path / MODEL))])

    def _labelled(self) -> Iterator[Labelled]:
        """Texts with their classes."""
        from lmjax.data.documents import Document

        def use(record: dict, identity: str) -> Iterator[Labelled]:
            text = record.get(self.field)
            if not isinstance(text, str):
                raise BadRecord(f"there is no text in the field {self.field!r}")
            own = classes_of(record.get(self.label, []), self.label)
            yield text, own, is_held_out(Document(text, identity), self.held_out)

        for part in self.texts.parts():
            for found in self.texts.lines(part, lambda message: None, use):
                yield from found


def _rows(model: ToxicityModel, held: list[Labelled]) -> Iterator[tuple[str, int, float | None]]:
    """A class, its number of held-out texts, and the area; None where one side has no text."""
    for name, classifier in zip(model.names, model.classifiers, strict=True):
        inside, outside = (
            [classifier.score(text) for text, own, _ in held if (name in own) == wanted]
            for wanted in (True, False)
        )
        area = area_under_curve(inside, outside) if inside and outside else None
        yield name, len(inside), area


if __name__ == "__main__":
    run(TrainToxicity())
