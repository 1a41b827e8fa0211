"""Weights with their outputs first: the same numbers, where products of a few rows are faster."""

import jax
import numpy as np
import pytest

from lmjax.config import replace
from lmjax.generation import Generator
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    Quantization,
    TransformerConfig,
    decoding_layout,
    initialize,
)
from lmjax.models.few_rows import MOST_SECOND, product_by_outputs
from lmjax.parallel import Mesh, generation_layout

TINY = TransformerConfig(
    vocab_size=64,
    hidden=16,
    num_layers=2,
    max_length=16,
    attention=AttentionConfig(num_heads=2, head_dim=4),
    feed_forward=FeedForwardConfig(size=24),
)


@pytest.mark.parametrize("rows", [1, 3, MOST_SECOND + 1])
def test_products_against_numpy(rows):
    draw = np.random.default_rng(rows)
    x, weight = (draw.standard_normal((n, 40), np.float32) for n in (rows, 24))
    found = jax.jit(product_by_outputs)(x, weight)
    # Sums of 40 products of numbers around 1 in float32.
    np.testing.assert_allclose(found, x.astype(float) @ weight.astype(float).T, atol=1e-5)


def test_generators_have_them_and_give_parameters_back(one_device):
    _, params = initialize(TINY, generation_layout(), jax.random.key(0))
    generator = Generator(TINY, params)
    attention = generator.weights["blocks"][1]["attention"]
    given = params["blocks"]["attention"]
    for name, axes in (("query", (1, 2, 0)), ("output", (2, 0, 1))):
        wanted = np.transpose(given[name]["weight"][1], axes)
        np.testing.assert_array_equal(attention[name]["weight"], wanted)
    jax.tree.map(np.testing.assert_array_equal, generator.params, params)


def test_other_models_and_meshes_have_inputs_first(one_device):
    layout = generation_layout()
    assert decoding_layout(TINY, layout).outputs_first
    for other in (replace(TINY, dtype="bfloat16"), replace(TINY, quantization=Quantization())):
        assert decoding_layout(other, layout) == layout
    with jax.set_mesh(Mesh(tensor=2).build(jax.devices()[:2])):
        assert decoding_layout(TINY, layout) == layout
