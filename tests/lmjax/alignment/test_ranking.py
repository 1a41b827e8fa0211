"""The reward model's loss, against a loop over pairs, and the shapes that it takes."""

import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.alignment import ranking_loss
from lmjax.config import UserError
from lmjax.data.chat.comparisons import LARGE_MARGINS, SMALL_MARGINS

PROMPTS, ANSWERS = 3, 5
rank = jax.jit(ranking_loss, static_argnames="centring")


def batch(seed):
    """Scores, ranks with ties, real answers (one prompt has a single one), and margins."""
    random = np.random.default_rng(seed)
    scores = random.normal(size=(PROMPTS, ANSWERS)).astype(np.float32)
    ranks = random.integers(0, 4, (PROMPTS, ANSWERS)).astype(np.int32)
    real = random.random((PROMPTS, ANSWERS)) < 0.8
    real[1] = np.arange(ANSWERS) == 2
    margins = random.random((PROMPTS, ANSWERS, ANSWERS)).astype(np.float32)
    return scores, ranks, real, margins


def loop(scores, ranks, real, margins, centring):
    """Loss, prompts, accuracy: pair by pair."""
    loss, prompts, accuracy = 0.0, 0, 0.0
    for p in range(PROMPTS):
        losses, right = [], []
        for i, j in itertools.permutations(np.flatnonzero(real[p]), 2):
            if ranks[p, i] < ranks[p, j]:
                lead = float(scores[p, i]) - float(scores[p, j])
                both = float(scores[p, i]) + float(scores[p, j])
                losses.append(np.log1p(np.exp(margins[p, i, j] - lead)) + centring * both**2)
                right.append(lead > 0)
        if losses:
            loss, prompts = loss + np.mean(losses), prompts + 1
            accuracy += np.mean(right)
    return loss, prompts, accuracy


@given(seed=st.integers(0, 2**31), centring=st.sampled_from([0.0, 0.01]))
def test_all_pairs_of_a_prompt_as_in_the_loop(seed, centring):
    scores, ranks, real, margins = batch(seed)
    found = rank(scores, ranks, real, margins, centring=centring)
    loss, prompts, accuracy = loop(scores, ranks, real, margins, centring)
    np.testing.assert_allclose(found.loss, loss, atol=1e-5)
    assert found.weight == prompts
    np.testing.assert_allclose(found.extra["accuracy"], accuracy, atol=1e-6)
    for value in (1e6, np.nan):
        poisoned = np.where(real, scores, np.float32(value))
        assert rank(poisoned, ranks, real, margins, centring=centring).loss == found.loss


def test_gradients_stay_finite_and_away_from_what_is_not_real():
    scores, ranks, real, _ = batch(0)
    poisoned = np.where(real, scores, np.float32(np.nan))
    found = jax.grad(lambda s: ranking_loss(s, *map(jnp.asarray, (ranks, real))).loss)(
        jnp.asarray(poisoned)
    )
    assert np.isfinite(found).all()
    assert not np.asarray(found)[~real].any() and not np.asarray(found)[1].any()


def test_every_answer_has_several_pairs_in_one_element():
    """K answers without ties have K (K - 1) / 2 pairs: the mean of the pairs' plain losses."""
    scores = jnp.asarray([[0.3, -1.0, 2.0, 0.1]])
    ranks = jnp.asarray([[1, 3, 0, 2]])
    order = [2, 0, 3, 1]
    pairs = list(itertools.combinations(order, 2))
    apart = ranking_loss(scores[0, jnp.asarray(pairs)], in_order(6))
    assert len(pairs) == 6 == apart.weight
    np.testing.assert_allclose(ranking_loss(scores, ranks).loss, apart.loss / 6, rtol=1e-6)


def test_a_prompt_without_pairs_has_no_weight():
    tied = ranking_loss(jnp.ones((2, 3)), jnp.zeros((2, 3), jnp.int32))
    assert tied.loss == 0 and tied.weight == 0 and tied.extra["accuracy"] == 0


def in_order(pairs):
    """Ranks of pairs whose first answer is the better one."""
    return jnp.tile(jnp.arange(2), (pairs, 1))


def test_plain_pairs_with_margins_by_grade():
    """LLaMA 2's two sets of margins, of the clearest grade first."""
    scores = jnp.asarray([[1.0, 0.0], [0.5, 1.0], [2.0, 1.0], [0.0, 0.0]])
    for table in (SMALL_MARGINS, LARGE_MARGINS):
        margins = jnp.broadcast_to(jnp.asarray(table)[:, None, None], (4, 2, 2))
        found = ranking_loss(scores, in_order(4), margins=margins)
        expected = sum(np.log1p(np.exp(m - (c - r))) for (c, r), m in zip(scores, table))
        np.testing.assert_allclose(found.loss, expected, rtol=1e-6)
    assert found.weight == 4
    real = jnp.asarray([True, True, False, False])[:, None] & jnp.ones(2, bool)
    assert ranking_loss(scores, in_order(4), real).weight == 2
    alone = ranking_loss(scores[3:], in_order(1)).loss
    np.testing.assert_allclose(alone, np.log(2), rtol=1e-7)


MISTAKES = {
    "margins": [(3,), (3, 1, 1), (1, 2, 2), (3, 2, 1)],
    "real": [(3, 1), (1, 2)],
    "ranks": [(3, 1), (1, 2)],
}


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name, shapes in MISTAKES.items() for shape in shapes]
)
def test_no_shape_is_broadcast(name, shape):
    """With the shapes checked as in tests, and without as in use."""
    kind = {"margins": jnp.float32, "real": bool, "ranks": jnp.int32}[name]
    given = {"scores": jnp.zeros((3, 2)), "ranks": in_order(3)} | {name: jnp.ones(shape, kind)}
    with pytest.raises(jaxtyping.TypeCheckError):
        ranking_loss(**given)
    with pytest.raises(UserError, match=rf"{name} has the shape .*; it must be \(3, 2"):
        ranking_loss.__wrapped__(**given)
