"""Programs that the model writes and that are run: HumanEval and MBPP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lmjax.config import UserError, config
from lmjax.evaluation.pass_at_k import pass_at_k
from lmjax.evaluation.requests import ModelRequest, Written, WrittenRequest
from lmjax.evaluation.tasks.records import Record
from lmjax.evaluation.tasks.sandbox import SECONDS, check_isolation, run_program
from lmjax.evaluation.tasks.task import EvaluationTask, Item, ItemScores, Measure


@config
class CodeTask(EvaluationTask):
    """Base of the tasks whose answers are programs; they run in a process with limits."""

    run_code: bool = False  # run what the model writes; see `lmjax.evaluation.tasks.sandbox`
    # run it also where the system cannot take its network away
    allow_network: bool = False
    samples: int = 1  # programs a problem, from which pass@k is estimated
    tries: tuple[int, ...] = ()  # each k of pass@k, as in (1, 10, 100); none: 1 and `samples`
    temperature: float = 0.0  # of sampling; 0: the likeliest
    max_tokens: int = 1024  # most tokens of a program
    seconds: float = SECONDS  # that a program may take

    generates: ClassVar[bool] = True
    stop: ClassVar[tuple[str, ...]] = ()

    @property
    def measures(self) -> tuple[Measure, ...]:
        """For each k, the chance that one of k programs passes."""
        return tuple(Measure(f"pass@{tries}") for tries in self._tries)

    @property
    def _tries(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.tries or (1, self.samples)))

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        super().validate()
        if self.samples < 1 or self.seconds <= 0:
            raise UserError(f"samples={self.samples}, seconds={self.seconds}: must be above 0")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"samples={self.samples} are all alike at temperature=0")
        if wrong := [k for k in self.tries if not 1 <= k <= self.samples]:
            raise UserError(
                f"tries={self.tries}: pass@{wrong[0]} needs as many samples; samples={self.samples}"
            )

    def read_items(self, path: str) -> list[Item]:
        """See `EvaluationTask.read_items`; UserError unless code may be run."""
        if not self.run_code:
            raise UserError(
                f"{self.name} runs programs that the model writes: run_code=true allows it"
            )
        check_isolation(self.allow_network)
        return super().read_items(path)

    def requests(self, item: Item, context: str) -> tuple[ModelRequest, ...]:
        """See `EvaluationTask.requests`."""
        settings = self.max_tokens, self.temperature, None, self.samples, self.seed
        return (WrittenRequest(context, self.stop, *settings),)

    def measure(self, item: Item, answers: Sequence[Written]) -> ItemScores:
        """See `EvaluationTask.measure`."""
        programs = [self.program(item, text) for text in answers[0].texts]
        right = sum(
            run_program(program, self.seconds, self.allow_network).passed for program in programs
        )
        return {f"pass@{k}": pass_at_k(len(programs), right, k) for k in self._tries}

    def program(self, item: Item, text: str) -> str:
        """The whole program with its tests."""
        return f"{text}\n{item.details['tests']}"

    def stop_rule(self) -> str:
        """See `EvaluationTask.stop_rule`."""
        return f"{', '.join(map(repr, self.stop))}, the end token, or {self.max_tokens} tokens"


@config
class HumanEval(CodeTask):
    """HumanEval: functions to complete (Chen et al. 2021, arXiv:2107.03374)."""

    stop: ClassVar[tuple[str, ...]] = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

    def read_item(self, record: Record) -> Item:
        """See `EvaluationTask.read_item`."""
        tests = f"{record.text('test')}\ncheck({record.text('entry_point')})\n"
        prompt, solution = record.text("prompt"), record.text("canonical_solution")
        identity = record.text("task_id")
        return Item(prompt, solution, identity=identity, details={"tests": tests})

    def program(self, item: Item, text: str) -> str:
        """See `CodeTask.program`."""
        return super().program(item, item.prompt + text)


@config
class MBPP(CodeTask):
    """MBPP: functions that pass three tests (Austin et al. 2021, arXiv:2108.07732).

    Usual are shots=3, the tasks 2, 3 and 4 (`examples_path`), which EleutherAI's harness shows. It
    runs neither the set-up code of a task nor its tests beyond the third; both are run here.
    """

    max_tokens: int = 256  # most tokens of a program

    stop: ClassVar[tuple[str, ...]] = ("[DONE]",)
    delimiter: ClassVar[str] = ""
    draws: ClassVar[bool] = False

    def read_item(self, record: Record) -> Item:
        """See `EvaluationTask.read_item`."""
        tests = "\n".join(record.texts("test_list")[:3])
        prompt = (
            "You are an expert Python programmer, and here is your task: "
            f"{record.text('text', 'prompt')} Your code should pass these tests:\n\n{tests}\n"
            "[BEGIN]\n"
        )
        setup = str(record.values.get("test_setup_code", ""))
        every = "\n".join([setup, *record.texts("test_list")])
        answer = f"{record.text('code')}\n[DONE]"
        return Item(prompt, answer, identity=record.where, details={"tests": every})
