"""Tokens a second of a training step: lmjax beside an equivalent torch model, or beside nanodo.

python -m benchmarks.train_step [python=PYTHON_WITH_TORCH] [account=true] [json=FILE]
python -m benchmarks.train_step nanodo=FOLDER_OF_A_CHECKOUT [json=FILE]

Every side is a process of its own. They start from the same parameters, see the same batch, and
take turns, so that a machine that is not quiet is unquiet for all; a ratio is that of a round.
"""

import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness import Worker, WorkerError, save, spread, table
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line

PAUSE = 0.3  # seconds until the threads of the side before have stopped waiting for work
CHECKED = 3  # steps whose losses must agree
TOLERANCE = 1e-4  # relative: float32 sums in another order, through three updates
PARTS = (
    "attention",
    "projections",
    "feed_forward",
    "norm",
    "embedding",
    "head_and_loss",
    "optimizer",
)


@config
class TrainStepBenchmark:
    """A step in float32: forward, backward, clipping, AdamW."""

    layers: int = 6  # blocks
    hidden: int = 384  # width
    heads: int = 6  # of attention
    length: int = 256  # tokens in a row
    batch: int = 16  # rows
    vocabulary: int = 4096  # tokens
    unroll: int = 0  # of lmjax's scan over the layers; 0 is a Python loop
    torch: tuple[Literal["compiled", "eager"], ...] = ("compiled", "eager")  # how torch runs
    cores: int = 0  # that each side may use; 0: all
    rounds: int = 7  # turns of each side
    steps: int = 3  # a turn
    account: bool = False  # time each kind of operation by itself as well
    # checkout of nanodo, whose interpreter needs ml_collections; the model has no biases then, as
    # nanodo's has none, and torch is left out
    nanodo: str = ""
    # interpreter that has torch, or what nanodo needs, with this repository's folder in reach
    python: str = ""
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for numbers that measure nothing."""
        for name in ("rounds", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1")
        if self.hidden % self.heads:
            raise UserError(f"hidden={self.hidden} is no multiple of heads={self.heads}")
        if self.vocabulary % 128:
            raise UserError(
                f"vocabulary={self.vocabulary}: lmjax alone pads its table to a multiple of 128;"
                f" take {-(-self.vocabulary // 128) * 128}, so that all sides have one"
            )
        if self.nanodo and not Path(self.nanodo, "nanodo", "model.py").is_file():
            raise UserError(f"nanodo={self.nanodo}: that folder has no nanodo/model.py")


def main() -> None:
    """Measures and prints."""
    settings = from_command_line(TrainStepBenchmark())
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        sides, facts = start(settings, folder, stack)
        print(f"{'':18}losses of the first {CHECKED} steps agree to {check(sides):.1e}")
        rounds = alternate(settings, sides)
        results = {"sides": facts, "rounds": rounds, **summarise(settings, rounds, facts)}
        if settings.account:
            results["account_ms"] = account(settings, sides, results)
    save(settings.json, "train_step", **results)


def start(settings: TrainStepBenchmark, folder: str, stack: ExitStack) -> tuple[dict, dict]:
    """The sides by name, compiled and warm, and what they tell of themselves."""
    shape = {
        name: getattr(settings, name)
        for name in ("layers", "hidden", "heads", "length", "batch", "vocabulary", "cores")
    }
    sides, facts = {}, {}

    def add(name: str, worker: Worker, **more: Any) -> None:
        stack.enter_context(worker)
        begin = time.perf_counter()
        found = worker.ask("prepare", folder=folder, **shape, **more)
        sides[name], facts[name] = worker, found
        print(
            f"{name:16}  {found['version']}, {found['threads']} threads, "
            f"{found['parameters'] / 1e6:.2f} M parameters; "
            f"ready in {time.perf_counter() - begin:.0f} s"
        )

    ours = Worker("benchmarks.train_step_lmjax")
    add("lmjax", ours, unroll=settings.unroll, biases=not settings.nanodo)
    others = [
        (f"torch {how}", "benchmarks.train_step_torch", {"compiled": how == "compiled"})
        for how in settings.torch
    ]
    if settings.nanodo:
        checkout = {"checkout": str(Path(settings.nanodo).resolve())}
        others = [("nanodo", "benchmarks.train_step_nanodo", checkout)]
    for name, module, more in others:
        try:
            add(name, Worker(module, settings.python or sys.executable), **more)
        except WorkerError as error:
            print(f"{name:16}  left out: {error}")
    if len(sides) == 1 and settings.torch:
        print("Nothing to compare with: give python=... an interpreter that has torch and numpy.")
    return sides, facts


def check(sides: Mapping[str, Worker]) -> float:
    """The largest relative difference between the first losses of the sides.

    Raises:
      UserError: they are not the same model, so that a comparison would mean nothing.
    """
    losses = {name: worker.ask("steps", count=CHECKED)["losses"] for name, worker in sides.items()}
    worst = max(
        abs(loss - ours) / ours
        for theirs in losses.values()
        for loss, ours in zip(theirs, losses["lmjax"], strict=True)
    )
    if not worst < TOLERANCE:
        raise UserError(f"the sides do not train the same model; their losses: {losses}")
    return worst


def alternate(settings: TrainStepBenchmark, sides: Mapping[str, Worker]) -> dict[str, list]:
    """Seconds of every step, by side and round."""
    taken = {name: [] for name in sides}
    for number in range(settings.rounds):
        # There and back again, so that none is always the first.
        for name in list(sides)[:: -1 if number % 2 else 1]:
            time.sleep(PAUSE)
            taken[name].append(sides[name].ask("steps", count=settings.steps)["seconds"])
    return taken


def summarise(
    settings: TrainStepBenchmark, rounds: Mapping[str, list], facts: Mapping[str, dict]
) -> dict[str, Any]:
    """Prints the table; step times, and how many times as fast as each other side lmjax is.

    The MFU is that of the best step, by the peak measured as the sides were made ready.
    """
    tokens = settings.batch * settings.length
    best = facts["lmjax"]["flops_per_token"] * tokens / facts["lmjax"]["peak_flops"]  # seconds
    times = {
        name: spread([seconds for turn in turns for seconds in turn])
        for name, turns in rounds.items()
    }
    ratios = {
        name: spread([min(b) / min(a) for a, b in zip(rounds["lmjax"], turns, strict=True)])
        for name, turns in rounds.items()
        if name != "lmjax"
    }
    rows = []
    for name, time_ in times.items():
        speeds = tokens / time_["min"], tokens / time_["median"], best / time_["min"]
        ratio = [ratios[name][key] for key in ("median", "min", "max")] if name in ratios else []
        rows.append([name, time_["min"], time_["median"], *speeds, *(ratio or [""] * 3)])
    columns = ["", "step s (min)", "(median)", "tokens/s (best)", "(median)", "MFU"]
    print("\n" + table([*columns, "lmjax / it", "worst round", "best round"], rows))
    return {"step_seconds": times, "lmjax_tokens_per_second_over": ratios}


def account(
    settings: TrainStepBenchmark, sides: Mapping[str, Worker], results: Mapping[str, Any]
) -> dict[str, Any]:
    """Prints where the time goes: each operation alone, forward and backward, times its number.

    What is left of the step beyond their sum is what lies between them (residuals, copies), less
    what they save by being compiled together.
    """
    times = results["step_seconds"]
    fastest = min(
        (name for name in times if name != "lmjax"), default=None, key=lambda n: times[n]["min"]
    )
    compared = ["lmjax"] + ([fastest] if fastest else [])
    alone = {name: {} for name in compared}
    for part in PARTS:
        turns = {name: [] for name in compared}
        for _ in range(settings.rounds):
            for name in compared:
                time.sleep(PAUSE)
                answer = sides[name].ask("part", name=part, count=settings.steps)
                turns[name] += [answer["times"] * seconds for seconds in answer["seconds"]]
        for name in compared:
            alone[name][part] = 1000 * min(turns[name])
    for name in compared:
        total = sum(alone[name].values())
        step = 1000 * times[name]["min"]
        alone[name] |= {"sum": total, "step": step, "step - sum": step - total}
    rows = []
    for line in alone["lmjax"]:
        row = [alone[name][line] for name in compared]
        rows.append([line, *row, *([row[0] - row[1]] if fastest else [])])
    columns = ["ms a step (min)", *compared, *(["difference"] if fastest else [])]
    print("\n" + table(columns, rows))
    return alone


if __name__ == "__main__":
    with exit_on_user_error():
        main()
