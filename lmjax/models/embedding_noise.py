"""Noise on embeddings in training: NEFTune (Jain et al. 2023, arXiv:2310.05914)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lmjax.parallel.random import draw_rows

KEY = 0x2EF7  # what is folded into the key of the embeddings, whose dropout takes the key itself


def with_noise(
    x: Float[Array, "batch seq width"],
    segments: Int[Array, "batch seq"],
    alpha: float,
    key: PRNGKeyArray | None,
) -> Float[Array, "batch seq width"]:
    """Adds noise, uniform within +- alpha / sqrt(length width), to the embedding of each token.

    The length is that of the token's own document (segment), so that packing changes no amplitude;
    padding gets no noise. Each device draws its own part of one global array.

    Args:
      x: embeddings.
      segments: number of the document of each token; 0 is padding.
      alpha: amplitude; the paper takes 5 to 15.
      key: None adds nothing, and neither does an alpha of 0.
    """
    if key is None or alpha == 0:
        return x
    same = segments[:, :, None] == segments[:, None, :]
    lengths = jnp.sum(same, axis=2, dtype=jnp.float32)  # fused: no array of pairs is made
    amplitude = jnp.where(segments > 0, alpha * jax.lax.rsqrt(lengths * x.shape[2]), 0)
    key = jax.random.fold_in(key, KEY)
    draw = functools.partial(jax.random.uniform, key, dtype=x.dtype, minval=-1, maxval=1)
    noise = draw_rows(draw, x.shape, jax.typeof(x).sharding.spec)
    return x + (noise * amplitude[..., None]).astype(x.dtype)
