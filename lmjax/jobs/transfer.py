"""Scores of runs on each other's held-out text: what was learnt, kept and forgotten.

python -m lmjax.jobs.transfer runs=runs/quickstart,runs/instruct output=runs/transfer
"""

from __future__ import annotations

from pathlib import Path

import jax

from lmjax.config import UserError, config
from lmjax.console import RunLog, Table, make_console
from lmjax.jobs.held_out_tasks import matrix_of, score_on, score_tables, starting_model, tasks_of
from lmjax.jobs.report import write_report
from lmjax.jobs.results import Results
from lmjax.jobs.settings import at_least
from lmjax.launch import import_modules, is_first, run
from lmjax.models import initialize
from lmjax.parallel import Mesh, training_layout
from lmjax.remote import check_path
from lmjax.runs.folder import REPORT, RESULTS, RunFolder

RANDOM = "random"  # the column of a model that has learnt nothing
CAPTION = (
    "Scores on text that was held out of training: of random parameters, and after each run in the "
    "order of training."
)
TRANSFER_CAPTION = (
    "Forward transfer: gain on a set right before it is trained on, over random parameters. "
    "Backward transfer: gain of the last model over the one that had just been trained on a set, "
    "of all sets but the last run's; below 0 it is forgetting. A gain is a rise of the accuracy, a "
    "fall of the loss (Lopez-Paz and Ranzato 2017, arXiv:1706.08840)."
)


@config
class TransferReport:
    """The matrix of scores on every task after every stage, and what was transferred.

    The stages are runs, each of which began with the one before. The tasks are their held-out sets;
    a set belongs to the first run with a domain of its name, so that replayed text is scored once.
    Each model reads the text in its own tokens.
    """

    runs: tuple[
        str, ...
    ] = ()  # run folders in the order of training; the first may be a public one
    output: str | None = None  # folder of the report
    tokens: int | None = None  # about how many tokens of each set to score; none: all
    mesh: Mesh = Mesh()  # how the devices are arranged
    imports: tuple[str, ...] = ()  # modules of your own whose classes the runs have

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant, or folders named twice."""
        at_least(1, self, "tokens")
        check_path(self.output or "", "output", write=True)
        names = [Path(folder).name for folder in self.runs]
        if len(set(names)) < len(names) or RANDOM in names:
            raise UserError(f"runs={','.join(self.runs)}: their folders must have different names")

    def run(self) -> None:
        """Scores all models, and writes results.json and report.html.

        Raises:
          UserError: no folders are named, or one cannot be read or written.
        """
        if not self.runs or self.output is None:
            raise UserError(
                "Which folders? For instance: python -m lmjax.jobs.transfer "
                "runs=runs/quickstart,runs/instruct output=runs/transfer"
            )
        import_modules(self.imports)
        with jax.set_mesh(self.mesh.build()):
            write_tables(self, self.output, transfer_tables(self.runs, self.tokens))


def transfer_tables(runs: tuple[str, ...], tokens: int | None = None) -> tuple[Table, ...]:
    """Tables of scores after each run, and of what was transferred; a mesh is set.

    Args:
      runs: folders in the order of training.
      tokens: about how many tokens of each set to score; None: all.

    Raises:
      UserError: a folder cannot be read, or none of them knows its text.
    """
    log, tasks, scores = RunLog(make_console()), tasks_of(runs), {}
    if not tasks:
        raise UserError(f"runs={','.join(runs)}: none of them says what text it was trained on")
    for folder in runs:
        with log.phase(f"scoring {folder}"):
            model, params = starting_model(folder)
            if not scores:
                _, nothing = initialize(model, training_layout(), jax.random.key(0))
                scores[RANDOM] = score_on(tasks, model, nothing, folder, tokens, log)
            scores[Path(folder).name] = score_on(tasks, model, params, folder, tokens, log)
    tables = score_tables(scores, CAPTION)
    rows = []
    for table in tables:
        matrix = matrix_of(table, tasks)
        gains = matrix.average(), matrix.forward_transfer(), matrix.backward_transfer()
        rows.append((table.title.lower(), *gains))
    columns = ("measure", "average at the end", "forward transfer", "backward transfer")
    return (*tables, Table("Backward transfer", columns, tuple(rows), TRANSFER_CAPTION))


def write_tables(settings: object, output: str, tables: tuple[Table, ...]) -> None:
    """Writes a folder with a report that has these tables, and prints them.

    Args:
      settings: the config that made them, which becomes config.json.
      output: the folder; one that has a report of the same config class is written anew.
      tables: of the report.

    Raises:
      UserError: the folder holds something else, or cannot be written.
    """
    log, folder = RunLog(make_console()), RunFolder(output)
    if folder.config.is_file() and type(folder.experiment()) is not type(settings):
        raise UserError(f"output={output}: it is the folder of another run; choose another one")
    if is_first():
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_config(settings)
        folder.write_json(RESULTS, Results(tables=tables).to_json())
        write_report(folder)
    for table in tables:
        log.table(table)
    log.files(folder.location, ((REPORT, "all of it on one page"),))


if __name__ == "__main__":
    run(TransferReport())
