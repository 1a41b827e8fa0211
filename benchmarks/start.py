"""Seconds from a command to the first text of a public model, as a person waits for it.

python -m benchmarks.start folder=models/gpt2 [checkout=OLDER_CHECKOUT] [json=FILE]

`python -m lmjax.generation FOLDER` takes turns with the same command of another checkout of this
project, and with a program that does the same with transformers where it is installed. All are
whole processes: Python, imports, tokenizer, weights and compilation are part of what is waited for.
Nothing is kept between them but what the system keeps of files.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import ROOT, save, spread, table
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line

PIECE = 1 << 12  # bytes of output that are taken at once
THEIRS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
folder, prompt, count = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer(prompt, return_tensors="pt")
print(prompt, end="", flush=True)
streamer = TextStreamer(tokenizer, skip_prompt=True)
model.generate(**inputs, max_new_tokens=int(count), do_sample=False, streamer=streamer)
"""


@config
class StartBenchmark:
    """One prompt, continued by the likeliest tokens."""

    folder: str  # of a public model
    checkout: str = ""  # another checkout of this project to take turns with
    prompt: str = "The list"  # the text to continue
    tokens: int = 16  # that follow it
    rounds: int = 5  # turns of each
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for numbers that measure nothing."""
        for name in ("rounds", "tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1")
        if self.checkout and not Path(self.checkout, "lmjax").is_dir():
            raise UserError(f"checkout={self.checkout}: there is no lmjax in it")


def main() -> None:
    """Measures and prints."""
    settings = from_command_line(StartBenchmark(folder=""), positional="folder")
    if not settings.folder:
        raise UserError("Which model? For instance: python -m benchmarks.start models/gpt2")
    folder = str(Path(settings.folder).expanduser().absolute())
    ours = ["-m", "lmjax.generation", folder, f"prompt={settings.prompt}"]
    ours += ["temperature=0", f"max_tokens={settings.tokens}"]
    sides = {"lmjax": (ours, ROOT)}
    if settings.checkout:
        sides["the other checkout"] = (ours, Path(settings.checkout).absolute())
    theirs = ["-c", THEIRS, folder, settings.prompt, str(settings.tokens)]
    with tempfile.TemporaryDirectory() as nowhere:
        sides["transformers"] = (theirs, Path(nowhere))
        taken = alternate(settings, sides)
    save(settings.json, "start", summary=summarise(taken), rounds=taken)


def alternate(
    settings: StartBenchmark, sides: dict[str, tuple[list[str], Path]]
) -> dict[str, dict[str, list[float]]]:
    """Seconds to the first text and to the end of each turn, by side."""
    taken = {name: {"first": [], "all": []} for name in sides}
    for number in range(settings.rounds + 1):
        for name in list(taken)[:: -1 if number % 2 else 1]:
            found = start(*sides[name], settings.prompt)
            if found is None:
                print(f"{name} is left out: it wrote no text")
                del taken[name]
            elif number:  # the first turn brings the files into the system's memory
                for part, seconds in zip(taken[name], found, strict=True):
                    taken[name][part].append(seconds)
    return taken


def start(arguments: list[str], checkout: Path, prompt: str) -> tuple[float, float] | None:
    """Seconds until more than the prompt is written, and until the end; None if that never is."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        written, first = b"", None
        while piece := os.read(process.stdout.fileno(), PIECE):
            written += piece
            if first is None and len(written) > len(prompt.encode()):
                first = time.perf_counter() - begin
    return None if first is None else (first, time.perf_counter() - begin)


def summarise(taken: dict[str, dict[str, list[float]]]) -> dict[str, dict]:
    """Prints the table; seconds, and how many times as long as ours within a round."""
    summary, rows = {}, []
    for name, parts in taken.items():
        first, whole = spread(parts["first"]), spread(parts["all"])
        pairs = zip(parts["first"], taken["lmjax"]["first"], strict=True)
        over = spread([ours / theirs for theirs, ours in pairs])
        summary[name] = {"first": first, "all": whole, "lmjax_over": over}
        compared = [""] * 3 if name == "lmjax" else [over[key] for key in ("median", "min", "max")]
        rows.append([name, first["min"], first["median"], whole["median"], *compared])
    columns = ["", "first text, s (best)", "(median)", "all, s (median)"]
    print(table([*columns, "lmjax / it", "best round", "worst round"], rows))
    return summary


if __name__ == "__main__":
    with exit_on_user_error():
        main()
