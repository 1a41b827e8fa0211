"""Mixtures of experts as ONNX operators: each expert computes the rows that are routed to it.

So one new token reads the weights of its own experts alone, as in a runtime that knows mixtures.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lmjax.interop.onnx_graph import Graph, Value, cannot
from lmjax.interop.onnx_products import Weights
from lmjax.models.experts import ExpertsConfig
from lmjax.models.routing import TopKRouter


def check_experts(config: ExpertsConfig, continued: bool) -> None:
    """Raises UserError for a mixture that an ONNX file cannot have.

    Args:
      config: of the mixture.
      continued: whether the model continues texts: then no token is dropped, whatever the capacity.
    """
    if type(config) is not ExpertsConfig:
        raise cannot("feed_forward", config)
    if type(config.router) is not TopKRouter or (config.router.drops and not continued):
        raise cannot("feed_forward.router", config.router)


def routed(router: TopKRouter, weights: Weights, rows: Value) -> tuple[Value, Value]:
    """Numbers of the experts of each row, and the weights of their outputs [rows, chosen]."""
    graph = weights.graph
    logits = graph.op("MatMul", rows, weights.part("router").weight("weight"))
    shares, count = graph.op("Softmax", logits, axis=-1), graph.constant(np.array([router.chosen]))
    dtypes = np.float32, np.int64
    shares, numbers = graph.op("TopK", shares, count, outputs=2, dtype=dtypes, axis=-1)
    if router.normalise:
        shares = shares / total(graph, shares)
    return numbers, shares


def mixture(
    config: ExpertsConfig, weights: Weights, x: Value, feed: Callable[[Value, int], Value]
) -> Value:
    """The sum over the experts of a token of weight times expert(x), without a shared expert.

    Args:
      config: of the mixture.
      weights: of the layer.
      x: [batch, seq, width].
      feed: (rows, number of an expert) -> what it makes of them.
    """
    graph = weights.graph
    rows = graph.op("Flatten", x, axis=2)
    numbers, shares = routed(config.router, weights, rows)
    shape = graph.op("Shape", rows, dtype=np.int64)
    out = graph.op("ConstantOfShape", shape, dtype=np.float32)
    for expert in range(config.experts):
        with graph.scope(f"experts.{expert}"):
            chosen = graph.op("Equal", numbers, graph.constant(np.array(expert)), dtype=bool)
            share = total(graph, shares * chosen.cast(np.float32))
            found = graph.op("NonZero", share.reshape(-1), dtype=np.int64).reshape(-1)
            given = feed(graph.op("Gather", rows, found), expert)
            given = given * graph.op("Gather", share, found)
            out = graph.op("ScatterND", out, found.expand(-1), given, reduction="add")
    return graph.op("Reshape", out, graph.op("Shape", x, dtype=np.int64))


def total(graph: Graph, shares: Value) -> Value:
    """Sum over the last axis, which stays."""
    return graph.op("ReduceSum", shares, graph.constant(np.array([-1])), keepdims=1)
