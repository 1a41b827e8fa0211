"""Attention: how fast each implementation is, forward and forward with backward, over many shapes.

python -m benchmarks.attention [lengths=(512,4096)] [implementations='("cudnn",)'] [json=FILE]

On an accelerator the shapes are those of the FlashAttention-3 paper (arXiv 2407.08608): 16,384
tokens and a width of 2,048 in every call, in bfloat16. On a CPU they are small and in float32.
Inputs are drawn from a normal distribution: on some hardware the power that data draw sets the
clock, and other data would be faster.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks.harness import save, table
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line
from pallas_kernels.attention import Mask, attention, implementations

ENOUGH = 0.1  # seconds that a measurement lasts at least


@config
class AttentionBenchmark:
    """The defaults are those for the hardware that this runs on."""

    lengths: tuple[int, ...] = (128, 256, 512, 1024)  # queries and keys of a row
    head_dims: tuple[int, ...] = (64,)  # widths of a head
    causal: tuple[bool, ...] = (True, False)  # masks
    tokens: int = 1024  # of a call: rows times length
    hidden: int = 256  # heads times head_dim
    group: int = 1  # query heads that share a key head
    segments: int = 0  # documents packed into a row; 0: a mask without segments
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the inputs
    implementations: tuple[str, ...] = ("reference", "chunked")  # which to measure
    largest: float = 1.0  # GB of scores up to which `reference`, which holds them all, takes part
    repeats: int = 5  # measurements; the best counts
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for shapes that there are not."""
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
        for name in self.implementations:
            if name not in implementations():
                raise UserError(f"{name!r} is not one of {', '.join(implementations())}")


def accelerator() -> AttentionBenchmark:
    """The grid of the FlashAttention-3 paper."""
    return AttentionBenchmark(
        lengths=(512, 1024, 2048, 4096, 8192, 16384),
        head_dims=(64, 128, 256),
        tokens=16384,
        hidden=2048,
        dtype="bfloat16",
        implementations=implementations(),
        largest=8.0,
    )


def main() -> None:
    """Measures and prints."""
    on_cpu = jax.default_backend() == "cpu"
    settings = from_command_line(AttentionBenchmark() if on_cpu else accelerator())
    device = jax.devices()[0].device_kind
    print(
        f"{device}, {settings.dtype}, {settings.tokens} tokens, {settings.hidden} wide; "
        "TFLOP/s of the forward pass, and of forward and backward together"
    )
    rows = list(measure(settings))
    columns = ["head_dim", "mask", "length", "implementation", "forward", "both", "remark"]
    print("\n" + table(columns, rows))
    lines = [dict(zip(columns, row, strict=True)) for row in rows]
    save(settings.json, "attention", device=device, teraflops=lines)


def measure(settings: AttentionBenchmark) -> Iterator[list[Any]]:
    """The rows of the table."""
    for head_dim, causal, length in itertools.product(
        settings.head_dims, settings.causal, settings.lengths
    ):
        inputs, cotangent, mask = problem(settings, head_dim, causal, length)
        flops = model_flops(inputs[0].shape, length, causal)
        name = "causal" if causal else "full"
        for implementation in settings.implementations:
            print(f"{head_dim} {name} {length} {implementation}", file=sys.stderr)
            row = [head_dim, name, length, implementation]
            try:
                check_size(settings, implementation, inputs[0].shape, length)
                forward, both = functions(implementation)
                seconds = [
                    best_seconds(f, (*inputs, cotangent, mask), settings.repeats)
                    for f in (forward, both)
                ]
            except (ValueError, jax.errors.JaxRuntimeError) as error:
                yield [*row, "-", "-", str(error).partition("\n")[0][:90]]
            else:
                yield [*row, flops / seconds[0] / 1e12, 3.5 * flops / seconds[1] / 1e12, ""]


def problem(settings: AttentionBenchmark, head_dim: int, causal: bool, length: int):
    """Query, key and value; a cotangent of the output; the mask."""
    batch, heads = settings.tokens // length, settings.hidden // head_dim
    keys = jax.random.split(jax.random.key(0), 4)
    query_heads = (batch, length, heads, head_dim)
    key_heads = (batch, length, heads // settings.group, head_dim)
    q, k, v, cotangent = (
        jax.random.normal(key, shape, settings.dtype)
        for key, shape in zip(keys, (query_heads, key_heads, key_heads, query_heads), strict=True)
    )
    segments = None
    if settings.segments:
        one_row = 1 + jnp.arange(length) * settings.segments // length
        segments = jnp.broadcast_to(one_row, (batch, length))
    return (q, k, v), cotangent, Mask(causal=causal, query_segments=segments, key_segments=segments)


def model_flops(shape: tuple[int, ...], length: int, causal: bool) -> float:
    """Of the two products of the forward pass; a causal mask needs half of them.

    The backward pass is counted with 2.5 times as many (FlashAttention-2, arXiv 2307.08691).
    Segments are not taken off.
    """
    batch, queries, heads, head_dim = shape
    return 4 * batch * heads * queries * length * head_dim / (2 if causal else 1)


def check_size(settings: AttentionBenchmark, implementation: str, shape, length: int) -> None:
    """Raises ValueError where all scores at once are more than there should be."""
    gigabytes = 4 * shape[0] * shape[1] * shape[2] * length / 1e9
    if implementation == "reference" and gigabytes > settings.largest:
        raise ValueError(f"left out: {gigabytes:.1f} GB of scores (largest={settings.largest})")


def functions(implementation: str) -> tuple[Callable, Callable]:
    """Forward, and forward with backward, of (query, key, value, cotangent, mask)."""

    def forward(q, k, v, cotangent, mask):
        return attention(q, k, v, mask, implementation=implementation)

    def both(q, k, v, cotangent, mask):
        out, pull = jax.vjp(lambda *inputs: forward(*inputs, cotangent, mask), q, k, v)
        return out, pull(cotangent)

    return jax.jit(forward), jax.jit(both)


def best_seconds(function: Callable, inputs: tuple, repeats: int) -> float:
    """Seconds of one call: the best of several means, each over calls that follow each other."""

    def mean(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            out = function(*inputs)
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / count

    mean(1)  # compiles
    count = 1 + int(ENOUGH / mean(1))
    return min(mean(count) for _ in range(repeats))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
