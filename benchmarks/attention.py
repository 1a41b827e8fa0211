"""Attention: how fast each implementation is, forward and backward, over many shapes and masks.

python -m benchmarks.attention [lengths=(512,4096)] [implementations='("cudnn",)'] [json=FILE]

On an accelerator the shapes are those of the FlashAttention-3 paper (arXiv 2407.08608): 16,384
tokens and a width of 2,048 in every call, in bfloat16, beside tokamax and PyTorch where they are
installed. On a CPU they are small and in float32. All take turns, and medians count. First each
one's output and gradients are compared with the reference in float32. Inputs are drawn from a
normal distribution: on some hardware the power that data draw sets the clock, and other data would
be faster.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_others import OTHERS, starting
from benchmarks.harness import save, table
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line
from pallas_kernels.attention import Mask, attention, implementations, visited

ENOUGH = 0.02  # seconds that a measurement lasts at least
BLOCK = 128  # queries and keys of the tiles that are counted
MASKS = ("causal", "full", "window", "packed", "prefix")
COLUMNS = (
    *("head_dim", "mask", "length", "implementation", "forward", "backward"),
    *("tiles_forward", "tiles_backward", "of_roof", "error", "remark"),
)


@config
class AttentionBenchmark:
    """The defaults are those for the hardware that this runs on."""

    lengths: tuple[int, ...] = (128, 256, 512, 1024)  # queries and keys of a row
    head_dims: tuple[int, ...] = (64,)  # widths of a head
    masks: tuple[str, ...] = ("causal", "full")  # of causal, full, window, packed, prefix
    tokens: int = 1024  # of a call: rows times length
    hidden: int = 256  # heads times head_dim
    group: int = 1  # query heads that share a key head
    window: int = 1024  # keys that a query of the mask `window` sees
    documents: int = 8  # in a row of the mask `packed`
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the inputs
    implementations: tuple[str, ...] = ("reference", "chunked")  # which to measure
    largest: float = 1.0  # GB of scores up to which `reference`, which holds them all, takes part
    repeats: int = 5  # measurements of each, in turns
    seconds: float = 0.0  # after so many nothing more is begun; 0: never
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for shapes and names that there are not."""
        if self.repeats < 1:
            raise UserError(f"repeats={self.repeats}: it must be at least 1")
        for length, head_dim in itertools.product(self.lengths, self.head_dims):
            if self.tokens % length:
                raise UserError(f"tokens={self.tokens} is no multiple of the length {length}")
            if self.hidden % (head_dim * self.group):
                raise UserError(
                    f"hidden={self.hidden} is no multiple of group={self.group} times the "
                    f"head_dim {head_dim}"
                )
        known = {"implementations": (*implementations(), *OTHERS), "masks": MASKS}
        for setting, names in known.items():
            for name in getattr(self, setting):
                if name not in names:
                    raise UserError(f"{setting}: {name!r} is not one of {', '.join(names)}")


def accelerator() -> AttentionBenchmark:
    """The grid of the FlashAttention-3 paper, as much of it as five minutes suffice for."""
    ours = [name for name in implementations() if name not in ("reference", "chunked")]
    return AttentionBenchmark(
        lengths=(4096, 2048, 8192, 512),
        head_dims=(128, 64),
        masks=MASKS,
        tokens=16384,
        hidden=2048,
        dtype="bfloat16",
        implementations=(*ours, *OTHERS),
        largest=8.0,
        seconds=300.0,
    )


def main() -> None:
    """Checks, measures and prints."""
    on_cpu = jax.default_backend() == "cpu"
    settings = from_command_line(AttentionBenchmark() if on_cpu else accelerator())
    device, roof = jax.devices()[0].device_kind, product_rate(settings.dtype)
    print(
        f"{device}, {settings.dtype}, {settings.tokens} tokens, {settings.hidden} wide; TFLOP/s of "
        "the forward and the backward pass as papers count them (half of them for a causal mask), "
        f"and by tiles of {BLOCK} x {BLOCK} that are not empty; a matrix product has {roof:.0f}"
    )
    lines = list(measure(settings, roof))
    print("\n" + table(COLUMNS, [[line[column] for column in COLUMNS] for line in lines]))
    save(settings.json, "attention", device=device, roof=roof, teraflops=lines)


def measure(settings: AttentionBenchmark, roof: float) -> Iterator[dict[str, Any]]:
    """The lines of the table."""
    begin, errors = time.perf_counter(), {}
    # The most telling shapes first: time may run out.
    grid = itertools.product(settings.head_dims, settings.lengths, settings.masks)
    for head_dim, length, name in grid:
        sides, remarks = {}, {}
        inputs, cotangent, mask = problem(settings, head_dim, name, length)
        for side in settings.implementations:
            if settings.seconds and time.perf_counter() - begin > settings.seconds:
                remarks[side] = "left out: no time"
                continue
            print(f"{head_dim} {name} {length} {side}", file=sys.stderr)
            try:
                check_size(settings, side, inputs[0].shape, length)
                if (key := (head_dim, name, side)) not in errors:
                    errors[key] = error(settings, *key)
                sides[side] = prepared(side, inputs, cotangent, mask, name, settings)
            except (ValueError, ImportError, NotImplementedError, RuntimeError) as problem_found:
                remarks[side] = str(problem_found).partition("\n")[0][:90]
        seconds = alternate(sides, settings.repeats)
        for side in settings.implementations:
            line = dict.fromkeys(COLUMNS, "-")
            line |= {"head_dim": head_dim, "mask": name, "length": length, "implementation": side}
            line["remark"] = remarks.get(side, "")
            if side in seconds:
                line |= rates(inputs[0].shape, mask, name, seconds[side], roof)
                line["error"] = errors[head_dim, name, side]
            yield line


def problem(settings: AttentionBenchmark, head_dim: int, name: str, length: int, rows: int = 0):
    """Query, key and value; a cotangent of the output; the mask."""
    batch, heads = rows or settings.tokens // length, settings.hidden // head_dim
    keys = jax.random.split(jax.random.key(0), 4)
    query_heads = (batch, length, heads, head_dim)
    key_heads = (batch, length, heads // settings.group, head_dim)
    q, k, v, cotangent = (
        jax.random.normal(key, shape, settings.dtype)
        for key, shape in zip(keys, (query_heads, key_heads, key_heads, query_heads), strict=True)
    )
    index = np.arange(length, dtype=np.int32)
    if name == "packed":
        of_row = jnp.asarray(1 + index * settings.documents // length)
        arrays = {"query_segments": of_row, "key_segments": of_row}
    elif name == "prefix":  # of a quarter, which sees itself whole
        of_row = jnp.asarray(np.maximum(index, length // 4 - 1))
        arrays = {"query_ranks": of_row, "key_ranks": of_row}
    else:
        arrays = {}
    arrays = {field: jnp.broadcast_to(a, (batch, length)) for field, a in arrays.items()}
    window = settings.window if name == "window" else None
    return (q, k, v), cotangent, Mask(causal=name != "full", window=window, **arrays)


def prepared(side: str, inputs, cotangent, mask: Mask, name: str, settings) -> tuple:
    """Functions that start the forward pass, and both passes; they have run once.

    What they return waits for the end.
    """
    if side in OTHERS:
        runs = OTHERS[side](inputs, cotangent, name, settings.window)
    else:
        arguments = *inputs, cotangent, mask
        runs = tuple(starting(function, arguments) for function in functions(side))
    for run in runs:
        run()()
    return runs


def functions(implementation: str) -> tuple[Callable, Callable]:
    """Forward, and forward with backward, of (query, key, value, cotangent, mask)."""

    def forward(q, k, v, cotangent, mask):
        return attention(q, k, v, mask, implementation=implementation)

    def both(q, k, v, cotangent, mask):
        out, pull = jax.vjp(lambda *inputs: forward(*inputs, cotangent, mask), q, k, v)
        return out, pull(cotangent)

    return jax.jit(forward), jax.jit(both)


def error(settings: AttentionBenchmark, head_dim: int, name: str, side: str) -> float | str:
    """Largest error of output and gradients on one row, as a share of the largest number."""
    if side in OTHERS:
        return "-"
    length = min(settings.lengths)
    inputs, cotangent, mask = problem(settings, head_dim, name, length, rows=1)
    found = functions(side)[1](*inputs, cotangent, mask)
    exact = [a.astype(jnp.float32) for a in (*inputs, cotangent)]
    expected = functions("reference")[1](*exact, mask)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in _numpy(pairs))


def _numpy(pairs):
    return ([np.asarray(a, np.float32) for a in pair] for pair in pairs)


def check_size(settings: AttentionBenchmark, implementation: str, shape, length: int) -> None:
    """Raises ValueError where all scores at once are more than there should be."""
    gigabytes = 4 * shape[0] * shape[1] * shape[2] * length / 1e9
    if implementation == "reference" and gigabytes > settings.largest:
        raise ValueError(f"left out: {gigabytes:.1f} GB of scores (largest={settings.largest})")


def alternate(sides: dict[str, tuple], repeats: int) -> dict[str, tuple[float, float]]:
    """Seconds of the forward pass and of both passes: medians over turns."""
    counts = {
        (side, which): 1 + int(ENOUGH / mean_seconds(run, 1))
        for side, runs in sides.items()
        for which, run in enumerate(runs)
    }
    taken = {key: [] for key in counts}
    for _ in range(repeats):
        for (side, which), count in counts.items():
            taken[side, which].append(mean_seconds(sides[side][which], count))
    medians = {key: statistics.median(seconds) for key, seconds in taken.items()}
    return {side: (medians[side, 0], medians[side, 1]) for side in sides}


def mean_seconds(run: Callable[[], Callable], count: int) -> float:
    """Seconds of a call, as the mean of calls that follow each other."""
    begin = time.perf_counter()
    for _ in range(count):
        wait = run()
    wait()
    return (time.perf_counter() - begin) / count


def rates(shape: tuple[int, ...], mask: Mask, name: str, seconds, roof: float) -> dict[str, float]:
    """TFLOP/s of both passes, by the formula of papers and by tiles.

    Of the two products of the forward pass; the backward pass is counted with 2.5 times as many
    (FlashAttention-2, arXiv 2307.08691). A causal mask needs half of all pairs; where a mask leaves
    out others, its tiles alone are counted.
    """
    batch, length, heads, head_dim = shape
    has_arrays = mask.query_segments is not None or mask.query_ranks is not None
    tiles = int(visited(mask, length, length, BLOCK, BLOCK)) * (1 if has_arrays else batch)
    by_tiles = 4 * heads * head_dim * tiles * BLOCK**2
    by_formula = 4 * batch * heads * length**2 * head_dim
    flops = {"full": by_formula, "causal": by_formula / 2}.get(name, by_tiles)
    forward, backward = seconds[0], max(seconds[1] - seconds[0], 1e-9)
    return {
        "forward": flops / forward / 1e12,
        "backward": 2.5 * flops / backward / 1e12,
        "tiles_forward": by_tiles / forward / 1e12,
        "tiles_backward": 2.5 * by_tiles / backward / 1e12,
        "of_roof": by_tiles / forward / 1e12 / roof,
    }


def product_rate(dtype: str) -> float:
    """TFLOP/s of a large matrix product, measured."""
    size = 512 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    run = starting(product, (a, a))
    run()()
    seconds = min(mean_seconds(run, 1 + int(ENOUGH / mean_seconds(run, 1))) for _ in range(5))
    return 2 * size**3 / seconds / 1e12


if __name__ == "__main__":
    with exit_on_user_error():
        main()
