"""Numbers that training adds up over many steps, stored in bfloat16 by stochastic rounding.

bfloat16 tells numbers apart that differ by a part in 256. An update of a weight by its thousandth,
or of a running mean that decays by 0.999, is rounded away every time where numbers are rounded to
the nearest, and the sum stands still. Rounded up or down by chance, with probabilities by the
distances, the mean of what is stored is the exact sum (Gupta et al. 2015, arXiv:1502.02551;
Zamirai et al. 2020, arXiv:2010.06192). All arithmetic is in float32: only what is kept from step to
step has 16 bits.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, Float32, Int, PRNGKeyArray, PyTree

Stored = Literal["float32", "bfloat16"]


def round_by_chance(x: Float32[Array, "..."], key: PRNGKeyArray) -> BFloat16[Array, "..."]:
    """x in bfloat16: one of its two neighbours, the nearer one more often; the mean is x.

    The same on any mesh. What bfloat16 holds exactly stays as it is; infinities and NaN do too.
    """
    sharding = jax.typeof(x).sharding
    where = {} if sharding.mesh.empty else {"out_sharding": sharding.spec}
    chance = jax.random.bits(key, x.shape, jnp.uint16, **where).astype(jnp.uint32)
    # The lower 16 bits of float32 are what bfloat16 lacks: they carry over with their probability.
    carried = jax.lax.bitcast_convert_type(x, jnp.uint32) + chance
    cut = jax.lax.bitcast_convert_type(carried & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def stored(tree: PyTree, dtype: Stored, key: PRNGKeyArray) -> PyTree:
    """A tree as it is kept from step to step: its float32 arrays, but for numbers, in `dtype`."""
    if dtype == "float32":
        return tree
    leaves, structure = jax.tree.flatten(tree)
    kept = [
        round_by_chance(leaf, jax.random.fold_in(key, number)) if _is_rounded(leaf) else leaf
        for number, leaf in enumerate(leaves)
    ]
    return structure.unflatten(kept)


def exact(tree: PyTree) -> PyTree:
    """The opposite of `stored`: bfloat16 in float32."""

    def one(leaf: Array) -> Array:
        return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf

    return jax.tree.map(one, tree)


class StoredState(NamedTuple):
    """State of a transformation whose arrays are stored in bfloat16."""

    count: Int[Array, ""]
    inner: PyTree


def stored_in(
    inner: optax.GradientTransformation, dtype: Stored, rounds: int = 0
) -> optax.GradientTransformation:
    """A transformation whose state is stored in `dtype` between its steps.

    Args:
      inner: what computes in float32.
      dtype: of its arrays; counts stay as they are.
      rounds: number that tells its random numbers from those of another one.
    """
    if dtype == "float32":
        return inner

    def kept(state: PyTree, count: Int[Array, ""]) -> StoredState:
        key = jax.random.fold_in(jax.random.key(rounds), count)
        return StoredState(count, stored(state, dtype, key))

    def init(params: PyTree) -> StoredState:
        return kept(inner.init(params), jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: StoredState, params: PyTree | None = None
    ) -> tuple[PyTree, StoredState]:
        updates, new = inner.update(updates, exact(state.inner), params)
        return updates, kept(new, state.count + 1)

    return optax.GradientTransformation(init, update)


def _is_rounded(leaf: Float[Array, "..."]) -> bool:
    return leaf.dtype == jnp.float32 and leaf.ndim > 0
