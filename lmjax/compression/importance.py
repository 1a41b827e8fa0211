"""Measures of how much the parts of a model matter, on texts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lmjax.compression.calibration import BlockStack, batches_of, walk
from lmjax.models import TransformerConfig


def layer_influence(
    config: TransformerConfig,
    params: dict,
    rows: Int[np.ndarray, "rows length"],
    stack: BlockStack,
) -> Float[np.ndarray, "entries"]:
    """1 - mean cosine of the residual stream before and after each entry of a stack."""
    entries = len(jax.tree.leaves(stack.read(params))[0])
    total, count = np.zeros(entries), np.zeros(entries)

    @jax.jit
    def cosines(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        lengths = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
        return jnp.sum(jnp.sum(x * y, axis=-1) / jnp.maximum(lengths, 1e-30))

    def see(entry: int, x: jax.Array, y: jax.Array) -> None:
        total[entry] += float(cosines(x, y))
        count[entry] += x.shape[0] * x.shape[1]

    walk(config, params, stack, list(batches_of(config, rows)), lambda *_: None, see=see)
    return 1 - total / count


def added(
    weight: Float[np.ndarray, "in out"], second: Float[np.ndarray, "in in"], size: int
) -> Float[np.ndarray, "parts"]:
    """Mean squared length of what each `size` neighbouring inputs add to the output of a layer.

    Args:
      weight: of the layer.
      second: mean of x x^T over its inputs.
      size: inputs of a part.
    """
    parts = weight.reshape(-1, size, weight.shape[1])
    blocks = second.reshape(len(parts), size, len(parts), size)
    own = np.einsum("pipj->pij", blocks)
    return np.einsum("pio,pij,pjo->p", parts, own, parts)
