"""Attention maps against the formula, written out in numpy."""

import jax
import numpy as np
import pytest

from lmjax.config import UserError
from lmjax.evaluation.attention_maps import attention_maps
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    TransformerConfig,
    initialize,
    plain_batch,
)
from lmjax.parallel import training_layout
from tests.larger import larger


def test_maps_of_the_first_layer_are_the_formula(one_device):
    """1e-6 absolute on probabilities in float32."""
    config = TransformerConfig(
        vocab_size=50,
        hidden=16,
        num_layers=2,
        max_length=8,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, windows=(3, None)),
        feed_forward=FeedForwardConfig(size=32),
    )
    graph, params = initialize(config, training_layout(), jax.random.key(0))
    params = larger(params, 10)  # far from uniform
    tokens = np.array([[3, 1, 4, 1, 5, 9]])
    maps = np.asarray(attention_maps(graph, params, plain_batch(tokens)))
    assert maps.shape == (2, 1, 4, 6, 6)

    layer = jax.tree.map(lambda a: np.asarray(a[0], np.float64), params["blocks"])
    x = params["embedding"]["table"][tokens[0]] + params["positions"]["table"][:6]
    x = np.asarray(x, np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * layer["attention_norm"]["scale"] + layer["attention_norm"]["bias"]
    project = lambda part: (  # noqa: E731
        np.einsum("te,ehd->thd", x, layer["attention"][part]["weight"])
        + layer["attention"][part]["bias"]
    )
    query, key = project("query"), np.repeat(project("key"), 2, axis=1)
    scores = np.einsum("thd,shd->hts", query, key) / 2
    distance = np.arange(6)[:, None] - np.arange(6)
    scores[:, (distance < 0) | (distance >= 3)] = -np.inf
    expected = np.exp(scores - scores.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(maps[0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-6)
    with pytest.raises(UserError, match=r"tokens\[0, 1\] of the batch is 50; .* 0 to 49"):
        attention_maps(graph, params, plain_batch(np.array([[1, 50]])))
