"""State that lies in the host's memory between steps, and comes to the devices for its update.

A step moves it there and back once, 16 bytes a parameter with AdamW in float32, over the host's bus
(PCIe: some 25 to 55 GB/s a device). Worth it where that is short beside the step: with many rows in
a step (`accumulation`), and a model that would not fit otherwise (Ren et al. 2021,
arXiv:2101.06840).
"""

from __future__ import annotations

from typing import Any, Literal

import jax
from jax.sharding import NamedSharding
from jaxtyping import PyTree

Place = Literal["device", "host"]
PINNED = "pinned_host"  # what XLA calls the host's memory that devices reach


def at_rest(tree: PyTree, memory: Place) -> PyTree:
    """Arrays where they lie between steps; numbers stay on the devices."""
    return tree if memory == "device" else _moved(tree, jax.memory.Space.Host)


def at_work(tree: PyTree, memory: Place) -> PyTree:
    """Arrays on the devices."""
    return tree if memory == "device" else _moved(tree, jax.memory.Space.Device)


def shapes_at_rest(tree: PyTree, memory: Place) -> PyTree:
    """Shapes with shardings of arrays at rest: tracing leaves the kind of memory out of them."""

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not leaf.ndim or not isinstance(leaf.sharding, NamedSharding):
            return leaf
        sharding = leaf.sharding.with_memory_kind(PINNED)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return tree if memory == "device" else jax.tree.map(one, tree)


def _moved(tree: PyTree, space: Any) -> PyTree:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, tree)
