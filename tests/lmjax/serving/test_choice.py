"""The choice by rows: each row gets what it gets alone, and what the formulas say."""

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.generation.sampling import choose
from lmjax.serving.choice import Adjustments, RowSettings, choose_rows, score_tokens
from lmjax.serving.guesses import accepted, repeated

ROWS, VOCABULARY = 6, 41
WAYS = [  # temperature, top_k, top_p, min_p
    (0.0, None, None, None),
    (1.0, None, None, None),
    (0.7, 5, None, None),
    (1.5, None, 0.6, None),
    (1.2, 12, 0.9, 0.05),
    (2.0, None, None, 0.1),
]


def rows(seeds):
    """Settings of the ways."""
    columns = list(zip(*WAYS))
    top_k, top_p, min_p = (
        np.array([usual if value is None else value for value in column], kind)
        for column, usual, kind in zip(
            columns[1:], (VOCABULARY, 1, 0), (np.int32, np.float32, np.float32)
        )
    )
    ranked = np.array([k is not None or p is not None for _, k, p, _ in WAYS])
    temperature = np.array(columns[0], np.float32)
    return RowSettings(temperature, top_k, top_p, min_p, ranked, seeds, np.arange(ROWS, dtype=int))


def test_rows_draw_as_they_do_alone():
    alone = jax.jit(choose, static_argnums=5)
    draw = np.random.default_rng(0)
    for trial in range(8):
        logits = draw.normal(0, 2, (ROWS, VOCABULARY)).astype(np.float32)
        seeds = draw.integers(0, 2**31, ROWS).astype(np.uint32)
        found = choose_rows(jnp.array(logits), rows(seeds), None, ranked=True, tops=True)
        for row, (temperature, *filters) in enumerate(WAYS):
            if temperature == 0:
                wanted = logits[row].argmax()
            else:
                key = jax.random.fold_in(jax.random.key(seeds[row]), row)
                k, p, m = filters
                p, m = (None if value is None else jnp.float32(value) for value in (p, m))
                own = jnp.array(logits[row : row + 1])
                (wanted,) = alone(own, key[None], jnp.float32(temperature), p, m, k)
            assert found.tokens[row] == wanted, (trial, row)
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        np.testing.assert_allclose(
            found.log_probabilities, logs[np.arange(ROWS), found.tokens], atol=1e-5
        )
        order = np.argsort(-logs, axis=1)[:, :20]
        np.testing.assert_array_equal(found.top_tokens, order)


def test_adjustments_come_before_the_choice_and_not_into_the_probabilities():
    logits = np.array([[1.0, 3.0, -1.0, 2.0]] * 3, np.float32)
    changes = Adjustments(
        repetition=np.array([1.0, 2.0, 1.0], np.float32),
        seen=np.array([[True] * 4, [False, True, True, False], [False] * 4]),
        bias=np.array([[0.0] * 4, [0.0] * 4, [0.0, -np.inf, 5.0, 0.0]], np.float32),
    )
    found = choose_rows(jnp.array(logits), None, changes, ranked=False, tops=False)
    assert found.tokens.tolist() == [1, 3, 2] and found.top_tokens is None
    logs = logits[0] - np.log(np.exp(logits[0]).sum())
    np.testing.assert_allclose(found.log_probabilities, logs[[1, 3, 2]], atol=1e-6)


def test_scores_are_of_the_tokens_that_follow():
    logits = np.random.default_rng(1).normal(0, 1, (5, 30)).astype(np.float32)
    following = np.array([3, 0, 29, 7, 7], np.int32)
    scores, best, values = map(np.asarray, score_tokens(jnp.array(logits), jnp.array(following)))
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(scores, logs[np.arange(5), following], atol=1e-5)
    np.testing.assert_array_equal(best, np.argsort(-logs, axis=1)[:, :20])
    np.testing.assert_allclose(values, -np.sort(-logs, axis=1)[:, :20], atol=1e-5)


def test_guesses_are_what_followed_before():
    assert repeated([1, 2, 3, 9, 9, 1, 2], 3) == [3, 9, 9]
    assert repeated([5, 1, 2, 7, 1, 2, 8, 1, 2], 1) == [8]  # the newest
    assert repeated([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 1) == [4]  # the longest end
    assert repeated([1, 2, 3], 4) == [] and repeated([1], 4) == []
    # Text that goes round is guessed to go on so.
    assert repeated([4, 4, 4], 3) == [4, 4, 4]
    assert repeated([9, 1, 2, 3, 1, 2, 3, 1, 2], 5) == [3, 1, 2, 3, 1]
    assert [accepted(*pair) for pair in (([1, 2], [1, 2, 3]), ([1, 2], [1, 3, 4]), ([], [1]))] == [
        2,
        1,
        0,
    ]
