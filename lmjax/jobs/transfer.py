"""Scores of runs on each other's held-out text: what was learnt, kept and forgotten.

python -m lmjax.jobs.transfer runs=runs/quickstart,runs/instruct
"""

from __future__ import annotations

import jax

from lmjax.config import UserError, config
from lmjax.console import RunLog, Table, make_console
from lmjax.jobs.held_out_tasks import matrix_of, score_on, score_tables, starting_model, tasks_of
from lmjax.jobs.job import Job
from lmjax.jobs.report import write_report
from lmjax.jobs.results import Results
from lmjax.jobs.settings import at_least
from lmjax.jobs.side_by_side import label
from lmjax.launch import import_modules, is_first, run
from lmjax.models import initialize
from lmjax.parallel import Mesh, training_layout
from lmjax.remote import check_path
from lmjax.runs.folder import RESULTS
from lmjax.runs.lock import lock_run_folder

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
class TransferReport(Job):
    """The matrix of scores on every task after every stage, and what was transferred.

    The stages are runs, each of which began with the one before. The tasks are their held-out sets;
    a set belongs to the first run with a domain of its name, so that replayed text is scored once.
    Each model reads the text in its own tokens.
    """

    output: str = "runs/transfer"  # folder of the report
    runs: tuple[
        str, ...
    ] = ()  # run folders in the order of training; the first may be a public one
    tokens: int | None = None  # about how many tokens of each set to score; none: all
    mesh: Mesh = Mesh()  # how the devices are arranged
    imports: tuple[str, ...] = ()  # modules of your own whose classes the runs have

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant, or folders named twice."""
        at_least(1, self, "tokens")
        check_path(self.output, "output", write=True)
        names = [label(folder) for folder in self.runs]
        if len(set(names)) < len(names) or RANDOM in names:
            raise UserError(f"runs={','.join(self.runs)}: their folders must have different names")

    def run(self) -> None:
        """See `Job.run`; writes results.json and report.html."""
        if not self.runs:
            raise UserError(
                "Which runs? For instance: "
                "python -m lmjax.jobs.transfer runs=runs/quickstart,runs/instruct"
            )
        import_modules(self.imports)
        log = RunLog(make_console())
        with jax.set_mesh(self.mesh.build()), lock_run_folder(self) as folder:
            log.title(folder.path.name, folder.location)
            results = Results.from_json(folder.results())
            if not results.step:
                results = Results(step=1, tables=transfer_tables(self.runs, self.tokens))
                if is_first():
                    folder.write_config(self)
                    folder.write_json(RESULTS, results.to_json())
                    write_report(folder)
            for table in results.tables:
                log.table(table)
            log.files(folder.path, [("the report", str(folder.report))])


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
            scores[label(folder)] = score_on(tasks, model, params, folder, tokens, log)
    tables = score_tables(scores, CAPTION)
    rows = []
    for table in tables:
        matrix = matrix_of(table, tasks)
        gains = matrix.average(), matrix.forward_transfer(), matrix.backward_transfer()
        rows.append((table.title.lower(), *gains))
    columns = ("measure", "average at the end", "forward transfer", "backward transfer")
    return (*tables, Table("Backward transfer", columns, tuple(rows), TRANSFER_CAPTION))


if __name__ == "__main__":
    run(TransferReport())
