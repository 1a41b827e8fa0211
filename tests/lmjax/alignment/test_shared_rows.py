"""Replies that share their request: losses, gradients and scores are those of one a row."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.alignment import AnswerMean, ClippedPolicy, FixedLengthMean, TokenMean
from lmjax.alignment.critic import HEAD
from lmjax.alignment.rollouts import RolloutRows, Scorer, inputs_of, make_example, packed
from lmjax.alignment.row_packing import RowPacking, SharedRows
from lmjax.alignment.shared_rows import arrange, can_share, shared_rows
from lmjax.config import replace
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    TransformerConfig,
    bloom,
    initialize,
    llama,
    mistral,
    mixtral,
    qwen,
)
from lmjax.objectives import CausalLM, WeightedSum
from lmjax.objectives.weighted_sum import join_examples
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import to_devices

REQUESTS, SAMPLES, LONGEST, WORDS = 8, 3, (12, 10), 61
LENGTH, REPLIES = sum(LONGEST), REQUESTS * SAMPLES
GPT = TransformerConfig(
    vocab_size=WORDS,
    hidden=32,
    num_layers=2,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=2, head_dim=16),
    feed_forward=FeedForwardConfig(size=48),
)


def rope():
    """A LLaMA of the same size, with grouped heads."""
    model = llama("7B")
    attention = replace(model.attention, num_heads=4, num_kv_heads=2, head_dim=8)
    feed = replace(model.feed_forward, size=48)
    sizes = {"vocab_size": WORDS, "hidden": 32, "num_layers": 2, "max_length": LENGTH}
    return replace(model, **sizes, dtype="float32", attention=attention, feed_forward=feed)


def rollouts(requests=REQUESTS, samples=SAMPLES, seed=0):
    """Requests of 1 to 12 tokens, each with replies of 0 to 10."""
    random = np.random.default_rng(seed)
    first = random.integers(1, LONGEST[0] + 1, requests).repeat(samples)
    sizes = random.integers(0, LONGEST[1] + 1, requests * samples)
    sizes[0] = LONGEST[1]
    asked = random.integers(0, WORDS, (requests, LENGTH)).repeat(samples, axis=0)
    written = random.integers(0, WORDS, (requests * samples, LENGTH))
    index = np.arange(LENGTH)
    tokens = np.where(index < first[:, None], asked, written)
    tokens[index >= (first + sizes)[:, None]] = 0
    return RolloutRows(tokens.astype(np.int32), first.astype(np.int32), sizes.astype(np.int32))


def numbers(requests=REQUESTS, samples=SAMPLES):
    return np.arange(requests).repeat(samples)


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_each_reply_follows_its_request(requests, samples, multiple, seed):
    """What a target's position may see, in its order, is the text before the target."""
    batch, targets = inputs_of(rollouts(requests, samples, seed))
    order = np.random.default_rng(seed).permutation(requests * samples)
    batch, targets = jax.tree.map(lambda a: a[order], (batch, targets))
    written = targets.weights > 0
    found = shared_rows(written, numbers(requests, samples)[order], LONGEST, multiple)
    own = found.pack_batch(batch)
    assert found.rows % multiple == 0 and own.tokens.shape == (found.rows, found.length)
    following = found.pack(targets.tokens)
    np.testing.assert_array_equal(found.unpack(following, LENGTH)[written], targets.tokens[written])
    assert np.count_nonzero(found.pack(targets.weights)) == written.sum()
    place = found.pack(np.arange(written.size).reshape(written.shape))
    shared, length = own.branches
    column = np.arange(found.length)
    for row, target in np.argwhere(found.pack(targets.weights)):
        text, index = divmod(place[row, target], LENGTH)
        query = target + shared
        near = (column < shared) | ((column - shared) // length == target // length)
        seen = near & (column <= query) & (own.segments[row] == own.segments[row, query])
        np.testing.assert_array_equal(own.tokens[row, seen], batch.tokens[text, : index + 1])
        np.testing.assert_array_equal(own.positions[row, seen], np.arange(index + 1))


def share(example, layout, most=REPLIES * LENGTH):
    written = example.targets.answers.weights > 0
    found = arrange(example.inputs, written, numbers(), LONGEST, layout, most)
    assert isinstance(found, SharedRows)
    return packed(example, found)


CASES = {
    "gpt": (GPT, TokenMean(), {"fsdp": 1}, 1),
    "rope": (rope(), AnswerMean(), {"fsdp": 1}, 2),
    "mesh": (GPT, FixedLengthMean(length=10), {"fsdp": 2, "tensor": 2}, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_shared_replies_have_the_loss_and_gradients_of_one_a_row(name):
    """Sums over tokens in another order, of float32 around 1; 1e-6 of the largest gradient."""
    model, average, mesh, accumulation = CASES[name]
    model = replace(model, heads=(HEAD,))
    rows, random = rollouts(), np.random.default_rng(1)
    policy, reference, advantages, *critic = random.normal(-4, 1, (5, REPLIES, LENGTH)).astype("f")
    example = make_example(rows, policy, reference, advantages, tuple(critic))
    objective = ClippedPolicy(average=average, kl=0.1, entropy=0.01)

    def gradients(mesh, shared):
        devices = int(np.prod([*mesh.values()]))
        with jax.set_mesh(Mesh(**mesh).build(jax.devices()[:devices])):
            layout, given, bounds = training_layout(), example, {}
            if shared:
                most = REPLIES * LENGTH // accumulation
                bounds = {"microbatch": REPLIES // accumulation, "microbatch_tokens": most}
                given = share(example, layout, most)
            learner = Learner(model, objective, AdamW(), lambda step: 1e-2, layout, **bounds)
            state = learner.init(0)
            given = to_devices(given, layout, WORDS)
            return jax.device_get(jax.jit(learner.gradients)(state, given, state.key))

    expected, sums = gradients({"fsdp": 1}, False)
    found, others = gradients(mesh, True)
    assert sums.weight == others.weight == rows.reply_lengths.sum()
    for one, other in ((sums.loss, others.loss), *zip(sums.extra.values(), others.extra.values())):
        np.testing.assert_allclose(other, one, rtol=2e-6, atol=2e-6)
    top = max(np.max(np.abs(d)) for d in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * top), found, expected
    )


def test_shared_replies_are_scored_as_one_a_row(one_device):
    """Log-probabilities and values, to float32's rounding; some rows at a time."""
    rows, layout, model = rollouts(), training_layout(), replace(GPT, heads=(HEAD,))
    batch, targets = inputs_of(rows)
    _, params = initialize(model, layout, jax.random.key(0))
    scorer, written, most = Scorer(model, layout, 0.7, True), targets.weights > 0, 8 * LENGTH
    alone = RowPacking.one_each(rows.request_lengths + rows.reply_lengths, LENGTH)
    shared = arrange(batch, written, numbers(), LONGEST, layout, most)
    assert isinstance(shared, SharedRows) and shared.rows * shared.length < REPLIES * LENGTH
    expected, found = (scorer.score(params, rows, way, most) for way in (alone, shared))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[written], other[written], rtol=0, atol=2e-6)


def test_text_beside_shared_replies_is_cut_as_they_are(one_device):
    """Six rows, into three parts."""
    rows, layout = rollouts(), training_layout()
    zeros = np.zeros((3, REPLIES, LENGTH), np.float32)
    most = REPLIES * LENGTH // 3
    replies = share(make_example(rows, *zeros), layout, most)
    both = WeightedSum(objectives=(ClippedPolicy(), CausalLM()), weights=(1.0, 27.8))
    bounds = {"microbatch": REPLIES // 3 + 2, "microbatch_tokens": most + 2 * 24}
    learner = Learner(GPT, both, AdamW(), lambda step: 1e-2, layout, **bounds)
    example = to_devices(join_examples([replies, CausalLM().shapes(6, 22)]), layout, WORDS)
    found, _ = jax.eval_shape(learner.gradients, learner.abstract(), example, jax.random.key(0))
    assert jax.tree.structure(found) == jax.tree.structure(learner.abstract().params)


def test_replies_that_gain_nothing_stay_packed(one_device):
    """Four texts of one token and ten fill a row; and where each has a request of its own."""
    rows = rollouts()
    one, ten = np.ones(REPLIES, np.int32), np.full(REPLIES, 10, np.int32)
    for texts, request in (
        (rows, None),
        (RolloutRows(rows.tokens, one, ten), numbers()),
    ):
        batch, targets = inputs_of(texts)
        settings = request, LONGEST, training_layout(), REPLIES * LENGTH
        assert isinstance(arrange(batch, targets.weights > 0, *settings), RowPacking)


def test_models_whose_columns_or_rows_count_do_not_share():
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        layout = training_layout()
        assert can_share(GPT, layout) and can_share(rope(), layout)
        others = bloom("560M"), mistral("7B"), mixtral("8x7B"), qwen("7B")
        assert not any(can_share(model, layout) for model in others)
    for axis in ("context", "stage"):
        with jax.set_mesh(Mesh(fsdp=1, **{axis: 2}).build(jax.devices()[:2])):
            assert not can_share(GPT, training_layout())
