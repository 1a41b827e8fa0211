"""Packed texts: each token is somewhere once; replies have the loss and gradients of one a row."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.alignment import AnswerMean, ClippedPolicy, FixedLengthMean, TokenMean
from lmjax.alignment.rollouts import RolloutRows, Scorer, inputs_of, make_example, pack_rows, packed
from lmjax.alignment.row_packing import RowPacking, best_fit
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, initialize
from lmjax.objectives import CausalLM, WeightedSum
from lmjax.objectives.example import count_tokens
from lmjax.objectives.weighted_sum import join_examples
from lmjax.parallel import Mesh, training_layout
from lmjax.training.gradients import count_parts
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import to_devices

ROWS, LENGTH, WORDS = 12, 48, 61
MODEL = TransformerConfig(
    vocab_size=WORDS,
    hidden=32,
    num_layers=2,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=2, head_dim=16),
    feed_forward=FeedForwardConfig(size=48),
)


def rollouts(count=ROWS, length=LENGTH):
    """Requests of 1 to 6 tokens, replies of 1 to 18."""
    random = np.random.default_rng(0)
    requests, replies = random.integers(1, 7, count), random.integers(1, 19, count)
    tokens = random.integers(0, WORDS, (count, length)).astype(np.int32)
    tokens[np.arange(length) >= (requests + replies)[:, None]] = 0
    return RolloutRows(tokens, requests.astype(np.int32), replies.astype(np.int32))


@given(
    st.lists(st.integers(0, 32), min_size=1, max_size=40).map(np.array),
    st.integers(1, 8),
    st.integers(0, 2),
)
def test_texts_come_back_as_they_were(sizes, most, empty):
    row, first, slot = best_fit(sizes, 32, most)
    packing = RowPacking(sizes, row, first, slot, int(row.max()) + 1 + empty, 32)
    given = np.arange(1, len(sizes) * 32 + 1).reshape(len(sizes), 32)
    given[np.arange(32) >= sizes[:, None]] = 0
    packed = packing.pack(given)
    assert sorted(packed[packed > 0].tolist()) == sorted(given[given > 0].tolist())
    np.testing.assert_array_equal(packing.unpack(packed, 32), given)


@pytest.mark.parametrize(
    ("average", "devices"), [(TokenMean(), 2), (AnswerMean(), 1), (FixedLengthMean(length=18), 2)]
)
def test_packed_replies_have_the_loss_and_gradients_of_one_a_row(average, devices):
    """Sums over texts in another order, of float32 around 1."""
    rows, random = rollouts(), np.random.default_rng(1)
    numbers = random.normal(-4, 1, (4, ROWS, LENGTH)).astype(np.float32)
    example = make_example(rows, *numbers[:3])
    objective = ClippedPolicy(average=average, kl=0.1, entropy=0.01)

    def gradients(mesh, pack):
        with jax.set_mesh(mesh.build(jax.devices()[: mesh.fsdp])):
            layout, given = training_layout(), example
            if pack:
                packing = pack_rows(example.inputs, LENGTH, layout, ROWS * LENGTH)
                assert packing.rows <= ROWS / 2
                given = packed(example, packing)
            learner = Learner(MODEL, objective, AdamW(), lambda step: 1e-2, layout)
            state = learner.init(0)
            given = to_devices(given, layout, WORDS)
            return jax.device_get(jax.jit(learner.gradients)(state, given, state.key))

    (expected, sums), (found, others) = (
        gradients(Mesh(fsdp=1), False),
        gradients(Mesh(fsdp=devices), True),
    )
    assert sums.weight == others.weight == rows.reply_lengths.sum()
    for one, other in ((sums.loss, others.loss), *zip(sums.extra.values(), others.extra.values())):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-5)
    top = max(np.max(np.abs(d)) for d in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * top), found, expected
    )


def test_packed_replies_are_scored_as_one_a_row(one_device):
    """Log-probabilities of replies, to float32's rounding."""
    rows, layout = rollouts(), training_layout()
    _, params = initialize(MODEL, layout, jax.random.key(0))
    scorer, mask = Scorer(MODEL, layout, 1.0, False), inputs_of(rows)[1].weights > 0
    sizes = rows.request_lengths + rows.reply_lengths
    most = 4 * LENGTH
    packing = pack_rows(inputs_of(rows)[0], LENGTH, layout, most)
    assert packing.length == 2 * LENGTH
    ways = RowPacking.one_each(sizes, LENGTH), packing
    expected, found = (scorer.score(params, rows, way, most).log_probs for way in ways)
    np.testing.assert_allclose(found[mask], expected[mask], rtol=0, atol=2e-5)


def many(accumulation):
    """48 replies of at most 24 tokens, packed, and the most tokens of a microbatch."""
    rows, most = rollouts(48, 24), 48 * 24 // accumulation
    packing = pack_rows(inputs_of(rows)[0], 24, training_layout(), most)
    assert packing.length == 48 and packing.rows < 24
    numbers = np.zeros((3, 48, 24), np.float32)
    return packed(make_example(rows, *numbers), packing), most


@pytest.mark.parametrize("accumulation", [1, 2, 3, 4, 6])
def test_microbatches_are_no_larger_than_of_one_a_row(accumulation, one_device):
    """In tokens, and no more of them; also with rows of text in each beside."""
    replies, most = many(accumulation)
    text = CausalLM().shapes(3 * accumulation, 16)
    for example, own in (replies, most), (join_examples([replies, text]), most + 3 * 16):
        parts = count_parts(example, 48 // accumulation, own, training_layout())
        assert parts <= accumulation and count_tokens(example) <= parts * own


def test_text_beside_packed_replies_is_cut_as_they_are(one_device):
    """Nine rows, into three parts."""
    replies, most = many(3)
    layout, text = training_layout(), CausalLM().shapes(9, 24)
    both = WeightedSum(objectives=(ClippedPolicy(), CausalLM()), weights=(1.0, 27.8))
    bounds = {"microbatch": 16, "microbatch_tokens": most + 3 * 24}
    learner = Learner(MODEL, both, AdamW(), lambda step: 1e-2, layout, **bounds)
    example = to_devices(join_examples([replies, text]), layout, WORDS)
    state, key = learner.abstract(), jax.random.key(0)
    found, _ = jax.eval_shape(learner.gradients, state, example, key)
    assert jax.tree.structure(found) == jax.tree.structure(state.params)


def test_texts_that_a_row_holds_one_of_stay_alone(one_device):
    batch = jax.tree.map(lambda a: a[:, :24], inputs_of(rollouts())[0])
    batch.segments[:, :20] = 1
    packing = pack_rows(batch, 32, training_layout(), ROWS * 32)
    assert (packing.rows, packing.length) == (ROWS, 24)
