"""Layers whose windows follow a pattern: how they are cut, and that the cuts change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import replace
from lmjax.generation import Generator, Sampling
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    TransformerConfig,
    initialize,
    make_cache,
    plain_batch,
)
from lmjax.models.stretches import Stretch, pattern, stretches
from lmjax.parallel import Mesh, generation_layout, training_layout

WINDOWS = st.lists(st.sampled_from([None, 3, 5]), min_size=1, max_size=30)


@given(windows=WINDOWS)
def test_stretches_are_the_layers_in_order(windows):
    """One after another they give every layer's window; what is no period's repetition is short."""
    found = stretches(windows)
    laid_out = [window for stretch in found for window in stretch.windows * stretch.periods]
    assert laid_out == windows
    assert all(len(stretch.windows) == 1 for stretch in found if stretch.periods == 1)


@given(windows=WINDOWS, times=st.integers(2, 5), rest=st.integers(0, 29))
def test_a_repeated_pattern_is_compiled_once(windows, times, rest):
    """Whatever its length, and however many layers follow its last whole repetition."""
    layers = windows * times + windows[: rest % len(windows)]
    (first, *_) = stretches(layers)
    assert first.layers >= times * len(windows)
    assert len(first.windows) <= len(windows)
    short = pattern(layers)
    assert [short[n % len(short)] for n in range(len(layers))] == layers
    assert len(short) <= len(windows)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([None] * 28 + [4] * 4, (Stretch((None,), 28), Stretch((4,), 4))),  # Qwen2
        ([4, None] * 12 + [4], (Stretch((4, None), 12), Stretch((4,), 1))),  # Gemma 2, odd
        (
            ([4] * 5 + [None]) * 4 + [4, 4],  # Gemma 3
            (Stretch((4, 4, 4, 4, 4, None), 4), Stretch((4,), 2)),
        ),
        ([1, 2, 3], (Stretch((1,), 1), Stretch((2,), 1), Stretch((3,), 1))),
    ],
)
def test_patterns_of_public_models(windows, expected):
    assert stretches(windows) == expected


# Two stretches: windows in turn, and one that is left.
CONFIG = TransformerConfig(
    vocab_size=61,
    hidden=16,
    num_layers=5,
    max_length=32,
    attention=AttentionConfig(num_heads=2, head_dim=8, windows=(3, None, 3, None, 5)),
    feed_forward=FeedForwardConfig(size=32),
)
TOKENS = np.random.default_rng(0).integers(0, 61, (8, 12)).astype(np.int32)


def placed(layout):
    """The tokens as a batch on the mesh that is set."""
    sharding = jax.NamedSharding(
        jax.sharding.get_mesh(), layout.spec("batch", "seq", shape=TOKENS.shape)
    )
    return jax.tree.map(lambda a: jax.device_put(a, sharding), plain_batch(TOKENS))


def loss_and_gradients(config):
    """With dropout, which has a key of its own in each layer."""
    graph, params = initialize(config, training_layout(), jax.random.key(1))

    @jax.jit
    def run(params, batch):
        model = nnx.merge(graph, params)
        return jnp.sin(model(batch, key=jax.random.key(3))[0]).mean()

    return jax.device_get(jax.value_and_grad(run)(params, placed(training_layout())))


@pytest.mark.slow
def test_training_is_that_of_layers_apart(one_device):
    """Scanned in stretches, recomputed, cut over a mesh: as in a plain Python loop.

    1e-5 of the largest gradient: float32 sums in other orders, through five layers and back.
    """
    config = replace(CONFIG, dropout=0.1)
    assert len(config.stretches) == 2
    expected = loss_and_gradients(replace(config, unroll=0))
    found = loss_and_gradients(replace(config, remat="full"))
    with jax.set_mesh(Mesh(data=2, fsdp=2, tensor=2).build()):
        cut = loss_and_gradients(config)
    largest = max(np.abs(gradient).max() for gradient in jax.tree.leaves(expected[1]))
    for other in (found, cut):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest),
            other,
            expected,
        )


@pytest.mark.parametrize("unstack", [False, True], ids=["scanned", "apart"])
def test_a_cache_gives_the_tokens_of_no_cache(one_device, unstack):
    """Longer than every window, so that each ring goes round."""
    graph, params = initialize(CONFIG, generation_layout(), jax.random.key(2))
    prompts = [row.tolist() for row in TOKENS[:2]]
    generator = Generator(CONFIG, params, unstack=unstack)
    found = generator.generate(prompts, Sampling(temperature=0), 6)

    @jax.jit
    def logits(batch):
        model = nnx.merge(graph, params)
        return model.logits(model(batch)[0])[..., :61]

    rows = np.array([prompt + tokens for prompt, tokens in zip(prompts, found)], np.int32)
    best = np.argmax(np.asarray(logits(plain_batch(rows))), axis=-1)
    assert best[:, 11:-1].tolist() == found


def test_depth_adds_nothing_to_compile(one_device):
    """A pattern of two and one more layer: as many matrix products for 5 layers as for 25."""

    def products(layers):
        attention = replace(CONFIG.attention, windows=(3, None))
        config = replace(CONFIG, num_layers=layers, attention=attention)
        graph, params = initialize(config, generation_layout(), jax.random.key(2))
        cache = make_cache(config, generation_layout(), len(TOKENS), 16)

        def run(params, batch, cache):
            return nnx.merge(graph, params)(batch, cache)

        program = jax.make_jaxpr(run)(params, placed(generation_layout()), cache)
        return str(program).count("dot_general[")

    assert products(5) == products(25)
