"""Fine-tuning, DPO and GRPO: steps of lmjax's jobs beside those of TRL's trainers.

python -m benchmarks.alignment [python=PYTHON_WITH_TRL] [task=sft] [json=FILE]

Every side is a process of its own, with its whole loop: reading, packing or padding, sampling,
rewards and updates in float32. They begin with the same parameters, read the same lines and take
turns; a ratio is that of a round. TRL's environment: pip install trl==1.16.0 torch transformers.
"""

import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness import Worker, WorkerError, save, spread, table
from lmjax.config import UserError, config
from lmjax.data import chat_template
from lmjax.data.chat.embedded_instructions import EmbeddedRequests
from lmjax.launch import exit_on_user_error, from_command_line

PAUSE = 0.3  # seconds until the threads of the side before have stopped waiting for work
LINES = 4_000  # of questions and answers
SIDES = ("lmjax", "trl")
UNITS = {"sft": "tokens", "dpo": "pairs", "grpo": "replies"}


@config
class AlignmentBenchmark:
    """A LLaMA of some 27 M parameters, on questions about Python's library."""

    task: Literal["all", "sft", "dpo", "grpo"] = "all"  # what is measured
    layers: int = 6  # blocks
    hidden: int = 512  # width
    heads: int = 8  # of attention
    vocabulary: int = 8192  # tokens
    length: int = 512  # tokens of a packed row
    batch: int = 8  # packed rows of a step
    pairs: int = 16  # of a step
    pair_length: int = 192  # most tokens of an answer with its prompt
    prompts: int = 64  # of a step of GRPO
    samples: int = 4  # replies to each
    reply: int = 64  # tokens of a reply
    cores: int = 0  # that each side may use; 0: all
    rounds: int = 5  # turns of each side
    steps: int = 3  # a turn; of GRPO 1
    python: str = ""  # interpreter that has TRL, with this repository's folder in reach
    json: str = ""  # file for the results


def main() -> None:
    """Measures and prints."""
    settings = from_command_line(AlignmentBenchmark())
    tasks = list(UNITS) if settings.task == "all" else [settings.task]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_lines(Path(folder))
        for task in tasks:
            results[task] = measure(settings, task, folder)
    save(settings.json, "alignment", **results)


def write_lines(folder: Path) -> None:
    """Writes completions, pairs and prompts, which both sides read."""
    questions = EmbeddedRequests(template=chat_template("bare")).documents()
    found = [(one.text, one.metadata["answer"]) for one in questions]
    found = found[:: max(1, len(found) // LINES)][:LINES]
    answers = [answer for _, answer in found]
    other = answers[1:] + answers[:1]
    lines = {
        "sft": [{"prompt": q + "\n", "completion": a} for q, a in found],
        "dpo": [
            {"prompt": q + "\n", "chosen": a, "rejected": b}
            for (q, a), b in zip(found, other, strict=True)
            if a != b
        ],
        "grpo": [{"prompt": q + "\n"} for q, _ in found],
    }
    for name, records in lines.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, "utf-8")


def measure(settings: AlignmentBenchmark, task: str, folder: str) -> dict[str, Any]:
    """Rounds of both sides; prints how much they do a second, and the ratios."""
    shape = {
        name: getattr(settings, name)
        for name in (
            *("layers", "hidden", "heads", "vocabulary", "length", "batch", "pairs"),
            *("pair_length", "prompts", "samples", "reply", "cores"),
        )
    }
    steps = 1 if task == "grpo" else settings.steps
    with ExitStack() as stack:
        sides, facts = {}, {}
        # TRL's is first: it writes the folder that both begin with.
        for name in SIDES[::-1]:
            python = sys.executable if name == "lmjax" else settings.python or sys.executable
            worker = stack.enter_context(Worker(f"benchmarks.alignment_{name}", python))
            begin = time.perf_counter()
            try:
                facts[name] = worker.ask("prepare", folder=folder, task=task, **shape)
            except WorkerError as error:
                raise UserError(
                    f"{name} cannot be measured: {error}. python=... names an interpreter that has "
                    "trl, torch and transformers"
                ) from None
            sides[name] = worker
            seconds = time.perf_counter() - begin
            print(f"{task:5} {name:6} {facts[name]['version']}, ready in {seconds:.0f} s")
        rounds: dict[str, list[float]] = {name: [] for name in SIDES}
        for number in range(settings.rounds):
            for name in SIDES[:: -1 if number % 2 else 1]:
                time.sleep(PAUSE)
                done = sides[name].ask("steps", count=steps)
                rounds[name].append(done["units"] / done["seconds"])
    ratios = [ours / theirs for ours, theirs in zip(*(rounds[n] for n in SIDES), strict=True)]
    found = {"sides": facts, "rounds": rounds, "ratio": spread(ratios)}
    rows = [
        [name, spread(speeds)["median"], spread(speeds)["min"], spread(speeds)["max"]]
        for name, speeds in rounds.items()
    ]
    print(table([f"{task}: {UNITS[task]}/s", "median", "least", "most"], rows))
    r = found["ratio"]
    print(f"lmjax / trl  {r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})\n")
    return found


if __name__ == "__main__":
    with exit_on_user_error():
        main()
