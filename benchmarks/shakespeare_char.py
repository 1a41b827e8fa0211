"""All of `experiments.shakespeare_char` beside the recipe of nanoGPT that it follows.

python -m benchmarks.shakespeare_char folder=nanoGPT [rounds=3] [json=FILE]

`folder` is a checkout of https://github.com/karpathy/nanoGPT in which
`python data/shakespeare_char/prepare.py` has been run. Both commands run whole and in turn, each
with its own start, evaluation and saving; ours also writes samples, baselines and a report. The
losses are of the same text, but nanoGPT's is its own estimate from 20 batches, ours of all of it.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import ROOT, save, spread, table
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line

# What nanoGPT's README gives for a machine without an accelerator.
NANOGPT = """train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20
    --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128
    --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"""
TEXT = Path("data", "shakespeare_char", "input.txt")


@config
class ShakespeareBenchmark:
    """Times both trainings from the command to its end."""

    folder: str = ""  # nanoGPT's, with its data prepared
    rounds: int = 3  # runs of each
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for less than one round."""
        if self.rounds < 1:
            raise UserError(f"rounds={self.rounds}: it must be at least 1")


def prepared(folder: str) -> Path:
    """The checkout of nanoGPT. UserError where it is none, or without its data."""
    nanogpt = Path(folder).expanduser().resolve()
    for name in (Path("train.py"), TEXT, TEXT.with_name("val.bin")):
        if not (nanogpt / name).is_file():
            raise UserError(
                f"folder={folder!r} has no {name}: it must be a checkout of nanoGPT in which "
                "python data/shakespeare_char/prepare.py has been run"
            )
    return nanogpt


def timed(command: Sequence[str], folder: Path, said: Path) -> float:
    """Seconds of a command from its start to its end; what it prints goes to a file.

    Raises:
      UserError: it failed.
    """
    begin = time.perf_counter()
    with said.open("w") as file:
        done = subprocess.run(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise UserError(f"{' '.join(command[1:3])} failed:\n{said.read_text()[-2000:]}")
    return seconds


def run_lmjax(nanogpt: Path, folder: Path) -> tuple[float, float]:
    """Seconds, and nats per character of the held-out text at the end."""
    settings = f"...path={nanogpt / TEXT}", f"output={folder / 'run'}"
    command = [sys.executable, "-m", "experiments.shakespeare_char", *settings]
    seconds = timed(command, ROOT, folder / "said.txt")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["split"] != "train"]
    return seconds, records[-1]["loss"]


def run_nanogpt(nanogpt: Path, folder: Path) -> tuple[float, float]:
    """Seconds, and the last estimate of the validation loss."""
    command = [sys.executable, *NANOGPT.split(), f"--out_dir={folder}"]
    seconds = timed(command, nanogpt, folder / "said.txt")
    return seconds, float(re.findall(r"val loss ([\d.]+)", (folder / "said.txt").read_text())[-1])


def main(settings: ShakespeareBenchmark) -> None:
    """Runs, prints and saves the comparison."""
    # Neither side may profit from what the other does not have, or from an earlier run.
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    nanogpt, results = prepared(settings.folder), {}
    for number in range(settings.rounds):
        for name, run in (("lmjax", run_lmjax), ("nanoGPT", run_nanogpt)):
            with tempfile.TemporaryDirectory() as folder:
                seconds, loss = run(nanogpt, Path(folder))
            print(f"round {number + 1}  {name}: {seconds:.1f} s, loss {loss:.4f}", flush=True)
            results.setdefault(name, []).append((seconds, loss))
    rows = [
        [name, *spread([s for s, _ in runs]).values(), runs[-1][1]]
        for name, runs in results.items()
    ]
    print("\n" + table(["", "min s", "median s", "max s", "loss"], rows))
    pairs = zip(results["nanoGPT"], results["lmjax"])
    ratio = statistics.median(theirs / ours for (theirs, _), (ours, _) in pairs)
    print(f"\nnanoGPT takes {ratio:.2f} times as long (median of the rounds)")
    save(
        settings.json,
        "shakespeare_char",
        seconds={name: [seconds for seconds, _ in runs] for name, runs in results.items()},
        losses={name: [loss for _, loss in runs] for name, runs in results.items()},
        ratio=ratio,
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main(from_command_line(ShakespeareBenchmark()))
