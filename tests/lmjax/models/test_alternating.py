"""Dense and sparse layers in turn, against a loop over the layers that is written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.generation import Generator, Sampling
from lmjax.models import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    GatedFeedForwardConfig,
    Rotary,
    TopKRouter,
    TransformerConfig,
    initialize,
    make_cache,
    plain_batch,
    switch,
)
from lmjax.models.batch import Batch
from lmjax.models.upcycling import dense_model
from lmjax.parallel import training_layout
from tests.larger import larger

VOCABULARY = 61
CONFIG = TransformerConfig(
    vocab_size=VOCABULARY,
    hidden=16,
    num_layers=4,
    max_length=32,
    attention=AttentionConfig(num_heads=2, head_dim=8, positions=Rotary()),
    feed_forward=ExpertsConfig(size=24, experts=4),
    alternate_feed_forward=GatedFeedForwardConfig(size=40),
    positions=None,
)
# A pattern of six layers: that of three windows, and of two kinds.
WINDOWS = replace(
    CONFIG, num_layers=6, attention=replace(CONFIG.attention, windows=(3, None, None))
)
# One of two.
PAIRS = replace(CONFIG, attention=replace(CONFIG.attention, windows=(3, None)))
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 12)).astype(np.int32)


def made(config):
    """Structure and parameters; matrices are large, so that routers decide."""
    graph, params = initialize(config, training_layout(), jax.random.key(1))
    return graph, larger(params, 4, axes=3)


def in_a_loop(model, batch):
    """Hidden states, each layer taken out of its pair and run by itself."""
    config, batch = model.config, jax.tree.map(jnp.asarray, batch)
    graph, stacked = nnx.split(model.blocks)
    tables, x = model.tables(batch), model.embed(batch)
    for layer in range(config.num_layers):
        pair = nnx.merge(graph, jax.tree.map(lambda a, n=layer // 2: a[n], stacked))
        block = pair.second if layer % 2 else pair.first
        assert hasattr(block.feed_forward, "router") == bool(layer % 2)
        mask = batch.mask(config.attention.causal, config.windows[layer])
        x, _ = block(x, mask, tables, None, None)
    return model.final_norm(x)


@functools.cache
def looped(config):
    """Of the loop, which is the same however the model runs its blocks."""
    return value_and_gradients(config, in_a_loop)


def value_and_gradients(config, run):
    graph, params = made(config)

    @jax.jit
    def loss(params):
        hidden = run(nnx.merge(graph, params), plain_batch(TOKENS))
        return jnp.sum(jnp.sin(hidden))

    return jax.device_get(jax.value_and_grad(loss)(params))


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        pytest.param(CONFIG, dict(remat="full"), marks=pytest.mark.slow),
        (CONFIG, dict(unroll=0)),
        pytest.param(WINDOWS, {}, marks=pytest.mark.slow),
    ],
    ids=["recomputed", "apart", "windows"],
)
def test_values_and_gradients_are_those_of_a_loop(one_device, config, changes):
    """1e-5 of the largest gradient: float32 sums in other orders."""
    expected = looped(config)
    found = value_and_gradients(replace(config, **changes), lambda model, batch: model(batch)[0])
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest),
        found[1],
        expected[1],
    )


@pytest.mark.parametrize(
    ("config", "unstack"),
    [
        pytest.param(WINDOWS, False, id="scanned", marks=pytest.mark.slow),
        pytest.param(PAIRS, True, id="apart"),
    ],
)
def test_a_cache_gives_the_tokens_of_no_cache(one_device, config, unstack):
    graph, params = made(config)
    prompts = [row.tolist() for row in TOKENS]
    found = Generator(config, params, unstack=unstack).generate(prompts, Sampling(temperature=0), 6)

    @jax.jit
    def logits(batch):
        model = nnx.merge(graph, params)
        return model.logits(in_a_loop(model, batch))[..., :VOCABULARY]

    rows = np.array([prompt + tokens for prompt, tokens in zip(prompts, found)], np.int32)
    best = np.argmax(np.asarray(logits(plain_batch(rows))), axis=-1)
    assert best[:, 11:-1].tolist() == found


def test_an_encoder_and_a_decoder(one_device):
    """Both stacks of a Switch; without a capacity, which cached tokens do not have."""
    base = switch("base")
    router = TopKRouter(chosen=1, normalise=False)
    config = replace(
        base,
        vocab_size=VOCABULARY,
        hidden=16,
        num_layers=4,
        encoder_layers=2,
        attention=replace(base.attention, num_heads=2, head_dim=8),
        feed_forward=replace(base.feed_forward, size=24, experts=4, router=router),
        alternate_feed_forward=replace(base.alternate_feed_forward, size=24),
    )
    graph, params = made(config)
    model = nnx.merge(graph, params)
    encoder, decoder = plain_batch(TOKENS), plain_batch(TOKENS[:, ::-1].copy())
    batch = Batch(decoder.tokens, decoder.positions, decoder.segments, encoder=encoder)
    whole = jax.jit(lambda batch: model(batch)[0])(batch)
    assert jax.tree.leaves(params["encoder"]["blocks"])[0].shape[0] == 1
    assert jax.tree.leaves(params["blocks"])[0].shape[0] == 2

    cache = make_cache(config, training_layout(), 2, 16)
    cached, _ = jax.jit(lambda batch, cache: model(batch, cache))(batch, cache)
    np.testing.assert_allclose(cached, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_layers=5), "num_layers=5 with alternate_feed_forward: .* must be even"),
        (dict(alternate_feed_forward=ExpertsConfig()), "dense layer between mixtures"),
    ],
)
def test_layers_that_cannot_take_turns(changes, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **changes)


def test_a_dense_model_has_no_sparse_layers_to_copy_to():
    with pytest.raises(UserError, match="all of its layers become"):
        dense_model(CONFIG)
    assert replace(CONFIG, feed_forward=FeedForwardConfig()).group == 2
