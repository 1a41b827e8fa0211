"""Grouped product: each implementation on the device at hand, beside one product of the same rows.

python -m benchmarks.grouped_product [tokens=4096] [groups=(8,64)] [json=FILE]

Implementations take turns, forward and forward with backward; numbers are medians, and times of the
dense product of all rows with one matrix, which is the least that they can take.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import save, seconds_of, spread, table
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line
from pallas_kernels.grouped_product import grouped_product, implementations


@config
class GroupedProductBenchmark:
    """One layer of a mixture of experts, without its routing."""

    tokens: int = 4096  # rows
    width: int = 512  # of a row
    out: int = 1024  # of a row of the result
    groups: tuple[int, ...] = (8, 32)  # matrices
    dtype: Literal["float32", "bfloat16"] = "float32"  # of all arrays
    implementations: tuple[str, ...] = ("ragged", "blocks")  # which to measure
    rounds: int = 5  # turns of each
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for an implementation that there is not."""
        for name in self.implementations:
            if name not in implementations():
                raise UserError(f"{name!r} is not one of {', '.join(implementations())}")
        if self.rounds < 1:
            raise UserError(f"rounds={self.rounds}: it must be at least 1")


def problem(settings: GroupedProductBenchmark, groups: int) -> tuple[jax.Array, ...]:
    """Rows, matrices and uneven sizes, as a router's that is trained to be fair."""
    random = np.random.default_rng(0)
    sizes = random.multinomial(settings.tokens, random.dirichlet(np.full(groups, 4.0)))
    shapes = (settings.tokens, settings.width), (groups, settings.width, settings.out)
    x, w = (jnp.asarray(random.normal(size=shape), settings.dtype) for shape in shapes)
    return x, w, jnp.asarray(sizes, jnp.int32)


def functions(product: Callable) -> dict[str, Callable]:
    """Forward, and forward with both gradients."""

    def total(x, w, sizes):
        return jnp.sum(jnp.square(product(x, w, sizes).astype(jnp.float32)))

    return {"forward": jax.jit(product), "both": jax.jit(jax.grad(total, argnums=(0, 1)))}


def alternate(calls: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of every call in each round, in which all take their turn; the first compiles."""
    found: dict[Any, list[float]] = {key: [] for key in calls}
    for turn in range(rounds + 1):
        for key, call in calls.items():
            [seconds] = seconds_of(lambda call=call: jax.block_until_ready(call()), 1)
            if turn:
                found[key].append(seconds)
    return found


def measure(settings: GroupedProductBenchmark, groups: int) -> dict[str, dict[str, Any]]:
    """Seconds of every function of every implementation, and their ratios to the dense product."""
    arrays = problem(settings, groups)
    products = {"dense": lambda x, w, sizes: x @ w[0]}
    for name in settings.implementations:
        products[name] = functools.partial(grouped_product, implementation=name)
    calls = {
        (name, what): functools.partial(function, *arrays)
        for name, product in products.items()
        for what, function in functions(product).items()
    }
    seconds = alternate(calls, settings.rounds)
    found: dict[str, dict[str, Any]] = {name: {} for name in products}
    for (name, what), times in seconds.items():
        ratios = [one / dense for one, dense in zip(times, seconds["dense", what], strict=True)]
        found[name][what] = {"seconds": spread(times), "to_dense": spread(ratios)}
    return found


def main() -> None:
    """Measures and prints a table."""
    settings = from_command_line(GroupedProductBenchmark())
    rows, results = [], {}
    for groups in settings.groups:
        results[groups] = measure(settings, groups)
        for name, found in results[groups].items():
            ways = (found["forward"], found["both"])
            times = [1e3 * way["seconds"]["median"] for way in ways]
            rows.append([groups, name, *times, *(way["to_dense"]["median"] for way in ways)])
    columns = ("groups", "", "forward ms", "with backward ms", "to dense", "with backward")
    print(table(columns, rows))
    save(settings.json, "grouped_product", device=jax.devices()[0].device_kind, results=results)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
