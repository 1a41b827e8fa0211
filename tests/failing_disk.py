"""Lets every system call of a program's work fail in turn, below one folder.

    python -m tests.failing_disk save|replace|stores|prepare|folder FOLDER

does that work again and again with `failing_disk.c` preloaded: first the first of its system calls
fails, then the second, and so on, each with one of ERRORS, alone or with all that follow. It prints
how many calls there were, and a line for everything that is not as it should be: another exception
than a UserError, one that takes long, or what was complete before and is not any more.
"""

import contextlib
import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).with_name("failing_disk.c")
ERRORS = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.ENOENT)
# Seconds until a failure is told: a tenth of one where nothing else runs; what waits for a thread
# that has died waits for minutes.
LONGEST = 60.0


def compiler() -> str | None:
    """The C compiler of this machine, if there is one."""
    return shutil.which("cc") or shutil.which("gcc")


def run(work: str) -> subprocess.CompletedProcess:
    """Runs this program, with the failing system calls compiled and preloaded."""
    memory = "/dev/shm"  # where files need not wait for a disk to flush them
    with tempfile.TemporaryDirectory(dir=memory if os.path.isdir(memory) else None) as folder:
        library = f"{folder}/failing_disk.so"
        command = [compiler(), "-O1", "-shared", "-fPIC", "-o", library, str(SOURCE), "-ldl"]
        subprocess.run(command, check=True)
        return subprocess.run(
            [sys.executable, "-m", "tests.failing_disk", work, f"{folder}/disk"],
            cwd=SOURCE.parents[1],
            env={**os.environ, "LD_PRELOAD": library, "JAX_NUM_CPU_DEVICES": "1"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )


class Disk:
    """The preloaded library of this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._library.failing_disk_arm.argtypes = (
            *(ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int),
        )
        self._library.failing_disk_last.restype = ctypes.c_char_p

    @contextlib.contextmanager
    def failing(self, folder: Path, number: int, error: int, lasting: bool):
        """System calls below the folder fail in the block, as the arguments say."""
        self._library.failing_disk_arm(os.fsencode(folder), number, error, lasting)
        try:
            yield
        finally:
            self.count, self.last = (
                self._library.failing_disk_count(),
                self._library.failing_disk_last().decode(),
            )
            self._library.failing_disk_arm(b"", 0, 0, 0)


def drive(
    root: Path,
    prepare: Callable[[Path], None],
    act: Callable[[Path], None],
    check: Callable[[Path, Exception | None], None],
    end: int | None = None,
) -> None:
    """Lets each system call of `act` fail once, and prints what is then not as it should be.

    Args:
        root: for a folder for each.
        prepare: makes such a folder.
        act: works in it, while system calls there fail.
        check: raises for what is wrong in it afterwards; is told how `act` failed.
        end: only so many of the last calls; None: all.
    """
    from lmjax.config import UserError

    disk, number, total = Disk(), 0, 0
    while number <= total:
        folder = root / str(number)
        prepare(folder)
        kind, lasting = ERRORS[number % len(ERRORS)], bool(number // len(ERRORS) % 2)
        error, began = None, time.monotonic()
        with disk.failing(folder, number, kind, lasting):
            try:
                act(folder)
            except Exception as raised:
                error = raised
        seconds = time.monotonic() - began
        where = f"call {number} ({disk.last}) {errno.errorcode[kind]} {'for good' * lasting}"
        if error is not None and not isinstance(error, UserError):
            print(f"{where}: {type(error).__name__}: {error}")
        if seconds > LONGEST:
            print(f"{where}: {seconds:.0f} s")
        if error is None and number == 0:
            total = disk.count
            number = total - end if end else 0
        try:
            check(folder, error)
        except Exception as wrong:
            print(f"{where}, then {error!r:.200}: {type(wrong).__name__}: {wrong}")
        shutil.rmtree(folder)
        number += 1
    print(f"{total} system calls")


def save(root: Path, step: int) -> None:
    """A checkpoint is saved after those of the steps 1 and 2; at step 2 in place of that one."""
    import jax
    import jax.numpy as jnp

    from lmjax.runs import manifest
    from lmjax.runs.checkpoints import Checkpointer

    def state(value):
        return {"x": jnp.full((3, 2), value, jnp.float32), "key": jax.random.key(value)}

    template = root / "template"
    with Checkpointer(template, keep=2) as checkpointer:
        for number in (1, 2):
            checkpointer.save(number, state(number), {"value": number})

    def act(folder):
        with Checkpointer(folder, keep=2, warn=lambda words: None) as checkpointer:
            checkpointer.save(step, state(3), {"value": 3})

    def check(folder, error):
        checkpointer = Checkpointer(folder, keep=2)
        steps = checkpointer.steps()
        for number in steps:
            manifest.verify(folder / str(number))
        found, extra = checkpointer.restore(None, state(0))
        assert set(found["x"].ravel().tolist()) == {extra["value"]}
        # Between the two renamings that replace a checkpoint, there is only the one before it.
        between = (folder / ".removing-2").exists() and error is not None
        assert extra["value"] == (3 if error is None else 1 if between else 2), extra
        assert error is not None or steps[-1] == step

    # What is written does not depend on the step; how it gets its name does.
    end = None if step == 3 else 90
    drive(root, lambda folder: shutil.copytree(template, folder), act, check, end)


def stores(root: Path) -> None:
    """A source is tokenized."""
    from lmjax.data import JsonLines, build_stores
    from lmjax.data.tokenizers import ByteTokenizer

    text = "".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(40))

    def prepare(folder):
        folder.mkdir()
        (folder / "a.jsonl").write_text(text)
        (folder / "b.jsonl").write_text(text)

    def act(folder):
        source = JsonLines(path=f"{folder}/*.jsonl")
        build_stores(source, ByteTokenizer(), folder / "s", held_out=0.2)

    def contents(folder):
        files = sorted(path for path in (folder / "s").rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    prepare(root / "whole")
    act(root / "whole")
    whole = contents(root / "whole")

    def check(folder, error):
        if error is None or (folder / "s").exists():
            assert contents(folder) == whole
        complete = (folder / "s").exists()
        act(folder)
        assert contents(folder) == whole
        assert complete or not (folder / "s.partial").exists()  # else nobody looks there again

    drive(root, prepare, act, check)


def prepare_data(root: Path) -> None:
    """A run's tokenizer, its token stores and the hashes of its text are made."""
    from lmjax.data import Data, Domain, TextFiles, prepare
    from lmjax.data.tokenizers import Characters

    (root / "a.txt").write_text("".join(f"line {n}\n" for n in range(50)))
    domain = Domain(name="lines", source=TextFiles(path=f"{root}/a.txt", split="line"))

    def act(folder):
        data = Data(train=(domain,), tokenizer=Characters(), cache=str(folder / "cache"))
        return prepare(data, folder / "run")

    (root / "whole").mkdir()
    whole = act(root / "whole")

    def check(folder, error):
        again = act(folder)
        assert again.tokenizer.fingerprint == whole.tokenizer.fingerprint
        assert again.fingerprints == whole.fingerprints
        assert again.train["lines"].manifest == whole.train["lines"].manifest
        assert again.train["lines"].tokens.tolist() == whole.train["lines"].tokens.tolist()

    drive(root, Path.mkdir, act, check)


def run_folder(root: Path) -> None:
    """A run's files are written, and written again when it goes on."""
    from lmjax.config import config, replace
    from lmjax.jobs.report import write_report
    from lmjax.runs.lock import lock_run_folder
    from lmjax.runs.metrics import MetricsWriter

    @config
    class FailingExperiment:
        """The least that a run folder wants of an experiment."""

        output: str
        steps: int = 3

        def may_change(self, setting):
            return setting in ("output", "steps")

    def write(folder, steps):
        experiment = FailingExperiment(output=str(folder / "run"), steps=steps)
        with (
            lock_run_folder(experiment, lambda words: None) as run,
            MetricsWriter(run.path) as metrics,
        ):
            metrics.truncate_after(2)
            for step in range(len(run.metrics()) + 1, steps + 1):
                metrics.write({"step": step, "split": "train", "loss": 1.0 / step})
            run.write_json("environment.json", {"cores": 1})
            run.write_json("results.json", {"step": steps})
            write_report(run)

    def check(folder, error):
        experiment = FailingExperiment(output=str(folder / "run"))
        with lock_run_folder(experiment, lambda words: None) as run:
            assert replace(run.experiment(), steps=3) == experiment
            assert [record["step"] for record in run.metrics()][:2] == [1, 2]
            assert run.results()["step"] in (3, 5)
            assert "</html>" in run.report.read_text("utf-8")
        write(folder, 5)
        assert [record["step"] for record in run.metrics()] == [1, 2, 3, 4, 5]
        assert run.results()["step"] == 5

    drive(root, lambda folder: write(folder, 3), lambda folder: write(folder, 5), check)


def main() -> None:
    """Does the work that the command line names."""
    work, root = sys.argv[1], Path(sys.argv[2])
    root.mkdir()
    {
        "save": lambda: save(root, 3),
        "replace": lambda: save(root, 2),
        "stores": lambda: stores(root),
        "prepare": lambda: prepare_data(root),
        "folder": lambda: run_folder(root),
    }[work]()


if __name__ == "__main__":
    main()
