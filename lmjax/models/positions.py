"""Positions, in the two places where they act: on the embeddings, and in attention."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmjax.config import config


@config
class EmbeddingPositions:
    """Base of the positions that are added to the token embeddings."""


@config
class LearnedPositions(EmbeddingPositions):
    """A learned table with one row a position, added to the token embeddings."""


@config
class AttentionPositions:
    """Base of the positions that act on queries and keys."""


@config
class Rotary(AttentionPositions):
    """Rotary position embedding (Su et al. 2021), pairs (i, i + head_dim/2)."""

    base: float = 10_000.0  # wavelengths grow from 2 pi to 2 pi base

    def tables(
        self, positions: Int[Array, "batch seq"], head_dim: int
    ) -> tuple[Float[Array, "batch seq 1 half"], Float[Array, "batch seq 1 half"]]:
        """Cosines and sines of each position's angles, computed once for all layers."""
        exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
        angles = positions[..., None, None].astype(jnp.float32) * self.base**-exponents
        return jnp.cos(angles), jnp.sin(angles)

    @staticmethod
    def rotate(
        x: Float[Array, "batch seq heads head_dim"],
        tables: tuple[Float[Array, "batch seq 1 half"], Float[Array, "batch seq 1 half"]],
    ) -> Float[Array, "batch seq heads head_dim"]:
        """Rotates each pair of x by its position's angle, in float32."""
        cos, sin = tables
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate(
            [first * cos - second * sin, second * cos + first * sin], axis=-1
        ).astype(x.dtype)
