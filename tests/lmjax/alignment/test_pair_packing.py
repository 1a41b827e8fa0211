"""Packed pairs: each is somewhere once, and loss and gradients are those of a pair a row."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.alignment import DPO, PairTargets, PreferencePairs, SimPO
from lmjax.alignment.pair_packing import packed_pairs
from lmjax.alignment.row_packing import best_fit
from lmjax.models import AttentionConfig, Batch, FeedForwardConfig, TransformerConfig
from lmjax.objectives import Example, TokenTargets
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import fitting_rows, to_devices

ROWS, LENGTH, WORDS = 8, 64, 61
MODEL = TransformerConfig(
    vocab_size=WORDS,
    hidden=32,
    num_layers=2,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=2, head_dim=16),
    feed_forward=FeedForwardConfig(size=48),
)


def side(seed):
    """Texts of 4 to 20 tokens, their answers from the third on; the last row is empty."""
    random = np.random.default_rng(seed)
    index, ends = np.arange(LENGTH, dtype=np.int32), random.integers(4, 21, (ROWS, 1))
    ends[-1] = 0
    real = index < ends
    tokens = np.where(real, random.integers(0, WORDS, (ROWS, LENGTH)), 0).astype(np.int32)
    following = np.roll(tokens, -1, axis=1)
    weights = ((index + 1 >= 3) & (index + 1 < ends)).astype(np.float32)
    positions = np.tile(index, (ROWS, 1))
    return Batch(tokens, positions, real.astype(np.int32)), TokenTargets(following, weights)


def pairs():
    (chosen, better), (rejected, worse) = side(0), side(1)
    reference = np.random.default_rng(2).normal(-40, 3, (ROWS, 1, 2)).astype(np.float32)
    return Example((chosen, rejected), PairTargets(better, worse, reference))


def gradients(preference, example, mesh):
    devices = mesh.fsdp
    with jax.set_mesh(mesh.build(jax.devices()[:devices])):
        layout, objective = training_layout(), PreferencePairs(preference=preference)
        learner = Learner(MODEL, objective, AdamW(), lambda step: 1e-2, layout)
        state, given = learner.init(0), to_devices(example, layout, WORDS)
        found, sums = jax.jit(learner.gradients)(state, given, state.key)
        weight = jax.jit(objective.weight)(given)
        return jax.device_get((found, sums, weight))


@pytest.mark.parametrize(
    ("preference", "devices"),
    [
        pytest.param(DPO(), 2, id="DPO"),
        pytest.param(SimPO(), 1, id="SimPO", marks=pytest.mark.slow),
    ],
)
def test_packed_pairs_have_the_loss_and_gradients_of_one_a_row(preference, devices):
    """Sums over a text in another order, of float32 around 1 and 40."""
    example = pairs()
    packed = packed_pairs(example, lambda needed: needed + needed % devices)
    assert len(packed.inputs[0].tokens) < ROWS / 2
    (expected, sums, weight), (found, others, same) = (
        gradients(preference, one, mesh)
        for one, mesh in ((example, Mesh(fsdp=1)), (packed, Mesh(fsdp=devices)))
    )
    assert weight == same == sums.weight == others.weight == ROWS - 1
    for one, other in ((sums.loss, others.loss), *zip(sums.extra.values(), others.extra.values())):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-5)
    top = max(np.max(np.abs(d)) for d in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * top), found, expected
    )


def test_pairs_that_need_all_rows_stay():
    example = pairs()
    assert packed_pairs(example, lambda needed: ROWS) is example


@given(
    st.lists(st.integers(0, 32), min_size=1, max_size=40).map(np.array),
    st.integers(1, 8),
)
def test_best_fit_gives_each_pair_room_of_its_own(sizes, most):
    row, first, slot = best_fit(sizes, 32, most)
    used = np.zeros((len(sizes), 32), int)
    for pair in np.flatnonzero(sizes):
        used[row[pair], first[pair] : first[pair] + sizes[pair]] += 1
    assert used.max(initial=0) <= 1
    assert used.sum() == sizes.sum()  # nothing is beyond the end of a row
    places = {(row[pair], slot[pair]) for pair in np.flatnonzero(sizes)}
    assert len(places) == np.count_nonzero(sizes)
    assert slot.max() < most


def test_rows_are_few_sizes_and_divide_among_the_devices():
    with jax.sharding.use_abstract_mesh(Mesh(data=2, fsdp=4).abstract(8)):
        found = [fitting_rows(needed, 64, training_layout()) for needed in range(1, 65)]
    assert all(rows >= needed and rows % 8 == 0 for needed, rows in enumerate(found, 1))
    assert len(set(found)) <= 9
