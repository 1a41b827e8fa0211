"""Averages of a fine-tuned model's weights with those that it began with (WiSE-FT).

python -m lmjax.jobs.weight_average runs/quickstart runs/instruct                 # scores by alpha
python -m lmjax.jobs.weight_average runs/quickstart runs/instruct runs/mean alpha=0.5
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jaxtyping import Array, Float

from lmjax.config import UserError, config
from lmjax.console import RunLog, Table, make_console
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.interop.convert import ConvertedModel, family_of, write_run
from lmjax.interop.folder import model_folder, read_params, tokenizer_folder
from lmjax.interop.new_folder import new_folder_anywhere
from lmjax.jobs.held_out_tasks import score_on, score_tables, starting_model, tasks_of
from lmjax.jobs.report import write_report
from lmjax.jobs.results import Results
from lmjax.jobs.run_text import text_of_run
from lmjax.jobs.settings import at_least
from lmjax.launch import import_modules, is_first, run
from lmjax.models import TransformerConfig
from lmjax.objectives import TextObjective
from lmjax.parallel import Mesh, training_layout
from lmjax.remote import check_path, local_copy
from lmjax.runs.folder import RESULTS, RunFolder
from lmjax.runs.trained_model import TrainedModel

CAPTION = (
    "Scores on text that was held out of training, of averages (1 - alpha) x start + alpha x tuned "
    "of the weights (Wortsman et al. 2021, arXiv:2109.01903)."
)


@config
class AveragedModel(ConvertedModel):
    """An average of two models: what the config.json of its run folder says."""

    start: str  # the folder that has the share 1 - alpha; `source` has the share alpha
    alpha: float  # the share of `source`
    objective: TextObjective | None = None  # what the model of `source` was trained to do


@config
class WeightAverage:
    """The average of a model's weights with those that its training began with (WiSE-FT).

    Somewhere between the two it is often better on both than either (Wortsman et al. 2021,
    arXiv:2109.01903): a table has the scores on the held-out text of both, by alpha.
    """

    start: str | None = None  # run folder or public model folder that training began with
    tuned: str | None = None  # run folder that has the share alpha
    output: str | None = None  # run folder that is made with the average; none: the table alone
    alpha: float = 0.5  # share of `tuned` in what is written
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares that are scored; none: ()
    tokens: int | None = None  # about how many tokens of each held-out set to score; none: all
    mesh: Mesh = Mesh()  # how the devices are arranged
    imports: tuple[str, ...] = ()  # modules of your own whose classes the runs have

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        at_least(1, self, "tokens")
        for name in ("start", "tuned"):
            check_path(getattr(self, name) or "", name)
        check_path(self.output or "", "output", write=True)
        for alpha in (self.alpha, *self.alphas):
            if not 0 <= alpha <= 1:
                raise UserError(f"alpha={alpha:g}: a share is between 0 and 1")

    def run(self) -> None:
        """Scores averages, and writes one.

        Raises:
          UserError: no folders are named, one cannot be read or written, or their models differ.
        """
        if self.start is None or self.tuned is None:
            raise UserError(
                "Which folders? For instance: "
                "python -m lmjax.jobs.weight_average runs/quickstart runs/instruct runs/mean"
            )
        import_modules(self.imports)
        with jax.set_mesh(self.mesh.build()):
            model, tuned = starting_model(self.tuned)
            check_heads(self.start, self.tuned, model)
            start = read_params(self.start, model, training_layout())
            tables = self.scored(model, start, tuned) if self.alphas else ()
            if self.output is not None:
                self.write(model, weight_average(start, tuned, self.alpha), tables)

    def scored(self, model: TransformerConfig, start: dict, tuned: dict) -> list[Table]:
        """Tables of scores by alpha, which are printed."""
        log = RunLog(make_console())
        tasks, scores = tasks_of((self.start, self.tuned)), {}
        if not tasks:
            raise UserError(
                f"neither {self.start} nor {self.tuned} says what text it was trained on, to score "
                "averages on: set alphas=()"
            )
        for alpha in self.alphas:
            mean = weight_average(start, tuned, alpha)
            found = score_on(tasks, model, mean, self.tuned, self.tokens, log)
            scores[f"alpha {alpha:g}"] = found
        tables = score_tables(scores, CAPTION)
        for table in tables:
            log.table(table)
        return tables

    def write(self, model: TransformerConfig, params: dict, tables: Sequence[Table]) -> None:
        """Writes the run folder."""
        source, console = local_copy(self.tuned, "tuned"), make_console()
        trained = TrainedModel(model, params, read_tokenizer(tokenizer_folder(self.tuned)))
        text = text_of_run(self.tuned)
        made = AveragedModel(
            model=model,
            source=self.tuned,
            family=family_of(source),
            start=self.start,
            alpha=self.alpha,
            objective=None if text is None else text[1],
        )
        with new_folder_anywhere(self.output, index=True) as folder:
            write_run(RunFolder(folder), trained, source, console)
            if is_first():
                run_folder = RunFolder(folder)
                run_folder.write_config(made)
                run_folder.write_json(RESULTS, Results(tables=tuple(tables)).to_json())
                write_report(run_folder)
        console.print(f"written: {self.output}", soft_wrap=True)


@jax.jit
def weight_average(start: dict, tuned: dict, alpha: Float[Array, ""] | float) -> dict:
    """(1 - alpha) start + alpha tuned, of parameters of one structure; at 0 and 1 these exactly."""
    return jax.tree.map(lambda a, b: (1 - alpha) * a + alpha * b, start, tuned)


def check_heads(start: str, tuned: str, model: TransformerConfig) -> None:
    """Raises UserError where the tuned model has a head that the other one lacks."""
    theirs = model_folder(start)
    new = sorted({head.name for head in model.heads} - {head.name for head in theirs.heads})
    if new or (model.word_head and not theirs.word_head):
        raise UserError(
            f"{tuned} has the head {', '.join(new) or 'of words'}, which {start} lacks: there is "
            "nothing to average it with"
        )


if __name__ == "__main__":
    run(WeightAverage(), positional=("start", "tuned", "output"))
