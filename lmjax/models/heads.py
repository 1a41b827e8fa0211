"""Heads of encoders: a transform before the word head, and a classifier."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lmjax.config import config
from lmjax.models.feed_forward import Activation, activate
from lmjax.models.linear import Builder, LinearLayer
from lmjax.models.norms import NormConfig


@config
class HeadTransformConfig:
    """A dense layer, an activation and a norm before the head, whose rows have biases (BERT)."""

    activation: Activation = "gelu"  # behind the dense layer


@config
class ClassifierConfig:
    """Classes of a whole row, from a dense layer and tanh over its first token (BERT's pooler)."""

    classes: int = 2  # BERT: the second sentence follows the first, or does not


class HeadTransform(nnx.Module):
    """norm(activation(dense(x)))."""

    def __init__(self, config: HeadTransformConfig, norm: NormConfig, builder: Builder):
        self.config = config
        hidden = builder.hidden
        self.dense = builder.linear((("embed", hidden),), ((None, hidden),), bias=True)
        self.norm = norm.build(hidden)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        return self.norm(activate(self.config.activation, self.dense(x)))


class Classifier(nnx.Module):
    """classes(tanh(pooler(first token)))."""

    def __init__(self, config: ClassifierConfig, builder: Builder):
        self.layout = builder.layout
        embed = (("embed", builder.hidden),)
        self.pooler = builder.linear(embed, ((None, builder.hidden),), bias=True)
        self.classes = builder.linear(embed, ((None, config.classes),), bias=True)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch classes"]:
        first = self.layout.reshard(x, "batch", None, None)[:, 0]
        pooled = jnp.tanh(rows_product(self.pooler, first))
        return rows_product(self.classes, pooled).astype(jnp.float32)


def rows_product(
    layer: LinearLayer, x: Float[Array, "batch *texts in"]
) -> Float[Array, "batch *texts out"]:
    """A dense layer on one vector a row, or a few, which no device has to share with others."""
    weight = layer.layout.reshard(layer.float_weight().astype(layer.dtype), None, None)
    out = jnp.einsum("b...i,io->b...o", x, weight)
    return out if layer.bias is None else out + layer.bias[...].astype(layer.dtype)
