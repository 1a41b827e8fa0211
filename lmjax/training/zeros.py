"""Zeros among the weights that training keeps: those of a pruned model."""

from __future__ import annotations

import jax
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


def share_of_zeros(weights: dict) -> float:
    """Share of the weights of the blocks' dense layers that are exactly 0.

    Args:
      weights: parameters of a model in float; blocks may be stacked, or apart in lists.
    """
    flat = jax.tree_util.tree_leaves_with_path(weights)
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat)
    dense = [leaf for name, (_, leaf) in zip(names, flat) if _is_pruned(tuple(name.split("/")))]
    zeros = sum(int(jnp.sum(leaf == 0)) for leaf in dense)
    return zeros / max(1, sum(leaf.size for leaf in dense))


def _is_pruned(path: tuple[str, ...]) -> bool:
    """Returns whether a parameter is the weight of a dense layer of the blocks."""
    return "blocks" in path[:2] and path[-1] == "weight" and "adapter" not in path
