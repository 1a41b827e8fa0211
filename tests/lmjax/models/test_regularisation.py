"""Regularisation of a model in training: dropout by layer, noise on embeddings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax.config import replace
from lmjax.models import (
    AttentionConfig,
    Batch,
    FeedForwardConfig,
    TransformerConfig,
    abstract,
    initialize,
    plain_batch,
)
from lmjax.models.embedding_noise import KEY
from lmjax.parallel import Mesh, training_layout

MODEL = TransformerConfig(
    vocab_size=97,
    hidden=32,
    num_layers=3,
    max_length=16,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, windows=(None, 4)),
    feed_forward=FeedForwardConfig(size=64),
)
LENGTHS = 5, 8, 2  # of the documents of a row; one token of padding


def rows():
    """Two rows of packed documents."""
    tokens = np.random.default_rng(0).integers(0, 97, (2, 16)).astype(np.int32)
    segments = np.repeat([1, 2, 3, 0], [*LENGTHS, 1]).astype(np.int32)
    positions = np.concatenate([np.arange(length) for length in (*LENGTHS, 1)]).astype(np.int32)
    return Batch(
        tokens=tokens, positions=np.stack([positions] * 2), segments=np.stack([segments] * 2)
    )


def make(config):
    return initialize(config, training_layout(), jax.random.key(0))


@pytest.mark.parametrize("unroll", [1, 0], ids=["scanned", "python loop"])
def test_dropout_rises_by_layer_as_in_a_loop_over_uniform_blocks(one_device, unroll):
    """Each block of the loop is one of a model with that layer's rate alone; 1e-5 of float32."""
    graph, params = make(replace(MODEL, top_dropout=0.4, unroll=unroll))
    batch, key = plain_batch(np.arange(32).reshape(2, 16)), jax.random.key(7)
    got, _ = jax.jit(lambda p: nnx.merge(graph, p)(batch, key=key))(params)

    _, blocks_key = jax.random.split(key)
    keys = jax.random.split(blocks_key, MODEL.num_layers)

    @jax.jit
    def in_a_loop(params, batch):
        model = nnx.merge(graph, params)
        x, tables, mask = model.embed(batch), model.tables(batch), batch.mask(causal=True)
        for layer, rate in enumerate((0.0, 0.2, 0.4)):
            of_rate, _ = abstract(replace(MODEL, dropout=rate), training_layout())
            block_graph, stacked = nnx.split(nnx.merge(of_rate, params).blocks)
            block = nnx.merge(block_graph, jax.tree.map(lambda a, n=layer: a[n], stacked))
            windowed = dataclasses.replace(mask, window=MODEL.windows[layer])
            x, _ = block(x, windowed, tables, None, keys[layer])
        return model.final_norm(x)

    np.testing.assert_allclose(got, in_a_loop(params, batch), rtol=0, atol=1e-5)

    @jax.jit
    def in_two_parts(params, batch):
        model = nnx.merge(graph, params)
        model.frozen_blocks = 2
        return model(batch, key=key)[0]

    np.testing.assert_allclose(in_two_parts(params, batch), got, rtol=0, atol=1e-5)


def test_equal_ends_are_one_dropout_and_none_changes_nothing(one_device):
    """The same masks as of the plain setting: 1e-6, as the scale is computed in another order."""
    batch, key = plain_batch(np.arange(16)[None]), jax.random.key(1)

    def output(key, **changes):
        graph, params = make(replace(MODEL, **changes))
        return jax.jit(lambda p: nnx.merge(graph, p)(batch, key=key)[0])(params)

    np.testing.assert_allclose(
        output(key, dropout=0.2, top_dropout=0.2), output(key, dropout=0.2), rtol=0, atol=1e-6
    )
    rising = output(None, top_dropout=0.3, embedding_noise=5.0)
    np.testing.assert_array_equal(rising, output(None))


def noise_of(alpha, batch, mesh):
    """The difference that a key makes to the embeddings of a batch."""
    with jax.set_mesh(mesh):
        graph, params = make(replace(MODEL, embedding_noise=alpha))

        @jax.jit
        def difference(params):
            model = nnx.merge(graph, params)
            device = jax.tree.map(jnp.asarray, batch)
            return model.embed(device, jax.random.key(3)) - model.embed(device)

        return np.asarray(difference(params))


def test_noise_is_the_formula_of_each_document():
    """Uniform draws times alpha / sqrt(length width) in a loop over documents; 1e-6 of float32."""
    mesh = Mesh(fsdp=1).build(jax.devices()[:1])
    got = noise_of(5.0, rows(), mesh)
    key = jax.random.fold_in(jax.random.key(3), KEY)
    draws = np.asarray(jax.random.uniform(key, (2, 16, 32), minval=-1, maxval=1))
    expected, begin = np.zeros((2, 16, 32)), 0
    for length in LENGTHS:
        part = slice(begin, begin + length)
        expected[:, part] = draws[:, part] * 5.0 / np.sqrt(length * 32)
        begin += length
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
    # E |noise|^2 of a document is alpha^2 / 3 whatever its length; 256 numbers have 6 percent.
    assert np.square(got[:, 5:13]).sum() / 2 == pytest.approx(25 / 3, rel=0.2)


def test_noise_is_the_same_on_a_mesh():
    wide = Mesh(fsdp=2, tensor=4).build(jax.devices())
    one = Mesh(fsdp=1).build(jax.devices()[:1])
    np.testing.assert_allclose(
        noise_of(5.0, rows(), wide), noise_of(5.0, rows(), one), rtol=0, atol=1e-6
    )
    assert not noise_of(0.0, rows(), one).any()
