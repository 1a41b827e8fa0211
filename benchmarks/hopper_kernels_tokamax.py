"""tokamax's attention compiled for a described H100, beside ours in `benchmarks.hopper_kernels`."""

from collections.abc import Callable
from typing import Any

import jax
import tokamax

# Keys in a tile of its forward kernel by head size, as it chooses them for a shape that nobody has
# tuned; every tile of its gradients has 64 queries and 64 keys.
FORWARD_KEYS = {64: 128, 128: 128, 256: 64}
TILE = 64


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Its causal attention for Hopper."""
    return tokamax.dot_product_attention(q, k, v, is_causal=True, implementation="mosaic_gpu")


def query_gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Gradients of queries alone, so that the program has no kernel for the others."""
    out, pull = jax.vjp(lambda q: attend(q, k, v), q)
    return pull(out)


def key_gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of keys and values alone."""
    out, pull = jax.vjp(lambda k, v: attend(q, k, v), k, v)
    return pull(out)


def report(
    head_dim: int, arguments: tuple, compiled: Callable[[Callable, tuple], dict]
) -> list[dict[str, Any]]:
    """One entry for each of its kernels.

    Args:
        head_dim: a key of `FORWARD_KEYS`.
        arguments: shapes of queries, keys and values on a described H100.
        compiled: gives the kernels of a function by name.
    """
    # Its forward kernel has a loop over full tiles and one over partial ones, the others one.
    least = {
        "forward": 2 * (head_dim + FORWARD_KEYS[head_dim]) // 16,
        "query_gradients": (2 * head_dim + TILE) // 16,
        "key_gradients": (2 * head_dim + 2 * TILE) // 16,
    }
    functions = (attend, query_gradients, key_gradients)
    rows = []
    (device,) = arguments[0].sharding.device_set
    with jax.default_device(device):  # it asks this one what it can do
        for (name, count), function in zip(least.items(), functions, strict=True):
            kernels = compiled(function, arguments)
            # The first program of gradients has a forward kernel too, which keeps more.
            (kernel,) = (
                kernel
                for called, kernel in kernels.items()
                if (called == "flash_attention_sm90") == (name == "forward")
            )
            rows.append({"kernel": name, **kernel, "least": count})
    return rows
