"""Parts of a model as ONNX operators: one function for each, named as the part.

All of them take a `Weights`, which knows the parameters by their paths in the model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from lmjax.config import UserError
from lmjax.interop.onnx_experts import mixture
from lmjax.interop.onnx_graph import Value, cannot
from lmjax.interop.onnx_positions import TextTables, turned
from lmjax.interop.onnx_products import Weights
from lmjax.models import TransformerConfig, residual
from lmjax.models.attention import AttentionConfig
from lmjax.models.experts import ExpertsConfig
from lmjax.models.feed_forward import FeedForwardConfig, GatedFeedForwardConfig
from lmjax.models.norms import LayerNormConfig, NormConfig, RMSNormConfig

Past = tuple[Value, Value]  # keys and values [batch, kv_heads, tokens, head_dim]


def dense(weights: Weights, x: Value, inputs: int = 1) -> Value:
    """x . weight + bias, all axes but the rows' of x and of what it gives made one.

    Args:
      weights: of the layer.
      x: [batch, seq, in], its axes of inputs one.
      inputs: how many axes of the weight are inputs.
    """
    title, product = weights.title("weight"), weights.product

    def matrix() -> np.ndarray:
        array = weights.array("weight")
        return array.reshape(math.prod(array.shape[:inputs]), -1)

    out = product.rows(x, title, matrix)
    if "bias" in weights:
        bias = weights.array("bias").reshape(-1)
        out = out + weights.graph.weight(weights.title("bias"), bias)
    return out


def norm(config: NormConfig, weights: Weights, x: Value) -> Value:
    """The normalisation of the last axis."""
    if type(config) is LayerNormConfig:
        bias = weights.weight("bias") if "bias" in weights else None
        given = (x, weights.weight("scale")) + (() if bias is None else (bias,))
        return weights.graph.op("LayerNormalization", *given, axis=-1, epsilon=config.epsilon)
    if type(config) is not RMSNormConfig:
        raise cannot("norm", config)
    scale = weights.array("scale") + (1 if config.unit_offset else 0)
    mean = weights.graph.op("ReduceMean", x * x, weights.graph.constant(np.array([-1])), keepdims=1)
    root = weights.graph.op("Sqrt", mean + config.epsilon)
    return x / root * weights.graph.weight(weights.title("scale"), scale)


def activation(name: str, x: Value) -> Value:
    """The activation of this name."""
    if name in ("gelu", "gelu_tanh"):
        return x.graph.op("Gelu", x, approximate="tanh" if name == "gelu_tanh" else "none")
    if name == "relu":
        return x.graph.op("Relu", x)
    if name == "silu":
        return x * x.graph.op("Sigmoid", x)
    raise UserError(f"activation={name}: an ONNX file cannot have it")


def feed_forward(config: FeedForwardConfig, weights: Weights, x: Value) -> Value:
    """The plain or the gated feed-forward layer."""
    if config.reads_rows:
        return experts(config, weights, x)
    if type(config) not in (FeedForwardConfig, GatedFeedForwardConfig):
        raise cannot("feed_forward", config)
    up = dense(weights.part("up"), x)
    if type(config) is FeedForwardConfig:
        inner = activation(config.activation, up)
    else:
        inner = activation(config.activation, dense(weights.part("gate"), x)) * up
    return dense(weights.part("down"), inner)


def experts(config: ExpertsConfig, weights: Weights, x: Value) -> Value:
    """The mixture of experts, with the expert that all tokens use."""
    stacked = weights.part("experts")

    def feed(rows: Value, number: int) -> Value:
        return feed_forward(config.dense, stacked.of_expert(number), rows)

    out = mixture(config, weights, x, feed)
    if config.shared is not None:
        out = out + feed_forward(config.shared, weights.part("shared"), x)
    return out


def heads(weights: Weights, x: Value, count: int, scale: NormConfig | None, name: str) -> Value:
    """Queries, keys or values [batch, seq, heads, head_dim], each head through its norm."""
    found = dense(weights.part(name), x).reshape(0, 0, count, -1)
    return found if scale is None else norm(scale, weights.part(f"{name}_norm"), found)


def attention(
    config: AttentionConfig,
    weights: Weights,
    x: Value,
    tables: TextTables,
    window: int | None,
    past: Past | None,
) -> tuple[Value, Past]:
    """Self-attention, and the keys and values of all tokens so far."""
    per_head = config.query_key_norm
    query = heads(weights, x, config.num_heads, per_head, "query")
    keys = heads(weights, x, config.kv_heads, per_head, "key")
    values = heads(weights, x, config.kv_heads, None, "value")
    query, keys = turned(config, tables, query), turned(config, tables, keys)
    if tables.query_scale is not None:
        query = query * tables.query_scale
    query, keys, values = (a.transpose(0, 2, 1, 3) for a in (query, keys, values))
    if past is not None:
        graph = weights.graph
        keys, values = (
            graph.op("Concat", old, new, axis=2) for old, new in zip(past, (keys, values))
        )
    out = attend(config, weights, query, keys, values, tables.biases[window])
    return out, (keys, values)


def cross_attention(config: AttentionConfig, weights: Weights, x: Value, source: Past, bias: Value):
    """Attention of the decoder's tokens to those of an encoder."""
    query = heads(weights, x, config.num_heads, config.query_key_norm, "query")
    return attend(config, weights, query.transpose(0, 2, 1, 3), *source, bias)


def source(config: AttentionConfig, weights: Weights, states: Value) -> Past:
    """Keys and values of an encoder's states, for `cross_attention`."""
    keys = heads(weights, states, config.kv_heads, config.query_key_norm, "key")
    values = heads(weights, states, config.kv_heads, None, "value")
    return keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)


def attend(
    config: AttentionConfig, weights: Weights, query: Value, keys: Value, values: Value, bias: Value
) -> Value:
    """Softmax of the scores and their bias, the values that it weighs, and the output projection.

    The queries of a group are rows beside each other for their key head.
    """
    graph, group = weights.graph, config.num_heads // config.kv_heads
    scale = config.head_dim**-0.5 if config.scale is None else config.scale
    query = query * scale
    if group > 1:
        new = query.size(2)
        query = query.reshape(0, config.kv_heads, -1, config.head_dim)
    scores = graph.op("MatMul", query, keys.transpose(0, 1, 3, 2))
    if group > 1:  # as many heads as the bias has
        scores = reshaped(scores, 0, config.num_heads, new, -1)
    if config.softcap is not None:
        scores = graph.op("Tanh", scores / config.softcap) * config.softcap
    shares = graph.op("Softmax", scores + bias, axis=-1)
    if group > 1:
        shares = reshaped(shares, 0, config.kv_heads, -1, keys.size(2))
    out = graph.op("MatMul", shares, values)
    if group > 1:
        out = reshaped(out, 0, config.num_heads, new, config.head_dim)
    out = out.transpose(0, 2, 1, 3).reshape(0, 0, config.num_heads * config.head_dim)
    return dense(weights.part("output"), out, inputs=2)


def reshaped(x: Value, *sizes: int | Value) -> Value:
    """`Value.reshape` with sizes of which some are values."""
    parts = [
        size if isinstance(size, Value) else x.graph.constant(np.array([size])) for size in sizes
    ]
    return x.graph.op("Reshape", x, x.graph.op("Concat", *parts, axis=0, dtype=np.int64))


def block(
    config: TransformerConfig,
    weights: Weights,
    x: Value,
    tables: TextTables,
    past: Past | None = None,
    memory: tuple[Past, Value] | None = None,
) -> tuple[Value, Past]:
    """One block, and its keys and values.

    Args:
      config: of the model.
      weights: of the block.
      x: the residual stream.
      tables: of the positions.
      past: its keys and values so far.
      memory: of the decoder of an encoder, the encoder's keys and values and the bias that hides
        padding. Such a block is PreNorm (see `EncoderDecoderConfig`).
    """
    present, graph, window = None, weights.graph, config.windows[weights.layer]

    def attended(x: Value) -> Value:
        nonlocal present
        with graph.scope("attention"):
            out, present = attention(
                config.attention, weights.part("attention"), x, tables, window, past
            )
        return out

    def fed(x: Value) -> Value:
        with graph.scope("feed_forward"):
            return feed_forward(config.feed_forward, weights.part("feed_forward"), x)

    def normed(name: str) -> Callable[[Value], Value]:
        return functools.partial(norm, config.norm, weights.part(name))

    if memory is not None:
        x = x + attended(normed("attention_norm")(x))
        looked = normed("cross_attention_norm")(x)
        with graph.scope("cross_attention"):
            part = weights.part("cross_attention")
            x = x + cross_attention(config.attention, part, looked, *memory)
        return x + fed(normed("feed_forward_norm")(x)), present
    norms = {name: normed(name) for name in config.arrangement.norms}
    try:
        x = config.arrangement.apply(x, norms, attended, fed)
    except TypeError as error:
        if type(config.arrangement).__module__ == residual.__name__:
            raise
        # One of the user's own that does more than add and multiply.
        raise cannot("arrangement", config.arrangement) from error
    return x, present
