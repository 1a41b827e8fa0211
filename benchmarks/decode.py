"""Tokens a second of greedy decoding: lmjax beside transformers, and beside the memory's roof.

python -m benchmarks.decode [python=PYTHON_WITH_TRANSFORMERS] [json=FILE]
python -m benchmarks.decode family=llama weights=q8_0      # beside llama.cpp alone

All sides have the same random model, must give the same tokens in float32, and take turns with a
measurement of the memory's bandwidth: a token at batch 1 cannot be had faster than the weights are
read once. In Q8_0 both sides read one GGUF file; llama.cpp rounds the activations too, so tokens
may differ.

Then two small models of lmjax's own take turns, which differ in their key heads as ChatGLM-6B and
ChatGLM2-6B do, on long prompts: what multi-query attention buys.
"""

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal

from benchmarks.harness import Worker, WorkerError, save, spread, table
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line

PAUSE = 0.3  # seconds until the threads of the side before have stopped waiting for work
READS = 3  # of memory, a turn
# For all sides about what `lmjax.launch.memory` sets in our commands: huge pages; buffers of up to
# 256 MiB come from the heap, and up to 1 GiB of freed memory stays there.
MEMORY = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "hugetlb": 1,
        "mmap_threshold": 256 << 20,
        "trim_threshold": 1 << 30,
        "arena_max": 1,
    }.items()
)


@config
class DecodeBenchmark:
    """Prompts of equal length, continued by the likeliest tokens; prefill included."""

    family: Literal["gpt2", "llama"] = "gpt2"
    weights: Literal["float32", "q8_0"] = "float32"  # q8_0: 8 bits, beside llama.cpp alone
    layers: int = 12  # blocks
    hidden: int = 768  # width
    heads: int = 12  # of attention
    length: int = 1024  # longest sequence of the model
    vocabulary: int = 50_257  # tokens
    batches: tuple[int, ...] = (1, 8)  # prompts at once
    prompt: int = 32  # tokens of each prompt
    tokens: int = 64  # tokens that follow it
    pair: bool = True  # whether the pair takes turns
    pair_batch: int = 8  # prompts at once of the pair
    pair_prompt: int = 1024  # tokens of each of their prompts
    cores: int = 0  # that each side may use; 0: all
    rounds: int = 7  # turns of each side
    # interpreter that has torch, numpy and transformers; gguf and xllamacpp
    python: str = ""
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for numbers that measure nothing."""
        for name in ("rounds", "prompt", "pair_batch", "pair_prompt"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1")
        if self.tokens < 2:
            raise UserError(f"tokens={self.tokens}: a step is what follows the first, so 2 or more")
        if not self.batches or min(self.batches) < 1:
            raise UserError(f"batches={self.batches}: give numbers of prompts, 1 or more")
        if self.prompt + self.tokens > self.length:
            raise UserError(f"prompt + tokens are more than the model's length={self.length}")


def main() -> None:
    """Measures and prints."""
    settings = from_command_line(DecodeBenchmark())
    os.environ.setdefault("GLIBC_TUNABLES", MEMORY)
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        sides, facts = start(settings, folder, stack)
        if settings.weights == "float32":
            check(settings, sides)
        rounds = alternate(settings, sides)
        summary = summarise(settings, rounds, facts)
        pair = compare_key_heads(settings, sides["lmjax"]) if settings.pair else {}
    save(
        settings.json,
        "decode",
        memory=os.environ["GLIBC_TUNABLES"],
        sides=facts,
        rounds=rounds,
        **summary,
        key_heads=pair,
    )


def start(settings: DecodeBenchmark, folder: str, stack: ExitStack) -> tuple[dict, dict]:
    """The sides by name, compiled and warm, and what they tell of themselves."""
    names = ("family", "weights", "layers", "hidden", "heads", "length", "vocabulary")
    names += ("batches", "prompt", "tokens", "cores")
    shape = {name: getattr(settings, name) for name in names}
    sides, facts = {}, {}
    theirs = settings.python or sys.executable
    known = [("lmjax", "benchmarks.decode_lmjax", sys.executable)]
    if settings.weights == "float32":
        known.append(("transformers", "benchmarks.decode_torch", theirs))
    known.append(("llama.cpp", "benchmarks.decode_llama_cpp", theirs))
    for name, module, python in known:
        worker = stack.enter_context(Worker(module, python))
        try:
            found = worker.ask("prepare", folder=folder, **shape)
        except WorkerError as error:
            if name == "lmjax":
                raise
            print(f"{name:12}  left out: {error}; give python=... one that has them")
            continue
        sides[name], facts[name] = worker, found
        print(
            f"{name:12}  {found['version']}, {found['threads']} threads, "
            f"{found['parameters'] / 1e6:.1f} M parameters; "
            f"compiled and warm in {found['compile_seconds']:.0f} s"
        )
    return sides, facts


def check(settings: DecodeBenchmark, sides: Mapping[str, Worker]) -> None:
    """Raises UserError where the sides say different things: a comparison would mean nothing."""
    for batch in settings.batches:
        rows = {
            name: side.ask("decode", batch=batch, tokens=settings.tokens)["tokens"]
            for name, side in sides.items()
        }
        for name, theirs in rows.items():
            if theirs != rows["lmjax"]:
                raise UserError(f"{name} continues {batch} prompts with other tokens than lmjax")


def alternate(
    settings: DecodeBenchmark, sides: Mapping[str, Worker]
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Seconds of the first token and of all, by batch, side and round.

    And the bytes a second of the best read just before: what a machine shared with others gives
    changes within a round.
    """
    parts = "bandwidth", "first", "all"
    taken = {
        str(batch): {name: {part: [] for part in parts} for name in sides}
        for batch in settings.batches
    }
    for number in range(settings.rounds):
        for batch in settings.batches:
            # There and back again, so that none is always the first.
            for name in list(sides)[:: -1 if number % 2 else 1]:
                row = taken[str(batch)][name]
                time.sleep(PAUSE)
                row["bandwidth"].append(max(sides["lmjax"].ask("bandwidth", count=READS)))
                time.sleep(PAUSE)
                for part, tokens in (("first", 1), ("all", settings.tokens)):
                    row[part].append(
                        sides[name].ask("decode", batch=batch, tokens=tokens)["seconds"]
                    )
    return taken


def summarise(
    settings: DecodeBenchmark,
    rounds: Mapping[str, Mapping[str, Mapping[str, list[float]]]],
    facts: Mapping[str, dict],
) -> dict[str, Any]:
    """Prints the table; tokens a second, ratios of a round, and shares of the roof.

    A step is what a turn takes beyond its first token, and its share of the roof is beside the
    fastest read before the turn.
    """
    weights = facts["lmjax"]["bytes_per_token"]
    reading = spread(
        [
            read
            for sides in rounds.values()
            for turns in sides.values()
            for read in turns["bandwidth"]
        ]
    )
    print(
        f"\nmemory: {reading['median'] / 1e9:.1f} GB/s read (median of the turns, which go from"
        f" {reading['min'] / 1e9:.1f} to {reading['max'] / 1e9:.1f}); {weights / 1e6:.0f} MB of"
        f" weights: a step takes at least {1000 * weights / reading['median']:.2f} ms"
    )
    rows, results = [], {}
    for batch, sides in rounds.items():
        tokens, ours = int(batch) * settings.tokens, sides["lmjax"]["all"]
        results[batch] = {}
        for name, turns in sides.items():
            ratio = spread([b / a for a, b in zip(ours, turns["all"], strict=True)])
            best, median = tokens / min(turns["all"]), tokens / spread(turns["all"])["median"]
            steps = [
                (whole - first) / (settings.tokens - 1)
                for whole, first in zip(turns["all"], turns["first"], strict=True)
            ]
            share = spread(
                [weights / b / s for b, s in zip(turns["bandwidth"], steps, strict=True)]
            )
            step = spread(steps)["median"]
            results[batch][name] = {
                "tokens_per_second": {"best": best, "median": median},
                "step_seconds": step,
                "share_of_roof": share,
                "lmjax_over": ratio,
            }
            compared = [ratio[key] for key in ("median", "min", "max")]
            row = compared if name != "lmjax" else [""] * 3
            label = f"batch {batch}, {name}"
            rows.append([label, best, median, 1000 * step, share["median"], *row])
    columns = ["", "tokens/s (best)", "(median)", "ms a step", "of the roof"]
    print("\n" + table([*columns, "lmjax / it", "worst round", "best round"], rows))
    return {
        "bandwidth": reading,
        "roof_seconds_per_step": weights / reading["median"],
        "batches": results,
    }


def compare_key_heads(settings: DecodeBenchmark, lmjax: Worker) -> dict[str, dict[str, Any]]:
    """Seconds of a step with many key heads and with two, in turns; prints the table."""
    batch, tokens = settings.pair_batch, settings.tokens
    found = lmjax.ask("prepare_pair", batch=batch, prompt=settings.pair_prompt, tokens=tokens)
    for facts in found.values():
        facts["seconds"] = {1: [], tokens: []}
    for number in range(settings.rounds):
        for name in list(found)[:: -1 if number % 2 else 1]:
            for count, taken in found[name]["seconds"].items():
                taken.append(lmjax.ask("decode", batch=batch, tokens=count, model=name)["seconds"])
    rows = []
    for name, facts in found.items():
        first, whole = facts.pop("seconds").values()
        facts |= {"first": first, "all": whole}
        step = facts["step_seconds"] = (min(whole) - min(first)) / (tokens - 1)
        facts["tokens_per_second"] = batch / step
        cache = facts["cache_bytes_per_token"] * batch * settings.pair_prompt
        rows.append([name, facts["cache_bytes_per_token"], cache / 1e6, 1000 * step, batch / step])
    columns = ["", "cache, bytes a token", "MB in all", "ms a step", "tokens/s"]
    print(f"\n{batch} prompts of {settings.pair_prompt} tokens:\n\n" + table(columns, rows))
    return found


if __name__ == "__main__":
    with exit_on_user_error():
        main()
