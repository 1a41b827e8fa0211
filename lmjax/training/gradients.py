"""Gradients of a batch, in microbatches one after another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmjax.config import UserError
from lmjax.objectives import Example, Sums
from lmjax.objectives.example import batches, count_rows, count_tokens
from lmjax.parallel import Layout, axis_size

Zero = Literal[1, 2, 3]
# (params, example, key, frozen) -> sums, whose `loss` is differentiated.
Loss = Callable[[dict, Example, jax.Array, Any], Sums]


def accumulated(
    loss: Loss,
    params: dict,
    example: Example,
    key: jax.Array,
    frozen: Any,
    microbatches: int = 1,
    zero: Zero = 3,
) -> tuple[dict, Sums]:
    """Gradients of the summed loss, sharded as the parameters, and the sums of the whole batch.

    Args:
      loss: what is differentiated by its first argument.
      params: sharded as they lie at rest.
      example: the rows of the batch.
      key: randomness of the step.
      frozen: see `Objective.loss`.
      microbatches: equal parts of the rows, computed one after another.
      zero: when parameters sharded over `fsdp` are gathered. 3: each layer where it is used, in
        forward and again in backward; 1 and 2: all of them once a step. Under accumulation 2 keeps
        the summed gradient sharded over `fsdp`, 1 keeps it whole (Rajbhandari et al. 2020).
    """
    weights = jax.tree.map(without_fsdp, params) if zero < 3 else params

    def gradients(example: Example, key: jax.Array) -> tuple[dict, Sums]:
        def differentiated(weights: dict) -> tuple[jax.Array, Sums]:
            sums = loss(weights, example, key, frozen)
            return sums.loss, sums

        return jax.grad(differentiated, has_aux=True)(weights)

    if microbatches == 1:
        found, sums = gradients(example, key)
        return scattered(found, params), sums

    def microbatch(example: Example, key: jax.Array) -> tuple[dict, Sums]:
        found, sums = gradients(example, key)
        return (scattered(found, params) if zero == 2 else found), sums

    parts = divided(example, microbatches), jax.random.split(key, microbatches)
    found, sums = summed(lambda part: microbatch(*part), parts)
    return scattered(found, params), sums


def divided(example: Example, microbatches: int) -> Example:
    """The example with an axis of microbatches before that of their rows."""

    def split(a: jax.Array) -> jax.Array:  # strided, so that no row changes its device
        return jnp.moveaxis(a.reshape(-1, microbatches, *a.shape[1:]), 1, 0)

    return jax.tree.map(split, example)


def summed(function: Callable[[Any], Any], parts: Any) -> Any:
    """Sums of what a function gives for each part of the first axis, one after another."""

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(part)), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda a: a[0], parts))
    if not jax.tree.leaves(shapes):
        return shapes
    total = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype, out_sharding=a.sharding.spec), shapes
    )
    return jax.lax.scan(add, total, parts)[0]


def count_parts(example: Example, most: int | None, most_tokens: int | None, layout: Layout) -> int:
    """Fewest equal parts of an example, of all its batches, that the devices can share.

    Args:
      example: rows of one length in each of its batches.
      most: rows of the first batch in a part; None: the example is one part.
      most_tokens: tokens in a part, which bound it too where rows may be longer than those that
        `most` counts; None: nothing else bounds it.

    Raises:
      UserError: the batches do not divide into such parts.
    """
    if most is None:
        return 1
    rows = math.gcd(*(len(batch.tokens) for batch in batches(example)))
    bounds = [rows * most // count_rows(example)]
    if most_tokens is not None:
        bounds.append(rows * most_tokens // count_tokens(example))
    return count_microbatches(rows, min(bounds), layout)


def count_microbatches(rows: int, most: int | None, layout: Layout) -> int:
    """Fewest equal parts of at most `most` rows that the devices can share.

    Raises:
      UserError: the rows do not divide among the devices, or not into parts so small.
    """
    if most is None:
        return 1
    shards = axis_size(*layout.axes("batch"))
    for number in range(-(-rows // most), rows // shards + 1) if most else ():
        if rows % (number * shards) == 0:
            return number
    raise UserError(
        f"a batch of {rows} rows does not divide into parts of at most {most} (the largest batch "
        f"over accumulation) on mesh.data x mesh.fsdp x mesh.expert = {shards} devices"
    )


def without_fsdp(a: jax.Array) -> jax.Array:
    """The array gathered over `fsdp`, and sharded as before over every other axis."""
    spec = jax.typeof(a).sharding.spec
    return jax.reshard(a, PartitionSpec(*(None if entry == "fsdp" else entry for entry in spec)))


def scattered(gradients: dict, params: dict) -> dict:
    """Gradients sharded as the parameters are."""
    return jax.tree.map(lambda g, p: jax.reshard(g, jax.typeof(p).sharding.spec), gradients, params)
