"""Zeros among the weights that training keeps: those of a pruned model."""

from __future__ import annotations

import jax.numpy as jnp
from flax import traverse_util


def with_zeros(new: dict, weights: dict) -> dict:
    """Arrays that are 0 wherever a weight of the blocks' dense layers is exactly 0.

    Biases, norms, tables and adapters, which may begin at 0, are left as they are.

    Args:
      new: gradients, or updated weights.
      weights: of the same paths.
    """
    old = traverse_util.flatten_dict(weights)
    return traverse_util.unflatten_dict(
        {
            path: jnp.where(old[path] == 0, 0, leaf) if _is_pruned(path) else leaf
            for path, leaf in traverse_util.flatten_dict(new).items()
        }
    )


def _is_pruned(path: tuple[str, ...]) -> bool:
    """Returns whether a parameter is the weight of a dense layer of the blocks."""
    return "blocks" in path[:2] and path[-1] == "weight" and "adapter" not in path
