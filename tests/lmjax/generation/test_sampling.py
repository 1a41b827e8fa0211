"""How tokens are drawn, against the distribution worked out in numpy."""

import jax
import numpy as np
import pytest

from lmjax.config import UserError
from lmjax.generation.sampling import Sampling, choose

LOGITS = np.array([1.2, -0.3, 2.0, 0.1, 1.9, -4.0, 0.7], np.float32)
DRAWS = 20_000


def distribution(temperature, top_k, top_p):
    """Probabilities of LOGITS' tokens, token by token as the words say."""
    order = np.argsort(-LOGITS)[: top_k or len(LOGITS)]
    weights = np.exp(LOGITS[order].astype(np.float64) / temperature)
    weights /= weights.sum()
    kept, share = [], 0.0
    for place, weight in enumerate(weights):
        if top_p is None or share < top_p:
            kept.append(place)
        share += weight
    probabilities = np.zeros(len(LOGITS))
    probabilities[order[kept]] = weights[kept] / weights[kept].sum()
    return probabilities


def draw(logits, temperature, top_k, top_p, draws=DRAWS):
    """Tokens drawn from the same logits with keys of their own."""
    keys = jax.random.split(jax.random.key(0), draws)
    rows = np.broadcast_to(logits, (draws, len(logits)))
    function = jax.jit(choose, static_argnames="top_k")
    top_p = None if top_p is None else np.float32(top_p)
    return np.asarray(function(rows, keys, np.float32(temperature), top_p, top_k=top_k))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.7, 3, None), (1.5, None, 0.75), (2.0, 5, 0.6), (1.0, 99, 1e-6)],
)
def test_frequencies_are_the_probabilities(temperature, top_k, top_p):
    """Each within five standard deviations of a count; what is cut off is never drawn."""
    expected = distribution(temperature, top_k, top_p)
    counts = np.bincount(draw(LOGITS, temperature, top_k, top_p), minlength=len(LOGITS))
    assert (counts[expected == 0] == 0).all()
    deviation = np.sqrt(DRAWS * expected * (1 - expected))
    assert (np.abs(counts - DRAWS * expected) <= 5 * deviation).all()


def test_the_smallest_temperature_takes_the_best():
    """No overflow: logits far apart, divided by the smallest normal float32."""
    logits = np.array([-1e30, 3e4, 2e4, -3e4], np.float32)
    assert (draw(logits, np.finfo(np.float32).tiny, None, None, draws=50) == 1).all()


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}]
)
def test_settings_that_leave_nothing_to_choose_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
