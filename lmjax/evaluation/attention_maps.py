"""Attention maps: the attention probabilities of each head of a model on a text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lmjax.config import UserError
from lmjax.models import Batch, Transformer, check_tokens
from lmjax.models.attention import Attention
from pallas_kernels.attention import Mask


def attention_maps(
    graph: nnx.GraphDef, params: dict, batch: Batch
) -> Float[Array, "layers batch heads query key"]:
    """Probability with which each head of each layer reads each token, for every token.

    Runs layer by layer, uncompiled: meant for a look at a few short texts on one device.

    Raises:
      UserError: a model with an encoder beside its decoder, or with two streams; tokens that it
        does not have.
    """
    model: Transformer = nnx.merge(graph, params)
    if type(model) is not Transformer:
        raise UserError(
            f"attention maps are of single stacks of blocks, not of {type(model).__name__}"
        )
    config = model.config
    check_tokens(jax.tree.map(np.asarray, batch), config.vocab_size)
    batch = jax.tree.map(jnp.asarray, batch)
    tables = model.tables(batch)
    block_graph, stacked = nnx.split(model.blocks)
    x, maps = model.embed(batch), []
    for layer in range(config.num_layers):
        entry, member = divmod(layer, config.group)
        block = nnx.merge(block_graph, jax.tree.map(lambda a, entry=entry: a[entry], stacked))
        block = block if config.group == 1 else block.at(member)
        window = config.windows[layer]
        mask = batch.mask(config.attention.causal, window)

        def attend(x, block=block, mask=mask):
            maps.append(_probabilities(block.attention, x, mask, tables))
            return block.attention(x, mask, tables)[0]

        def feed(x, block=block, mask=mask):
            return block.feed(x, mask, None, None)

        x = config.arrangement.apply(x, block.norms, attend, feed)
    return jnp.stack(maps)


def _probabilities(layer: Attention, x: jax.Array, mask: Mask, tables) -> jax.Array:
    """Attention over the rows of a unit matrix in place of the values is the probabilities."""
    query, key, _ = layer.heads(x, tables)
    batch, length, kv_heads, _ = key.shape
    unit = jnp.broadcast_to(jnp.eye(length)[:, None], (batch, length, kv_heads, length))
    return jnp.moveaxis(layer.attend(query, key, unit.astype(query.dtype), mask, tables.bias), 1, 2)
