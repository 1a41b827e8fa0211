"""Log-probabilities and entropies from hidden states, against all logits and loops over rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax.alignment import log_probabilities, log_probabilities_and_entropy, sum_segments
from lmjax.alignment.rollouts import RolloutRows, inputs_of
from lmjax.config import UserError, replace
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.models.batch import Batch
from lmjax.models.initializers import Normal
from lmjax.parallel import Mesh, training_layout

MODEL = TransformerConfig(
    vocab_size=97,
    hidden=16,
    num_layers=2,
    max_length=16,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(size=32),
    tied_head=False,
    dropout=0.5,
    initializer=Normal(std=0.3),
)
ROWS, LENGTH = 4, 12
PROMPTS, ANSWERS = np.array([3, 1, 5, 4]), np.array([4, 7, 1, 0])


@functools.cache
def model_of(softcap=None):
    """A model whose distributions are far from flat."""
    return replace(MODEL, logit_softcap=softcap).build(training_layout(), nnx.Rngs(0))


def texts(seed, pad=0):
    """Tokens and lengths of rows, with an id of padding behind them."""
    tokens = np.random.default_rng(seed).integers(0, 97, (ROWS, LENGTH + 1)).astype(np.int32)
    ends = (PROMPTS + ANSWERS)[:, None]
    return np.where(np.arange(LENGTH + 1) < ends, tokens, np.int32(pad))


def answers_of(tokens):
    """Marks the positions whose next token is one of the answer, as rollouts do."""
    lengths = PROMPTS.astype(np.int32), ANSWERS.astype(np.int32)
    return inputs_of(RolloutRows(tokens[:, :-1], *lengths))[1].weights > 0


def batch_of(tokens, segments=None, positions=None):
    rows, length = tokens.shape
    positions = np.tile(np.arange(length), (rows, 1)) if positions is None else positions
    segments = np.ones(tokens.shape) if segments is None else segments
    return Batch(*(jnp.asarray(a, jnp.int32) for a in (tokens, positions, segments)))


def scored(model, *arrays, temperature=1.0):
    graph, params = nnx.split(model)
    return compiled(graph, temperature, params, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def compiled(graph, temperature, params, batch, targets):
    model = nnx.merge(graph, params)
    hidden, _ = model(batch)
    return (
        *log_probabilities_and_entropy(model, hidden, targets, temperature),
        log_probabilities(model, hidden, targets, temperature),
        model.logits(hidden),
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_against_all_logits(one_device, temperature, softcap):
    """In float64 from the model's logits: log softmax(z / T) and -sum p log p."""
    tokens = texts(0)
    model = model_of(softcap)
    batch, targets = batch_of(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    log_probs, entropy, alone, logits = scored(model, batch, targets, temperature=temperature)
    scaled = np.asarray(logits, np.float64)[..., :97] / temperature
    log_p = scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))
    expected = np.take_along_axis(log_p, tokens[:, 1:, None], axis=2)[..., 0]
    # float32 differences of numbers of the size of 10.
    np.testing.assert_allclose(log_probs, expected, atol=2e-5)
    np.testing.assert_allclose(entropy, -(np.exp(log_p) * log_p).sum(axis=-1), atol=2e-5)
    np.testing.assert_array_equal(log_probs, alone)


def test_rows_are_those_without_padding(one_device):
    """Whatever the lengths of prompts and answers, and whatever id the padding has."""
    model = model_of()
    mask = answers_of(texts(1))
    assert mask.sum() == ANSWERS.sum()
    found = []
    for pad in (0, 96):
        tokens = texts(1, pad)
        log_probs, *_ = scored(model, batch_of(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))
        found.append(np.sum(np.asarray(log_probs), axis=1, where=mask))
    np.testing.assert_array_equal(*found)
    for row in range(ROWS):
        end = PROMPTS[row] + ANSWERS[row]
        own = tokens[row : row + 1, :end]
        if ANSWERS[row]:
            log_probs, *_ = scored(model, batch_of(own[:, :-1]), jnp.asarray(own[:, 1:]))
            alone = log_probs[0, PROMPTS[row] - 1 :].sum()
            assert len(log_probs[0, PROMPTS[row] - 1 :]) == ANSWERS[row]
            np.testing.assert_allclose(found[0][row], alone, rtol=1e-5)
    assert found[0][3] == 0


def test_packed_answers_have_the_sums_that_they_have_alone(one_device):
    """Two texts in one row, of which the first has a prompt of 2 tokens and the second of 3."""
    model, tokens = model_of(), texts(2)[1:2, :11]
    segments = np.repeat([[1, 2]], [5, 6], axis=1)
    positions = np.concatenate([np.arange(5), np.arange(6)])[None]
    targets = jnp.asarray(np.roll(tokens, -1, axis=1))
    log_probs, *_ = scored(model, batch_of(tokens, segments, positions), targets)
    index = np.arange(11)
    mask = ((index >= 1) & (index < 4)) | ((index >= 7) & (index < 10))
    poisoned = jnp.where(mask, log_probs, jnp.nan)
    found = sum_segments(poisoned, jnp.asarray(mask[None]), jnp.asarray(segments), count=3)
    assert found.shape == (1, 3) and found[0, 2] == 0
    for number, part in enumerate((slice(0, 5), slice(5, 11))):
        own = tokens[:, part]
        alone, *_ = scored(model, batch_of(own[:, :-1]), jnp.asarray(own[:, 1:]))
        expected = alone[0, 1 + number :].sum()
        np.testing.assert_allclose(found[0, number], expected, rtol=1e-5)


def test_scoring_twice_gives_the_same_bits(one_device):
    """The model has dropout of one half; without a key there is none."""
    tokens = texts(3)
    given = model_of(), batch_of(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    np.testing.assert_array_equal(scored(*given)[0], scored(*given)[0])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf")])
def test_temperatures_that_are_none(one_device, temperature):
    hidden, tokens = jnp.zeros((1, 2, 16)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(UserError, match="must be above 0"):
        log_probabilities(model_of(), hidden, tokens, temperature)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, real or simulated")
def test_any_mesh_gives_the_numbers_of_one_device():
    """Rows over fsdp, tokens over context and the vocabulary over tensor."""
    found, tokens = [], texts(4)
    segments = np.ones((ROWS, LENGTH), np.int32), answers_of(tokens)
    for mesh in (Mesh(fsdp=1), Mesh(fsdp=2, context=2, tensor=2)):
        count = mesh.fsdp * mesh.context * mesh.tensor
        with jax.set_mesh(mesh.build(jax.devices()[:count])):
            layout = training_layout()
            model = MODEL.build(layout, nnx.Rngs(0))
            spread = lambda a, layout=layout: layout.reshard(jnp.asarray(a), "batch", "seq")  # noqa: E731
            batch = jax.tree.map(spread, batch_of(tokens[:, :-1]))
            log_probs, entropy, *_ = scored(model, batch, spread(tokens[:, 1:]))
            ones, mask = (layout.reshard(jnp.asarray(a), "batch", "seq") for a in segments)
            found.append(jax.device_get((sum_segments(log_probs, mask, ones, count=1), entropy)))
    for one, other in zip(*found):
        np.testing.assert_allclose(one, other, rtol=2e-5)
