"""Training steps of large models, compiled for slices of TPUs that are not there, beside the plan.

python -m benchmarks.deviceless [only=gpt3_175b] [json=benchmarks/results/deviceless.json]

Nothing is allocated and nothing runs: the compiler says whether the step compiles and fits, what
memory a chip needs and what it sends. Each model has a process of its own, one after another, as a
compiler needs some gigabytes. Results are added to those in the file, model by model, and models
that are there already are left out unless they are named: the same command goes on where it was
stopped. Needs libtpu (`pip install 'lmjax[tpu]'`).
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.deviceless_step import CASES
from benchmarks.harness import Worker, WorkerError, save, table
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line

GB = 1e9


@config
class DevicelessBenchmark:
    """Models to compile, and the file of their numbers."""

    only: tuple[str, ...] = ()  # models by name; none given: all that the file does not have
    json: str = ""  # file that results are added to

    def validate(self) -> None:
        """Raises UserError for models that are not among the cases."""
        if unknown := set(self.only) - set(CASES):
            raise UserError(f"only={min(unknown)}: known are {', '.join(CASES)}")


def report(found: dict[str, dict[str, Any]]) -> None:
    """Prints a line for each model."""
    rows = []
    for name, one in found.items():
        if "error" in one:
            planned = one["planned_total"] / GB
            rows.append([name, one["topology"], planned, one["error"][:40], "", "", ""])
            continue
        peak = one["compiled_bytes"]["peak"] / GB
        planned = one["planned_total"] / GB, peak, one["planned_over_compiled"]
        rows.append([name, one["topology"], *planned, one["seconds"], one["processor_seconds"]])
    columns = ["model", "slice", "planned GB", "compiler's GB", "ratio", "seconds", "of processors"]
    print(table(columns, rows))


def main() -> None:
    """Compiles, and prints."""
    settings = from_command_line(DevicelessBenchmark())
    path, found = Path(settings.json), {}
    if settings.json and path.exists():
        found = json.loads(path.read_text("utf-8"))["models"]
    for name in settings.only or [name for name in CASES if name not in found]:
        print(f"{name}", file=sys.stderr)
        with Worker("benchmarks.deviceless_step") as worker:
            try:
                found[name] = worker.ask("compiled_case", name=name)
            except WorkerError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
        save(settings.json, "deviceless", models=found)
    report(found)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
