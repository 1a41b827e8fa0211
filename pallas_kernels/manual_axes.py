"""Types of arrays inside `jax.shard_map`."""

from __future__ import annotations

from typing import Any

import jax


def varying_axes(tree: Any) -> frozenset[str]:
    """The manual mesh axes over which some array of a pytree may differ between devices."""
    axes = (jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree))
    return frozenset().union(*axes)


def vary_alike(tree: Any, like: Any = None) -> Any:
    """The arrays of a pytree, typed as varying over the same manual axes: those of all, or `like`.

    The carry of a loop must enter with the type that it leaves with, and a gradient must have the
    type of its input. Where an input does not vary over an axis it is cast here, and the transpose
    of the cast sums its gradient over that axis. Outside of `jax.shard_map` nothing changes.
    """
    axes = varying_axes(tree if like is None else like)

    def cast(leaf):
        missing = tuple(sorted(axes - varying_axes(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)
