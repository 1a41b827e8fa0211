"""Block sizes for a kernel: tries some, on a TPU by time, without one by the compiler's schedule.

python -m pallas_kernels.tune kernel=attention_forward chip=v5e [head_dim=128] [documents=8]
    [length=4096] [heads=8] [group=1] [write=true]

The search begins with the sizes of the table and changes one at a time, as long as that is faster.
`write=true` puts the best ones into the table, for calls of this chip, up to this width of a head,
and for masks with segments or without, as was asked. A schedule tells cycles of compute; the
memory's time is not in it, so that sizes whose steps are shorter than about a microsecond come out
too well.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_sizes, schedules, topologies
from pallas_kernels.attention import Mask, attention

TABLE = Path(__file__).parent / "block_sizes.json"
# Sizes that are tried, by kernel and name; others stay as the table has them.
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "attention_forward": {
        "query": (256, 512, 1024, 2048),
        "key": (256, 512, 1024, 2048),
        "chunk_keys": (128, 256, 512),
        "chunk_queries": (128, 256, 512, 1024),
        "ahead": (0, 1, 2),
    },
    "attention_backward": {
        "query": (256, 512, 1024),
        "key": (256, 512, 1024),
        "strip": (128, 256, 512),
        "edge_strip": (128, 256),
        "transposed": (0, 1),
    },
}
ROUNDS = 5  # of time on a device; the median counts


@dataclasses.dataclass(frozen=True)
class TuningCall:
    """A call of attention that sizes are chosen for; its fields are those of the command line.

    Attributes:
        kernel: one of `CHOICES`.
        chip: one of `topologies.TPUS`; not needed on a TPU.
        documents: packed into a row; 0 is a mask without segments.
        length: queries and keys.
        group: query heads that share a key head.
        write: whether to put the best sizes into the table.
    """

    kernel: str = "attention_forward"
    chip: str = "v5e"
    head_dim: int = 128
    documents: int = 0
    length: int = 4096
    heads: int = 8
    group: int = 1
    write: bool = False

    @property
    def numbers(self) -> dict[str, int]:
        """Numbers of the call by which the table is searched."""
        return {
            "head_dim": self.head_dim,
            "value_bytes": 2,
            "segments": int(self.documents > 0),
        }

    def arguments(self) -> tuple[Any, ...]:
        """Shapes of queries, keys, values and the output's gradient; the numbers of documents."""

        def shape(heads):
            return jax.ShapeDtypeStruct((1, self.length, heads, self.head_dim), jnp.bfloat16)

        q, k = shape(self.heads), shape(self.heads // self.group)
        if not self.documents:
            return q, k, k, q, None
        # Documents of unlike lengths, which end inside of blocks.
        ends = np.linspace(1, 2, self.documents).cumsum()
        ends = (ends * self.length / ends[-1]).round()
        numbers = 1 + np.searchsorted(ends, np.arange(self.length), side="right")
        return q, k, k, q, numbers[None].astype(np.int32)

    def function(self) -> Callable:
        """Output and gradients, or the output alone where it is the forward kernel's."""

        def forward(q, k, v, segments):
            mask = Mask(causal=True, query_segments=segments, key_segments=segments)
            return attention(q, k, v, mask, implementation="tpu")

        def both(q, k, v, d_output, segments):
            if self.kernel.endswith("forward"):
                return forward(q, k, v, segments)
            output, pull = jax.vjp(lambda q, k, v: forward(q, k, v, segments), q, k, v)
            return output, *pull(d_output)

        return both


def parsed(words: list[str]) -> TuningCall:
    """The call that a command line asks for.

    Raises:
        SystemExit: a word says nothing; with what is known.
    """
    fields = {field.name: type(field.default) for field in dataclasses.fields(TuningCall)}
    known = {"kernel": CHOICES, "chip": topologies.TPUS, "write": ("true", "false")}
    given: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in fields:
            raise SystemExit(f"{word!r}: give NAME=VALUE with one of {', '.join(fields)}")
        if name in known and value not in known[name]:
            raise SystemExit(f"{word!r}: {name} is one of {', '.join(known[name])}")
        if fields[name] is int and not value.isdecimal():
            raise SystemExit(f"{word!r}: {name} is a whole number")
        given[name] = value == "true" if fields[name] is bool else fields[name](value)
    return TuningCall(**given)


def cycles(call: TuningCall) -> float:
    """Cycles of the kernel by the compiler's schedule for the call's chip."""
    *shapes, documents = call.arguments()
    program = schedules.record(call.function(), *shapes, documents, chip=call.chip)
    return float(sum(kernel.cycles for kernel in program.pallas if call.kernel in kernel.name))


def seconds(call: TuningCall) -> float:
    """Seconds of the call on this process' device."""
    *shapes, documents = call.arguments()
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [jax.random.normal(key, a.shape, a.dtype) for key, a in zip(keys, shapes)]
    jax.clear_caches()  # traced before, it would keep the sizes before
    function = jax.jit(call.function())
    jax.block_until_ready(function(*arrays, documents))
    found = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        jax.block_until_ready([function(*arrays, documents) for _ in range(10)])
        found.append((time.perf_counter() - begin) / 10)
    return statistics.median(found)


def tried(
    call: TuningCall, start: dict[str, int], cost: Callable[[TuningCall], float]
) -> Iterator[tuple[dict[str, int], float]]:
    """Sizes and their costs, each better than those before; infinite where they do not compile."""

    def of(sizes: dict[str, int]) -> float:
        try:
            with block_sizes.using(call.kernel, **sizes):
                found = float(cost(call)) or math.inf
        except Exception as error:  # too much memory, or what a kernel does not take
            print(f"{sizes}: {str(error).partition(chr(10))[0][:120]}", file=sys.stderr)
            return math.inf
        print(f"{sizes}: {found:.6g}", file=sys.stderr)
        return found

    best, least = start, of(start)
    yield best, least
    improved = True
    while improved:
        improved = False
        for name, values in CHOICES[call.kernel].items():
            for value in values:
                if value == best[name]:
                    continue
                sizes = best | {name: value}
                if (found := of(sizes)) < least:
                    best, least, improved = sizes, found, True
                    yield best, least


def written(table: dict[str, Any], call: TuningCall, kind: str, sizes: dict[str, int]) -> str:
    """The table's text with a row for the call, in place of one for the same."""
    limits = {"head_dim": call.head_dim}
    if not call.documents:
        limits["segments"] = 0
    row = {"chips": [kind], "up_to": limits, "sizes": sizes}
    old = [
        other
        for other in table[call.kernel]
        if (other.get("chips"), other.get("up_to")) != ([kind], limits)
    ]
    # Before the row that the call has now: rows of masks without segments stay in front of it.
    fitting = (at for at, one in enumerate(old) if block_sizes.fits(one, kind, call.numbers))
    old.insert(next(fitting, len(old)), row)
    kernels = []
    for name, rows in {**table, call.kernel: old}.items():
        lines = ",\n".join("    " + json.dumps(one) for one in rows)
        kernels.append(f"  {json.dumps(name)}: [\n{lines}\n  ]")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def main() -> None:
    """Tries, and prints the best."""
    call = parsed(sys.argv[1:])
    schedules.start_recording()
    on_device = jax.default_backend() == "tpu"
    device = jax.devices()[0] if on_device else topologies.tpu(call.chip)[0]
    start = block_sizes.block_sizes(call.kernel, device.device_kind, **call.numbers)
    found = list(tried(call, start, seconds if on_device else cycles))
    (best, least), (_, before) = found[-1], found[0]
    unit = "s" if on_device else "cycles"
    print(f"{device.device_kind}: {best}, {least:.6g} {unit}; the table's {before:.6g}")
    if call.write and best != start:
        text = written(block_sizes.table(), call, device.device_kind, best)
        TABLE.write_text(text, "utf-8")
        print(f"written to {TABLE}")


if __name__ == "__main__":
    main()
