"""Routers against loops in plain Python over tokens."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.models import ExpertChoiceRouter, ExpertsConfig, TopKRouter
from lmjax.models.routing import BALANCE, CHOICES, DROPPED, SQUARES, SUMS, TOKENS

ROWS, LENGTH, EXPERTS = 3, 10, 4


def drawn(seed):
    """Logits and padding of a few rows; the last row is nearly all padding."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, 2, (ROWS, LENGTH, EXPERTS)).astype(np.float32)
    real = draw.random((ROWS, LENGTH)) < 0.8
    real[-1, 1:] = False
    return logits, real


def softmax(row):
    """Probabilities of one token, in float64."""
    powers = [math.exp(x - max(row)) for x in row.tolist()]
    return [power / sum(powers) for power in powers]


def chosen_of(row, count, normalise):
    """(expert, weight) of one token, the most probable first."""
    probabilities = softmax(row)
    order = sorted(range(len(row)), key=lambda e: -row[e])[:count]
    total = sum(probabilities[e] for e in order) if normalise else 1.0
    return [(e, probabilities[e] / total) for e in order]


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), chosen=st.integers(1, 3), normalise=st.booleans())
def test_choices_and_sums_are_those_of_a_loop(seed, chosen, normalise):
    """1e-5: float32 against float64."""
    if chosen == 1 and normalise:
        return
    logits, real = drawn(seed)
    router = TopKRouter(chosen=chosen, normalise=normalise)
    found, sums = router.choose(jnp.asarray(logits), jnp.asarray(real))
    expected = np.zeros((ROWS, SUMS + EXPERTS))
    for b in range(ROWS):
        mass = np.zeros(EXPERTS)
        for t in range(LENGTH):
            if not real[b, t]:
                assert (found.experts[b, t] == EXPERTS).all() and not found.weights[b, t].any()
                continue
            pairs = chosen_of(logits[b, t], chosen, normalise)
            assert found.experts[b, t].tolist() == [e for e, _ in pairs]
            np.testing.assert_allclose(found.weights[b, t], [w for _, w in pairs], rtol=1e-5)
            mass += softmax(logits[b, t])
            expected[b, TOKENS] += 1
            expected[b, CHOICES] += chosen
            log_z = math.log(sum(math.exp(x) for x in logits[b, t].tolist()))
            expected[b, SQUARES] += log_z**2
            for e, _ in pairs:
                expected[b, SUMS + e] += 1
        tokens = expected[b, TOKENS] or 1
        shares = expected[b, SUMS:] / (tokens * chosen)
        expected[b, BALANCE] = tokens * EXPERTS * (shares * mass / tokens).sum()
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10_000),
    chosen=st.integers(2, 3),
    capacity=st.sampled_from([0.3, 0.5, 1.0, 1.25, 9.0]),
)
def test_what_is_above_the_capacity_is_dropped_in_order(seed, chosen, capacity):
    """First choices of all tokens, then second ones; within these, tokens as they come."""
    logits, real = drawn(seed)
    router = TopKRouter(chosen=chosen, capacity=capacity)
    found, sums = router.slots(jnp.asarray(logits), jnp.asarray(real))
    room = min(LENGTH, max(1, math.ceil(chosen * capacity * LENGTH / EXPERTS)))
    assert found.tokens.shape == (ROWS, EXPERTS, room)
    for b in range(ROWS):
        taken, dropped = [[] for _ in range(EXPERTS)], 0
        for choice in range(chosen):
            for t in range(LENGTH):
                if real[b, t]:
                    expert, weight = chosen_of(logits[b, t], chosen, True)[choice]
                    if len(taken[expert]) < room:
                        taken[expert].append((t, weight))
                    else:
                        dropped += 1
        assert sums[b, DROPPED] == dropped
        for expert, pairs in enumerate(taken):
            pairs = pairs + [(LENGTH, 0.0)] * (room - len(pairs))
            assert found.tokens[b, expert].tolist() == [t for t, _ in pairs]
            np.testing.assert_allclose(
                found.weights[b, expert], [weight for _, weight in pairs], rtol=1e-5
            )


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), capacity=st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_experts_choose_as_by_brute_force(seed, capacity):
    """Each expert's most probable tokens; a token that nobody takes is dropped."""
    logits, real = drawn(seed)
    router = ExpertChoiceRouter(capacity=capacity)
    found, sums = router.slots(jnp.asarray(logits), jnp.asarray(real))
    room = min(LENGTH, max(1, math.ceil(capacity * LENGTH / EXPERTS)))
    for b in range(ROWS):
        here, seen = [t for t in range(LENGTH) if real[b, t]], set()
        for expert in range(EXPERTS):
            best = sorted(here, key=lambda t: -softmax(logits[b, t])[expert])[:room]
            seen |= set(best)
            empty = [LENGTH] * (room - len(best))
            assert found.tokens[b, expert].tolist() == best + empty
            weights = [softmax(logits[b, t])[expert] for t in best] + [0.0] * len(empty)
            np.testing.assert_allclose(found.weights[b, expert], weights, rtol=1e-5)
            assert sums[b, SUMS + expert] == len(best)
        assert sums[b, DROPPED] == len(here) - len(seen)


def test_an_even_load_has_a_balance_of_one_and_a_single_expert_the_most():
    """Switch, equation 4: 1 where all is even, the number of experts where one has everything."""
    real = jnp.ones((1, EXPERTS), bool)
    even = 30.0 * np.eye(EXPERTS, dtype=np.float32)[None]
    router = TopKRouter(chosen=1, normalise=False)
    for logits, balance, load in ((even, 1, 1), (30.0 * np.eye(4)[None, [2] * 4], 4, 4)):
        _, sums = router.choose(jnp.asarray(logits, jnp.float32), real)
        measures = router.measures(sums)
        assert measures["balance_loss"] == pytest.approx(balance, rel=1e-5)
        assert measures["expert_load"] == pytest.approx(load, rel=1e-5)
        assert measures["dropped"] == 0
        wanted = router.balance * balance + router.z_loss * 30.0**2
        assert measures["auxiliary_loss"] == pytest.approx(wanted, rel=1e-5)


def test_layers_without_tokens_are_in_no_measure():
    """As those that are frozen; of nothing at all the measures are 0."""
    logits, real = drawn(0)
    router = TopKRouter(chosen=2, capacity=0.5)
    _, sums = router.slots(jnp.asarray(logits), jnp.asarray(real))
    total = jnp.sum(sums, axis=0)
    alone, with_none = (
        router.measures(jnp.stack(layers)) for layers in ([total], [jnp.zeros_like(total), total])
    )
    assert alone["dropped"] > 0
    jax.tree.map(np.testing.assert_array_equal, alone, with_none)
    assert not any(value for value in router.measures(jnp.zeros((2, len(total)))).values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKRouter(chosen=0), "router.chosen=0"),
        (lambda: TopKRouter(chosen=1), "the router learns nothing; set router.normalise=false"),
        (lambda: TopKRouter(capacity=0.0), "router.capacity=0.0: must be above 0, or none"),
        (lambda: TopKRouter(balance=-1.0), "router.balance=-1.0"),
        (lambda: TopKRouter(jitter=1.0), "router.jitter=1.0"),
        (lambda: TopKRouter(z_loss=-1.0), "router.z_loss=-1.0"),
        (lambda: ExpertChoiceRouter(capacity=0.0), "router.capacity=0.0: must be above 0"),
        (lambda: ExpertsConfig(experts=0), "feed_forward.experts=0"),
        (lambda: ExpertsConfig(experts=1), "experts=1: TopKRouter takes 2 for a token"),
        (
            lambda: ExpertsConfig(experts=1, router=ExpertChoiceRouter()),
            "experts=1: ExpertChoiceRouter takes 2 for a token",
        ),
        (lambda: ExpertsConfig(shared=ExpertsConfig()), "feed_forward.shared"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
