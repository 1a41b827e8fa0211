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
from lmjax.parallel import Mesh, training_layout
from lmjax.training.gradients import count_microbatches
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


def rollouts(seed=0):
    """Requests of 1 to 6 tokens, replies of 1 to 18."""
    random = np.random.default_rng(seed)
    requests, replies = random.integers(1, 7, ROWS), random.integers(1, 19, ROWS)
    tokens = random.integers(0, WORDS, (ROWS, LENGTH)).astype(np.int32)
    tokens[np.arange(LENGTH) >= (requests + replies)[:, None]] = 0
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


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("average", [TokenMean(), AnswerMean(), FixedLengthMean(length=18)])
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
                packing = pack_rows(example.inputs, LENGTH, layout, ROWS)
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
    ways = RowPacking.one_each(sizes, LENGTH), pack_rows(inputs_of(rows)[0], LENGTH, layout, 4)
    expected, found = (scorer.score(params, rows, way, 4).log_probs for way in ways)
    np.testing.assert_allclose(found[mask], expected[mask], rtol=0, atol=2e-5)


def test_the_number_of_microbatches_can_be_that_of_other_rows(one_device):
    """Two long rows a microbatch, and text that divides into 3 parts: not into 5."""
    batch, layout = inputs_of(rollouts())[0], training_layout()
    free, bound = (pack_rows(batch, 24, layout, 4, parts) for parts in (None, 3))
    assert (free.length, count_microbatches(free.rows, 2, layout)) == (48, 5)
    assert count_microbatches(bound.rows, 2, layout) in (1, 3)
    assert free.rows <= bound.rows


def test_texts_that_a_row_holds_one_of_stay_alone(one_device):
    batch = jax.tree.map(lambda a: a[:, :24], inputs_of(rollouts())[0])
    batch.segments[:, :20] = 1
    packing = pack_rows(batch, 32, training_layout(), ROWS)
    assert (packing.rows, packing.length) == (ROWS, 24)
