"""Shared parts of the benchmarks: worker processes, tables, and results beside what they ran on.

Only the standard library is imported here, so that a worker in another environment can serve.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch"),
    *("tokenizers", "transformers", "tokamax"),
)
PRIVATE = ("json", "python", "folder", "texts")  # settings that hold a path of this machine


class WorkerError(Exception):
    """A worker could not do what it was asked for; the message says why."""


class Worker:
    """A process that does what it is asked, one JSON object a line, and sleeps in between.

    Two of them that are asked in turn see the same weather on a machine that is not quiet.
    """

    def __init__(self, module: str, python: str = sys.executable) -> None:
        """Starts `python -m module`, which must call `serve`."""
        self.name = module
        self._process = subprocess.Popen(
            [python, "-m", module],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def ask(self, what: str, **arguments: Any) -> Any:
        """Returns the result of the worker's function `what`.

        Raises:
          WorkerError: the function raised, or the process is gone.
        """
        try:
            print(json.dumps([what, arguments]), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.name} ended with code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]


def serve(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Answers the requests of `Worker.ask` until nobody asks any more."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        what, arguments = json.loads(line)
        try:
            answer = {"result": functions[what](**arguments)}
        except ImportError as error:  # this environment lacks what the worker is for
            answer = {"error": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def seconds_of(run: Callable[[], Any], count: int) -> list[float]:
    """Wall seconds of each of `count` calls; `run` returns when its work is done."""
    taken = []
    for _ in range(count):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return taken


def documents_of(path: str) -> list[str]:
    """The list of texts in a JSON file, which several workers share."""
    return json.loads(Path(path).read_text("utf-8"))


def keep_to_cores(cores: int) -> int:
    """Restricts this process to that many of its cores, 0 for all; the number it then has."""
    if not hasattr(os, "sched_setaffinity"):
        return os.cpu_count()
    if cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    return len(os.sched_getaffinity(0))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned text; the first column is left-aligned, numbers have four significant digits."""
    cells = [list(columns), *([_shown(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _shown(cell: Any) -> str:
    if not isinstance(cell, float):
        return str(cell)
    if cell and abs(cell) < 1000:
        return f"{cell:.4g}"
    return f"{cell:,.0f}"


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}


def machine() -> dict[str, Any]:
    """Description of the machine that numbers depend on, without anything personal."""
    return {
        "processor": _processor(),
        "cores": keep_to_cores(0),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def save(path: str, benchmark: str, **results: Any) -> None:
    """Writes results as `write` does and says so; an empty path: nothing."""
    if path:
        write(path, benchmark, **results)
        print(f"\nwritten to {path}")


def write(path: str, benchmark: str, **results: Any) -> None:
    """Writes results as JSON, with date, command, versions and machine."""
    settings = [arg for arg in sys.argv[1:] if arg.partition("=")[0] not in PRIVATE]
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *settings]),
        "versions": versions(),
        "machine": machine(),
        **results,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
