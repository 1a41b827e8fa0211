"""Size, memory and speed of one model in the forms that it is exported to.

python -m benchmarks.export [source=FOLDER] [json=FILE]

Each form has a process of its own, as a small device would have. They take turns: so many tokens
behind one prompt, the likeliest each time, the reading of the prompt included.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import Worker, WorkerError, save, spread, table
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line

# Form, ending of its file, and how weights are kept.
FORMS = {
    "GGUF Q4_0": ("gguf", "q4_0"),
    "GGUF Q8_0": ("gguf", "q8_0"),
    "ONNX int8": ("onnx", "int8"),
    "ONNX float32": ("onnx", "float32"),
    "StableHLO": ("stablehlo", ""),
}


@config
class ExportBenchmark:
    """A random LLaMA, or a model of the user's."""

    source: str = ""  # model or run folder; empty: a random LLaMA of the following sizes
    layers: int = 12  # blocks
    hidden: int = 768  # width, of which heads have 64 each
    vocabulary: int = 32_000  # tokens
    prompt: int = 32  # tokens of the prompt
    tokens: int = 64  # tokens that follow it
    cores: int = 0  # that each side may use; 0: all
    rounds: int = 7  # turns of each side
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for numbers that measure nothing."""
        for name in ("layers", "prompt", "tokens", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1")
        if self.hidden % 64 or self.hidden < 64:
            raise UserError(f"hidden={self.hidden}: must be a multiple of 64")


def main() -> None:
    """Measures and prints."""
    settings = from_command_line(ExportBenchmark())
    with ExitStack() as stack, tempfile.TemporaryDirectory() as name:
        sides, facts = start(settings, Path(name), stack)
        seconds: dict[str, list[float]] = {form: [] for form in sides}
        for _ in range(settings.rounds):
            for form, side in sides.items():
                seconds[form].append(side.ask("decode"))
        memory = {form: side.ask("memory") for form, side in sides.items()}
    rows, forms = [], {}
    for form, taken in seconds.items():
        speed = spread([settings.tokens / each for each in taken])
        forms[form] = facts[form] | memory[form] | {"tokens_per_second": speed}
        sizes = facts[form]["bytes"], memory[form]["peak"], memory[form]["model"]
        rows.append([form, *(each / 1e6 for each in sizes), *speed.values()])
    columns = ["form", "file MB", "peak MB", "of it the model", "tokens/s: least", "median", "most"]
    print(table(columns, rows))
    save(settings.json, "export", forms=forms)


def start(
    settings: ExportBenchmark, folder: Path, stack: ExitStack
) -> tuple[dict[str, Worker], dict[str, dict[str, Any]]]:
    """Writes the model in all forms and loads each; those whose packages are missing are left."""
    with Worker("benchmarks.export_lmjax") as maker:
        shape = {name: getattr(settings, name) for name in ("layers", "hidden", "vocabulary")}
        maker.ask("make", folder=str(folder), source=settings.source, **shape)
        paths = {
            form: maker.ask("write", folder=str(folder), ending=ending, weights=weights)
            for form, (ending, weights) in FORMS.items()
        }
    sides, facts = {}, {}
    how = {name: getattr(settings, name) for name in ("prompt", "tokens", "cores")}
    for form, (ending, _) in FORMS.items():
        side = stack.enter_context(Worker("benchmarks.export_side"))
        try:
            facts[form] = side.ask("prepare", path=paths[form], kind=ending, **how)
        except WorkerError as error:
            print(f"{form} is left out: {error}")
        else:
            sides[form] = side
    return sides, facts


if __name__ == "__main__":
    with exit_on_user_error():
        main()
