"""Cross-entropy as the formula says it: all logits at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.softcap import softcap_scores


def reference(
    hidden: Float[Array, "batch seq embed"],
    head: Float[Array, "rows embed"],
    targets: Int[Array, "batch seq"],
    *,
    vocabulary: int,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Float[Array, "batch seq"], ...]:
    """-log p(target), log Z, the largest logit and the mean logit, all float32."""
    logits = scale * jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
    logits, _ = softcap_scores(logits, softcap)
    words = jax.lax.broadcasted_iota(jnp.int32, (1, 1, head.shape[0]), 2)
    logits = jnp.where(words < vocabulary, logits, -1e30)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A comparison, since gathering from a sharded vocabulary is no legal program.
    label = jnp.sum(jnp.where(words == targets[..., None], logits, 0.0), axis=-1)
    mean = jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
    return log_z - label, log_z, jnp.max(logits, axis=-1), mean
