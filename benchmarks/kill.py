"""kill -9 at random moments of a training run: does it go on as if nothing had been?

python -m benchmarks.kill [kills=20] [json=FILE]

A run of `experiments.debug` is killed again and again and started again each time, and must end
with the bits of a run that was left alone: parameters, optimizer state and random keys, and, each
step once, loss, gradient norm and learning rate.
"""

import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from benchmarks.harness import ROOT, save, table
from benchmarks.same_run import differences
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line
from lmjax.runs.checkpoint_folder import SAVING
from lmjax.runs.folder import METRICS, RunFolder

POLL = 0.004  # seconds between looks at the run folder
KINDS = ("checkpoint", "step", "start", "step", "checkpoint")
Kind = Literal["start", "step", "checkpoint", "end"]


@config
class KillBenchmark:
    """Kills a short training run and compares its end with that of a run left alone."""

    kills: int = 20  # how often
    steps: int = 200  # of the run
    every: int = 5  # steps between checkpoints
    settings: tuple[str, ...] = ("evaluation.every=50",)  # further ones of the experiment
    seed: int = 0  # of the moments
    folder: str = ""  # where the runs stay; empty: nowhere
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError where there is no room for that many kills."""
        if self.kills < 1:
            raise UserError(f"kills={self.kills}: it must be at least 1")
        if self.steps < 4 * self.every:
            raise UserError(f"steps={self.steps}: a run needs at least 4 checkpoints")


@dataclasses.dataclass(frozen=True)
class Training:
    """A short run from the command line.

    Attributes:
      steps: its length.
      every: steps between checkpoints.
      caches: folder for tokens and compiled programs, so that a start is quick.
      settings: further settings of `experiments.debug`.
    """

    steps: int
    every: int
    caches: Path
    settings: Sequence[str] = ()

    @property
    def said(self) -> Path:
        """Output of the last process."""
        return self.caches / "said.txt"

    @contextmanager
    def running(self, output: Path) -> Iterator[subprocess.Popen]:
        """The process of the run in the folder `output`, begun or continued; it ends here."""
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(self.caches / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        settings = [
            f"output={output}",
            f"steps={self.steps}",
            f"checkpoint.every={self.every}",
            f"data.cache={self.caches / 'tokens'}",
            *self.settings,
        ]
        self.caches.mkdir(parents=True, exist_ok=True)
        with self.said.open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "experiments.debug", *settings],
                cwd=ROOT,
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
            )
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def finish(self, process: subprocess.Popen) -> None:
        """Waits for the end.

        Raises:
          RuntimeError: it was not a good one; with what the run said.
        """
        if process.wait():
            raise RuntimeError(f"the run ended with code {process.returncode}:\n{self._words()}")

    def kill(self, process: subprocess.Popen) -> None:
        """Kills the process.

        Raises:
          RuntimeError: it had ended by itself; with what it said.
        """
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError(
                f"the run ended before it was killed, code {process.returncode}:\n{self._words()}"
            )

    def _words(self) -> str:
        return self.said.read_text("utf-8", errors="replace")


@dataclasses.dataclass(frozen=True)
class Durations:
    """Seconds that a run takes up to its first step, a step, a checkpoint, and after all steps."""

    start: float
    step: float
    checkpoint: float
    end: float


@dataclasses.dataclass(frozen=True)
class Moment:
    """Moment of a kill: a random `share` of the time that `kind` takes after `step` is logged."""

    kind: Kind
    step: int
    share: float


@dataclasses.dataclass(frozen=True)
class Kill:
    """State of a run at a kill.

    Attributes:
      moment: when it came.
      logged: the last step in metrics.jsonl.
      saved: the last complete checkpoint, if any.
      half_written: whether a checkpoint was being written.
      first: seconds that the process took until it logged a step, if it came to that.
    """

    moment: Moment
    logged: int
    saved: int | None
    half_written: bool
    first: float | None


def draw_moments(kills: int, steps: int, every: int, seed: int) -> list[Moment]:
    """Random moments in the order of their steps; the last comes after the last step."""
    random_ = random.Random(seed)
    killed_at = sorted(random_.randint(1, steps - 2 * every) for _ in range(kills - 1))
    moments = [
        Moment(KINDS[number % len(KINDS)], step, random_.random())
        for number, step in enumerate(killed_at)
    ]
    # The end is not killed in its very last instants: the run must not be quicker than we are.
    return [*moments, Moment("end", steps, random_.random() / 2)]


def undisturbed(training: Training, output: Path) -> Durations:
    """Runs to the end, and says how long its parts took."""
    begin = time.time()
    first = last = None
    saves, opened = [], None
    with training.running(output) as process:
        for look in watch(process, output, begin):
            if first is None and look.step:
                first = look.time
            if last is None and look.step == training.steps:
                last = look.time
            if look.saving and opened is None:
                opened = look.time
            if not look.saving and opened is not None:
                saves.append(look.time - opened)
                opened = None
        training.finish(process)
    if not (first and last and saves):
        raise UserError("the run ended before it could be watched: give it more steps")
    step = (last - first) / training.steps
    return Durations(first - begin, step, statistics.median(saves), time.time() - last)


@dataclasses.dataclass(frozen=True)
class Look:
    """State of a run folder at one moment.

    Attributes:
      time: of the look, in seconds of the system's clock.
      step: the last that this process has logged.
      saving: whether this process is writing a checkpoint.
    """

    time: float
    step: int
    saving: bool


def watch(process: subprocess.Popen, output: Path, begin: float) -> Iterator[Look]:
    """Looks at the folder of a run that began at `begin`, again and again until it has ended."""
    step, seen = 0, None
    while process.poll() is None:
        changed = _changed(output / METRICS)
        # Before the process has touched the file, it tells of the one before it.
        if changed is not None and changed > begin and changed != seen:
            seen, step = changed, last_step(output)
        yield Look(time.time(), step, is_saving(output, begin))
        time.sleep(POLL)


def is_saving(output: Path, begin: float) -> bool:
    """Returns whether a checkpoint is half written by a process that has run since `begin`."""
    partial = RunFolder(output).checkpoints.glob(f"{SAVING}*")
    return any((_changed(path) or 0) > begin for path in partial)


def kill_at(training: Training, output: Path, moment: Moment, usual: Durations) -> Kill:
    """Starts or continues the run and kills it at that moment.

    Raises:
      RuntimeError: it ended by itself before.
    """
    begin = time.time()
    deadline = begin + moment.share * usual.start if moment.kind == "start" else None
    spans = {"checkpoint": usual.checkpoint, "step": usual.step, "end": usual.end}
    share, first = moment.share, None
    with training.running(output) as process:
        for look in watch(process, output, begin):
            if first is None and look.step:
                first = look.time - begin
            reached = look.step >= moment.step and (look.saving or moment.kind != "checkpoint")
            if deadline is None and reached:
                deadline = look.time + share * spans[moment.kind]
            if deadline is not None and look.time >= deadline:
                freeze(process)
                if moment.kind != "checkpoint" or is_saving(output, begin):
                    break
                # This checkpoint was quicker than usual: wait for the next.
                process.send_signal(signal.SIGCONT)
                share, deadline = share / 2, None
        training.kill(process)
    names = [path.name for path in RunFolder(output).checkpoints.glob("*")]
    saved = max((int(name) for name in names if name.isdigit()), default=None)
    return Kill(moment, last_step(output), saved, is_saving(output, begin), first)


def freeze(process: subprocess.Popen) -> None:
    """Stops every thread of the process where it is, or finds that the process has ended."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def survive(
    training: Training,
    output: Path,
    moments: Sequence[Moment],
    usual: Durations,
    tell: Callable[[Kill], None] = lambda kill: None,
) -> list[Kill]:
    """Kills the run at each of the moments, then lets it come to its end."""
    kills = []
    for moment in moments:
        kills.append(kill_at(training, output, moment, usual))
        tell(kills[-1])
        if kills[-1].first is not None:
            # Programs are compiled by now: it starts sooner than the run left alone.
            usual = dataclasses.replace(usual, start=kills[-1].first)
    with training.running(output) as process:
        training.finish(process)
    return kills


def last_step(output: Path) -> int:
    """The last step in metrics.jsonl; 0 where there is none."""
    try:
        *lines, _ = (output / METRICS).read_bytes().rsplit(b"\n", 3)
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines[-2:] if line), default=0)


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_ctime
    except FileNotFoundError:
        return None


def main() -> None:
    """Runs, kills, compares and prints."""
    settings = from_command_line(KillBenchmark())
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(settings.folder or temporary).absolute()
        base.mkdir(parents=True, exist_ok=True)
        training = Training(settings.steps, settings.every, base / "caches", settings.settings)
        usual = undisturbed(training, base / "alone")
        print(
            f"A run of {settings.steps} steps: the first line after {usual.start:.1f} s, "
            f"{1000 * usual.checkpoint:.0f} ms to write a checkpoint, {usual.end:.1f} s after the "
            "last step.\n"
        )
        moments = draw_moments(settings.kills, settings.steps, settings.every, settings.seed)

        def tell(kill: Kill) -> None:
            print(f"killed: {kill.moment.kind}, step {kill.logged}", file=sys.stderr)

        kills = survive(training, base / "killed", moments, usual, tell)
        found = differences(base / "alone", base / "killed", settings.steps)
    rows = [
        [number, kill.moment.kind, kill.logged, kill.saved or "-", "yes" * kill.half_written]
        for number, kill in enumerate(kills, 1)
    ]
    print(table(["kill", "during", "last step", "checkpoint", "one half written"], rows))
    print("\n" + ("\n".join(found) or "Every bit and every line is that of the run left alone."))
    save(
        settings.json,
        "kill",
        kills=[dataclasses.asdict(kill) for kill in kills],
        half_written=sum(kill.half_written for kill in kills),
        usual_seconds=dataclasses.asdict(usual),
        differences=found,
    )
    if found:
        sys.exit(1)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
