"""Heads on labels beside plain formulas: padding, packed texts, several heads, meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.models import (
    AttentionConfig,
    Batch,
    FeedForwardConfig,
    Rotary,
    SpanHeadConfig,
    TextHeadConfig,
    TokenHeadConfig,
    TransformerConfig,
    abstract,
    initialize,
    plain_batch,
)
from lmjax.models.label_heads import text_states
from lmjax.objectives import Example
from lmjax.parallel import Mesh, training_layout
from lmjax.scaling.flops import forward_flops_per_token
from lmjax.training.placement import to_devices

HEADS = (
    TextHeadConfig(name="reward", outputs=1, bias=False),
    TextHeadConfig(name="topic", outputs=3, labels=("a", "b", "c"), token="first", pooler=True),
    TokenHeadConfig(name="tag", outputs=4),
    SpanHeadConfig(name="answer"),
)
MODEL = TransformerConfig(
    vocab_size=31,
    hidden=16,
    num_layers=1,
    max_length=12,
    attention=AttentionConfig(num_heads=2, head_dim=8, positions=Rotary()),
    feed_forward=FeedForwardConfig(size=32),
    positions=None,
    heads=HEADS,
)
LENGTH, ROWS = 12, 4


@functools.cache
def made():
    """Structure and parameters on one device; biases are no zeros."""
    graph, params = initialize(MODEL, training_layout(), jax.random.key(0))
    for number, (name, head) in enumerate(sorted(params["heads"].items())):
        draw = np.random.default_rng(number)
        params["heads"][name] = jax.tree.map(
            lambda a, draw=draw: jnp.asarray(draw.normal(size=a.shape), a.dtype), head
        )
    return graph, params


@functools.cache
def compiled(texts):
    graph = made()[0]

    def run(params, batch):
        model = nnx.merge(graph, params)
        hidden, _ = model(batch)
        found = {head.name: model.outputs(head.name, hidden, batch, texts) for head in HEADS}
        return hidden, found

    return jax.jit(run)


def outputs_of(batch, texts=1):
    hidden, found = compiled(texts)(made()[1], batch)
    return np.asarray(hidden), {name: np.asarray(value) for name, value in found.items()}


def packed(texts, draw, left=False):
    """A row of texts one after another; the rest is padding with random tokens."""
    size = sum(map(len, texts))
    tokens = draw.integers(0, 31, LENGTH).astype(np.int32)
    segments, positions = np.zeros((2, LENGTH), np.int32)
    first = LENGTH - size if left else 0
    for number, text in enumerate(texts):
        here = slice(first, first + len(text))
        tokens[here], segments[here], positions[here] = text, number + 1, np.arange(len(text))
        first += len(text)
    return Batch(tokens=tokens, positions=positions, segments=segments)


def stacked(rows):
    return jax.tree.map(lambda *parts: np.stack(parts), *rows)


def test_outputs_are_those_of_the_formula(one_device):
    """In float64, from the model's own hidden states; 1e-5 is float32 of sums of 16 numbers."""
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, 31, size) for size in (5, 12, 1, 7)]
    batch = stacked([packed([text], draw) for text in texts])
    hidden, found = outputs_of(batch)
    weights = jax.tree.map(lambda a: np.asarray(a, np.float64), made()[1]["heads"])
    last = np.stack([hidden[row, len(text) - 1] for row, text in enumerate(texts)])
    pooler, classes = weights["topic"]["pooler"], weights["topic"]["outputs"]
    pooled = np.tanh(hidden[:, 0] @ pooler["weight"] + pooler["bias"])
    expected = {
        "reward": (last @ weights["reward"]["outputs"]["weight"])[:, None],
        "topic": (pooled @ classes["weight"] + classes["bias"])[:, None],
        **{
            name: hidden @ weights[name]["outputs"]["weight"] + weights[name]["outputs"]["bias"]
            for name in ("tag", "answer")
        },
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_a_text_has_one_score_wherever_it_is(seed, left):
    """Alone, behind or before padding of any tokens, or packed with others.

    1e-5: attention of longer rows adds zeros in another order.
    """
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        draw = np.random.default_rng(seed)
        texts = [draw.integers(0, 31, size) for size in draw.integers(1, 5, 3)]
        alone = outputs_of(stacked([packed([text], draw) for text in texts]))[1]
        together = outputs_of(stacked([packed(texts, draw, left)] * 3), texts=4)[1]
    for name in ("reward", "topic"):
        for row in range(3):
            np.testing.assert_allclose(together[name][row, :3], alone[name][:, 0], atol=1e-5)
        bias = name == "topic"  # of a text without tokens it is all that there is
        assert np.isfinite(together[name][:, 3]).all() and bias == together[name][0, 3].any()


def test_masks_come_from_segments_and_never_from_tokens(one_device):
    """A padding token that is also in the text: transformers' rule would read the one before it."""
    text, padding = np.array([3, 9, 9]), np.full(9, 9)
    tokens = np.concatenate([text, padding])[None].astype(np.int32)
    segments = (np.arange(LENGTH) < 3).astype(np.int32)[None]
    batch = dataclasses.replace(plain_batch(tokens), segments=segments)
    hidden, _ = outputs_of(batch)
    states = text_states(training_layout(), jnp.asarray(hidden), jnp.asarray(segments), 1, "last")
    np.testing.assert_array_equal(states[0, 0], hidden[0, 2])


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2, "context": 2}], ids=str
)
def test_on_a_mesh(sizes):
    """1e-5: sums of hidden states in another order."""
    draw = np.random.default_rng(1)
    texts = [draw.integers(0, 31, size) for size in (5, 3)]
    batch = stacked([packed(texts, draw, row % 2) for row in range(ROWS)])
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        _, expected = outputs_of(batch, texts=2)
        params = jax.device_get(made()[1])
    with jax.set_mesh(Mesh(**sizes).build()):
        graph, shapes = abstract(MODEL, training_layout())
        params = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding.spec), params, shapes)
        batch = to_devices(Example(batch, None), training_layout(), 31).inputs

        @jax.jit
        def run(params, batch):
            model = nnx.merge(graph, params)
            hidden, _ = model(batch)
            return {head.name: model.outputs(head.name, hidden, batch, 2) for head in HEADS}

        found = run(params, batch)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)


def test_the_last_layer_is_computed_in_float32(one_device):
    config = replace(MODEL, dtype="bfloat16")
    graph, params = initialize(config, training_layout(), jax.random.key(0))

    @jax.jit
    def run(params, batch):
        model = nnx.merge(graph, params)
        hidden, _ = model(batch)
        return hidden, model.outputs("reward", hidden, batch)

    batch = plain_batch(np.arange(LENGTH)[None])
    hidden, found = run(params, batch)
    assert hidden.dtype == "bfloat16" and found.dtype == "float32"
    weight = np.asarray(params["heads"]["reward"]["outputs"]["weight"])
    expected = np.asarray(hidden, np.float32)[0, -1] @ weight
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-5)


def test_dropout_is_of_what_the_last_layer_reads(one_device):
    """With the same key the same outputs, with another one others, without one the plain ones."""
    config = replace(MODEL, heads=(TextHeadConfig(outputs=3, dropout=0.5),))
    graph, params = initialize(config, training_layout(), jax.random.key(0))
    model, batch = nnx.merge(graph, params), plain_batch(np.arange(LENGTH)[None])
    hidden, _ = model(batch)
    keys = [None, *jax.random.split(jax.random.key(1), 2)]
    found = [np.asarray(model.outputs("label", hidden, batch, key=key)) for key in keys]
    assert not any(np.array_equal(found[a], found[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    np.testing.assert_array_equal(found[1], model.outputs("label", hidden, batch, key=keys[1]))


def test_a_model_without_heads_has_their_parameters_nowhere(one_device):
    _, without = abstract(replace(MODEL, heads=()), training_layout())
    _, shapes = abstract(MODEL, training_layout())
    assert "heads" not in without and shapes.keys() - without.keys() == {"heads"}
    assert set(shapes["heads"]) == {head.name for head in HEADS}


def test_flops_count_heads_of_tokens(one_device):
    """A head of texts looks at one token of a row, which is as good as none."""
    base = forward_flops_per_token(replace(MODEL, heads=()), 12)
    assert forward_flops_per_token(replace(MODEL, heads=HEADS[:2]), 12) == base
    assert forward_flops_per_token(MODEL, 12) == base + 2 * 16 * (4 + 2)


def test_heads_that_cannot_be_meant():
    with pytest.raises(UserError, match="several of the name 'label'"):
        replace(MODEL, heads=(TextHeadConfig(), TokenHeadConfig()))
    with pytest.raises(UserError, match="letters, digits"):
        TextHeadConfig(name="a.b")
    with pytest.raises(UserError, match="3 labels for 2 outputs"):
        TokenHeadConfig(labels=("a", "b", "c"))
    with pytest.raises(UserError, match="a span has a start and an end"):
        SpanHeadConfig(outputs=3)
    graph, params = made()
    with pytest.raises(UserError, match=r"no head named 'score'.*reward"):
        nnx.merge(graph, params).outputs(
            "score", jnp.zeros((1, 12, 16)), plain_batch(np.zeros((1, 12), int))
        )
