"""Cross-entropy of a head: each implementation on the device at hand, as a share of the products.

python -m benchmarks.cross_entropy [shapes='((8192,2048,32000),)'] [json=FILE]

Implementations take turns, forward and forward with backward. Rates count the four products that
are needed without logits in memory (one forward, three backward): an implementation that spends no
time on anything else reaches the rate of a plain product of the same arrays, measured in turn.
"""

import functools
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks.grouped_product import alternate
from benchmarks.harness import save, spread, table
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line
from pallas_kernels.cross_entropy import cross_entropy, implementations


@config
class CrossEntropyBenchmark:
    """The defaults are those for the hardware that this runs on."""

    # Tokens, width of hidden, and words, of each case.
    shapes: tuple[tuple[int, int, int], ...] = ((1024, 256, 8192),)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of hidden and head
    implementations: tuple[str, ...] = ("reference", "chunked")  # which to measure
    rounds: int = 5  # turns of each
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for an implementation that there is not."""
        for name in self.implementations:
            if name not in implementations():
                raise UserError(f"{name!r} is not one of {', '.join(implementations())}")
        if self.rounds < 1:
            raise UserError(f"rounds={self.rounds}: it must be at least 1")


def accelerator() -> CrossEntropyBenchmark:
    """Heads of GPT-2, of Llama 2 and of Llama 3, with the tokens of a step."""
    return CrossEntropyBenchmark(
        shapes=((16384, 768, 50304), (8192, 4096, 32000), (8192, 4096, 128256)),
        dtype="bfloat16",
        implementations=implementations()[1:],  # the reference holds all logits
    )


def functions(name: str, words: int) -> dict[str, Any]:
    """Forward, and forward with both gradients."""

    def total(hidden, head, targets):
        return jnp.sum(
            cross_entropy(hidden, head, targets, vocabulary=words, implementation=name)[0]
        )

    return {"forward": jax.jit(total), "both": jax.jit(jax.value_and_grad(total, argnums=(0, 1)))}


def measure(settings: CrossEntropyBenchmark, shape: tuple[int, int, int]) -> dict[str, Any]:
    """TFLOP/s of every implementation that can serve, and of the plain product."""
    tokens, width, words = shape
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1, tokens, width), settings.dtype)
    head = 0.1 * jax.random.normal(keys[1], (words, width), settings.dtype)
    targets = jax.random.randint(keys[2], (1, tokens), 0, words, jnp.int32)
    product = jax.jit(lambda hidden, head: hidden[0] @ head.T)
    calls = {("product", "forward"): functools.partial(product, hidden, head)}
    for name in settings.implementations:
        for what, function in functions(name, words).items():
            call = functools.partial(function, hidden, head, targets)
            try:
                jax.block_until_ready(call())
            except (ValueError, jax.errors.JaxRuntimeError) as error:
                print(f"{name}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
                break
            calls[name, what] = call
    flops = 2e-12 * tokens * width * words
    found: dict[str, Any] = {}
    for (name, what), seconds in alternate(calls, settings.rounds).items():
        rate = flops * (4 if what == "both" else 1) / spread(seconds)["median"]
        found.setdefault(name, {})[what] = rate
    return found


def main() -> None:
    """Measures and prints a table."""
    on_cpu = jax.default_backend() == "cpu"
    settings = from_command_line(CrossEntropyBenchmark() if on_cpu else accelerator())
    rows, results = [], []
    for shape in settings.shapes:
        found = measure(settings, shape)
        results.append({"shape": shape, "teraflops": found})
        roof = found["product"]["forward"]
        for name, rates in found.items():
            shown = [rates.get(what, "-") for what in ("forward", "both")]
            shares = [rate if rate == "-" else rate / roof for rate in shown]
            rows.append([" x ".join(map(str, shape)), name, *shown, *shares])
    columns = ("tokens, width, words", "", "forward TF/s", "both", "to product", "both")
    print(table(columns, rows))
    device = jax.devices()[0].device_kind
    save(settings.json, "cross_entropy", device=device, results=results)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
