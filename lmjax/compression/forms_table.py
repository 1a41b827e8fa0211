"""The command that measures models beside each other: size, perplexity, tasks, speed, memory."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import jax
from rich.console import Console

from lmjax.compression.forms_picture import Point, picture
from lmjax.compression.peak_memory import PeakMemory
from lmjax.config import UserError, config
from lmjax.console import make_console
from lmjax.evaluation.answering import Answering
from lmjax.evaluation.likelihood import LikelihoodScorer
from lmjax.evaluation.requests import RollingRequest
from lmjax.evaluation.task_evaluator import check_room, check_tasks, result_of
from lmjax.evaluation.task_result import row_name
from lmjax.evaluation.tasks.task import EvaluationTask, Question
from lmjax.files import errors_told, local_path
from lmjax.generation.run import load
from lmjax.generation.text import TextGenerator
from lmjax.interop.beginning import files_of_parameters
from lmjax.interop.folder import begin_token
from lmjax.interop.packed_formats import KEY
from lmjax.interop.settings import read_settings
from lmjax.launch import import_modules, is_first
from lmjax.models import TransformerConfig
from lmjax.parallel import Mesh
from lmjax.remote import check_path, local_copy
from lmjax.scaling.plan_report import check_report, write_plan
from lmjax.scaling.plan_tables import PlanTable, print_table
from lmjax.training.zeros import share_of_zeros

COLUMNS = ("model", "MB on disk", "MB in memory", "bits per byte", "perplexity", "rise, percent")
SPEED = ("tokens/s", "peak MB")
FEW_ZEROS = 0.01  # share of zeros from which a model is called sparse
CAPTION = (
    "In memory: what decoding reads. Perplexity by tokens of the text, and its rise over the first"
    " model. Tokens/s: one text, greedy, the best of {runs} runs. Peak: the weights, and"
    " the most memory that these texts took beside them, as the system tells."
)


Asked = tuple[EvaluationTask, list[Question]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Numbers of one model: all that it takes and gives.

    Attributes:
      name: of its folder.
      weights: how they are kept, in words.
      disk: bytes of its weights and settings.
      memory: bytes of the weights on the devices, as decoding reads them.
      nats: minus the log-likelihood of the text.
      tokens: of the text.
      text: bytes of the text.
      speed: tokens a second; None: not measured.
      peak: bytes of the weights and the most beside them, where a text was written; None: not
        measured.
      scores: of tasks, the first measure of each, by its name.
    """

    name: str
    weights: str
    disk: int
    memory: int
    nats: float
    tokens: int
    text: int
    speed: float | None
    peak: int | None = None
    scores: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """By tokens."""
        return math.exp(min(700.0, self.nats / self.tokens))

    @property
    def bits_per_byte(self) -> float:
        """Of the text."""
        return self.nats / self.text / math.log(2)


@config
class FormsTable:
    """Size, perplexity, tasks, speed and memory of models beside the first of them."""

    models: tuple[str, ...] = ()  # run folders or model folders, the whole one first
    text: str | None = None  # a text file that none of them was trained on
    length: int = 20_000  # letters of it that are scored
    tasks: tuple[EvaluationTask, ...] = ()  # what they are asked; the first score of each is shown
    tokens: int = 64  # of a text that is written to measure speed; 0: it is not measured
    runs: int = 3  # of them
    output: str | None = None  # file of the numbers, JSON; none: they are printed alone
    report: str = ""  # file to write the table to as well: forms.html or forms.md
    mesh: Mesh = Mesh()  # how the devices are arranged
    imports: tuple[str, ...] = ()  # modules of your own whose tasks there are

    def validate(self) -> None:
        """Raises UserError for settings that cannot be meant."""
        for path in self.models:
            check_path(path, "models")
        for name, least in (("length", 1), ("tokens", 0), ("runs", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: must be {least} or more")
        if self.report:
            check_report(self.report)
        if self.tasks:
            check_tasks(self.tasks)

    def run(self) -> None:
        """Measures one model after another, and shows the table.

        Raises:
          UserError: no model or text is named, or one cannot be read.
        """
        if not self.models or self.text is None:
            raise UserError(
                "Which models, and which text? For instance: python -m lmjax.compression table"
                " runs/x runs/x-int4 text=held_out.txt"
            )
        import_modules(self.imports)
        path = local_path(self.text, "text")
        with errors_told(f"text={path} cannot be read"):
            text = path.read_text("utf-8", errors="replace")[: self.length]
        if not text:
            raise UserError(f"text={path} is empty")
        console, found = make_console(), []
        asked = [(task, task.questions()) for task in self.tasks]
        with jax.set_mesh(self.mesh.build()):
            for folder in self.models:
                found.append(self.measure(folder, text, asked))
        self.show(found, console)

    def measure(self, path: str, text: str, asked: list[Asked]) -> Measured:
        """One model; it is let go before the next."""
        folder = local_copy(path, "models")
        disk = sum(file.stat().st_size for file in files_of_parameters(folder))
        model = load(folder)
        memory = sum(leaf.nbytes for leaf in jax.tree.leaves(model.generator.weights))
        speed, beside = self.speed(model) if self.tokens else (None, None)
        begin = begin_token(folder, model.tokenizer)
        scorer = LikelihoodScorer(model, batch_size=4, begin=begin)
        (answer,) = scorer.rolling([RollingRequest(text)])
        return Measured(
            name=Path(path).name,
            weights=words_of(folder, model.generator.config, model.generator.weights),
            disk=disk,
            memory=memory,
            nats=-answer.log_probability,
            tokens=answer.tokens,
            text=len(text.encode("utf-8", "surrogatepass")),
            speed=speed,
            peak=None if beside is None else memory + beside,
            scores=scores_of(model, asked, begin),
        )

    def speed(self, model: TextGenerator) -> tuple[float, int]:
        """Tokens a second of one greedy text, and bytes that it takes beside the weights."""
        prompt, best = [model.tokenizer.encode("The list")[:2] or [0]], 0.0
        model.generator.generate(prompt, max_tokens=self.tokens)  # which compiles
        with PeakMemory() as peak:
            for _ in range(self.runs):
                begin = time.perf_counter()
                (row,) = model.generator.generate(prompt, max_tokens=self.tokens)
                best = max(best, len(row) / (time.perf_counter() - begin))
        return best, peak.bytes

    def show(self, found: list[Measured], console: Console) -> None:
        """Prints the table, and writes what was asked for."""
        columns = (*COLUMNS, *found[0].scores, *(SPEED if self.tokens else ()))
        rows = [self.row(one, found[0]) for one in found]
        caption = CAPTION.format(runs=self.runs)
        if not is_first():
            return
        cells = tuple(tuple(shown(cell) for cell in row) for row in rows)
        most = max(one.memory for one in found)
        bars = tuple(one.memory / most for one in found)
        table = PlanTable("Forms of a model", columns, cells, bars=bars, note=caption)
        print_table(table, console)
        if self.output is not None:
            numbers = [
                dataclasses.asdict(one)
                | {"perplexity": one.perplexity, "bits_per_byte": one.bits_per_byte}
                for one in found
            ]
            with errors_told(f"cannot write output={self.output}"):
                Path(self.output).write_text(json.dumps(numbers, indent=2) + "\n", "utf-8")
        if self.report:
            points = [Point(one.name, one.memory / 1e6, one.bits_per_byte) for one in found]
            drawn = picture(points, "MB in memory", "bits per byte", "Less of both is better.")
            facts = [("text", f"{self.text}, {found[0].text:,} bytes"), ("bars", "MB in memory")]
            write_plan(
                self.report, "Forms of a model", facts, [table], pictures=[("Size and loss", drawn)]
            )

    def row(self, one: Measured, first: Measured) -> tuple:
        """Cells of a model."""
        same = one is not first and one.tokens == first.tokens
        rise = 100 * (one.perplexity / first.perplexity - 1) if same else None
        peak = None if one.peak is None else one.peak / 1e6
        speed = (one.speed, peak) if self.tokens else ()
        sizes = one.disk / 1e6, one.memory / 1e6
        name = f"{one.name} ({one.weights})"
        return (name, *sizes, one.bits_per_byte, one.perplexity, rise, *one.scores.values(), *speed)


def scores_of(model: TextGenerator, asked: list[Asked], begin: int | None) -> dict[str, float]:
    """The first measure of a model in each task.

    Args:
      model: that answers.
      asked: the tasks, with their questions.
      begin: see `beginning_of`.

    Raises:
      UserError: a question does not fit into the model, or it gives no numbers.
    """
    found = {}
    for task, questions in asked:
        longest = model.generator.config.max_length
        check_room(task, questions, model.tokenizer, longest, model.filling)
        result = result_of(task, questions, Answering(model, begin=begin))
        measure = task.measures[0]
        found[row_name(result, measure)] = result.estimate(measure).value
    return found


def words_of(folder: Path, model: TransformerConfig, weights: dict) -> str:
    """Words for the way in which the weights of a model are kept, as decoding reads them.

    Args:
      folder: of the model.
      model: its config.
      weights: its parameters.
    """
    if model.quantization is not None:
        code = model.quantization.weights
        of = "outputs" if code.block is None else f"groups of {code.block}"
        return f"{type(code).__name__}, {of}"
    words = [model.dtype]
    if (folder / "config.json").is_file() and (given := read_settings(folder).get(KEY)):
        words = [f"{given.get('quant_method')}, read as {model.dtype}"]
    if (zeros := share_of_zeros(weights)) >= FEW_ZEROS:
        words.append(f"{zeros:.0%} zeros")
    return ", ".join(words)


def shown(cell: str | float | None) -> str:
    """A cell of the report."""
    if isinstance(cell, float):
        return f"{cell:,.1f}" if cell >= 100 else f"{cell:.3g}" if cell < 1 else f"{cell:.2f}"
    return "" if cell is None else str(cell)
