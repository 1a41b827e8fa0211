"""Zeros: written-out loops, groups counted one by one, the best that can be had by brute force."""

import itertools

import numpy as np
import pytest

from lmjax.compression.scaling_search import output_error
from lmjax.compression.sparsity import Sparsity, magnitude, sparsegpt, wanda
from lmjax.config import UserError

SIZE, OUT = 24, 5
HALF, TWO_OF_FOUR = Sparsity.of(0.5, None), Sparsity.of(None, "2:4")


def weight_and_moments(seed=0, size=SIZE, out=OUT):
    """A weight, and second moments of inputs that are much alike."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, 6)) @ rng.standard_normal((6, size))
    x += 0.3 * rng.standard_normal(x.shape)
    return rng.standard_normal((size, out)), x.T @ x / len(x), x


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_magnitude_is_the_loop(share):
    """The smallest of the whole matrix, one after another."""
    weight, _, _ = weight_and_moments()
    expected = weight.copy()
    for _ in range(round(share * weight.size)):
        left = [(abs(w), at) for at, w in np.ndenumerate(expected) if w]
        expected[min(left)[1]] = 0
    np.testing.assert_array_equal(magnitude(weight, Sparsity.of(share, None)), expected)


@pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR, Sparsity.of(None, "1:3")], ids=str)
def test_wanda_is_the_loop(sparsity):
    """|w| times the length of its input over all texts, of each output and group on its own."""
    weight, second, x = weight_and_moments()
    expected, group = weight.copy(), sparsity.group or SIZE
    for out in range(OUT):
        for first in range(0, SIZE, group):
            scores = {
                i: abs(weight[i, out]) * np.sqrt(np.sum(x[:, i] ** 2))
                for i in range(first, first + group)
            }
            gone = sorted(scores, key=scores.get)[: round(group * sparsity.share)]
            expected[gone, out] = 0
    np.testing.assert_array_equal(wanda(weight, second, sparsity), expected)


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "3:8"])
def test_each_group_has_its_zeros(pattern):
    """Of every group of every output exactly so many stay, by each method."""
    weight, second, _ = weight_and_moments()
    stay, group = map(int, pattern.split(":"))
    sparsity = Sparsity.of(None, pattern)
    for found in (
        magnitude(weight, sparsity),
        wanda(weight, second, sparsity),
        sparsegpt(weight, second, sparsity),
    ):
        for out, first in itertools.product(range(OUT), range(0, SIZE, group)):
            assert np.count_nonzero(found[first : first + group, out]) == stay


def slowly(weight, second, sparsity, damping, width):
    """Optimal brain surgeon in a fixed order: one inverse, which is shrunk after each input."""
    size, out = weight.shape
    inverse = np.linalg.inv(second + damping * np.mean(np.diag(second)) * np.eye(size))
    left, zero = weight.copy(), np.zeros(weight.shape, bool)
    group = sparsity.group or width
    for i in range(size):
        if i % group == 0:
            # Entries of the inverse of what is left when each input's turn has come.
            diagonal, shrunk = [], inverse.copy()
            for j in range(i, min(i + group, size)):
                diagonal.append(shrunk[j, j])
                shrunk -= np.outer(shrunk[:, j], shrunk[j]) / shrunk[j, j]
            scores = left[i : i + group] ** 2 / np.array(diagonal)[:, None]
            if sparsity.group:
                for o in range(out):
                    zero[i + np.argsort(scores[:, o])[: sparsity.zeros], o] = True
            else:
                count = round(sparsity.share * scores.size)
                for at in np.argsort(scores.reshape(-1))[:count]:
                    zero[i + at // out, at % out] = True
        error = np.where(zero[i], left[i], 0)
        left[i] -= error
        rest = np.arange(i + 1, size)
        left[rest] -= np.outer(inverse[rest, i], error / inverse[i, i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return left


@pytest.mark.parametrize("sparsity", [HALF, Sparsity.of(0.7, None), TWO_OF_FOUR], ids=str)
@pytest.mark.parametrize("size", [SIZE, 160])
def test_sparsegpt_is_the_loop_of_the_paper(sparsity, size):
    """The same numbers to 1e-9, by another algebra: no factor, all errors passed on at once."""
    weight, second, _ = weight_and_moments(size=size)
    expected = slowly(weight, second, sparsity, 0.01, 128)
    found = sparsegpt(weight, second, sparsity, 0.01)
    np.testing.assert_array_equal(found == 0, expected == 0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def best(weight, second, zero):
    """The weights with the least error of the outputs for given zeros: least squares by output."""
    found = np.zeros(weight.shape)
    for out in range(weight.shape[1]):
        stay = np.flatnonzero(~zero[:, out])
        target = second[stay] @ weight[:, out]
        found[stay, out] = np.linalg.solve(second[np.ix_(stay, stay)], target)
    return found


def test_zeros_in_the_last_inputs_are_made_up_for_as_least_squares():
    """Where the first inputs go and the others follow, the update is the optimum of that mask."""
    weight, second, _ = weight_and_moments(size=8, out=1)
    weight[:4] *= 1e-3  # they are the ones that go
    found = sparsegpt(weight, second, HALF, 1e-9)
    expected = best(weight, second, found == 0)
    assert (found[:4] == 0).all()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_nothing_is_below_the_best_of_all_masks():
    """Of a tiny layer all masks are tried, each with its least squares: a bound for every method,
    and above it the least squares of the mask that SparseGPT takes."""
    for seed in range(4):
        weight, second, _ = weight_and_moments(seed, size=8, out=1)
        masks = []
        for gone in itertools.combinations(range(8), 4):
            zero = np.isin(np.arange(8), gone)[:, None]
            masks.append(output_error(best(weight, second, zero) - weight, second))
        found = sparsegpt(weight, second, HALF)
        own = output_error(best(weight, second, found == 0) - weight, second)
        error = output_error(found - weight, second)
        assert min(masks) <= own <= error


def test_errors_of_outputs_by_method():
    """Of inputs with large and small ones that depend on each other: SparseGPT at most 0.6 of
    Wanda's error, and Wanda 0.5 of magnitude's; measured 0.33 and 0.26. No update of the weights
    that stay is better than least squares."""
    errors = {"sparsegpt": 0.0, "wanda": 0.0, "magnitude": 0.0}
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((400, 24)) @ rng.standard_normal((24, 96))
        x = x * np.exp(0.7 * rng.standard_normal(96)) + 0.5 * rng.standard_normal(x.shape)
        weight, second = rng.standard_normal((96, 16)), x.T @ x / len(x)
        by_gpt = sparsegpt(weight, second, HALF)
        for name, found in (
            ("sparsegpt", by_gpt),
            ("wanda", wanda(weight, second, HALF)),
            ("magnitude", magnitude(weight, HALF)),
        ):
            errors[name] += output_error(found - weight, second)
        least = output_error(best(weight, second, by_gpt == 0) - weight, second)
        assert least <= output_error(by_gpt - weight, second)
    assert errors["sparsegpt"] < 0.6 * errors["wanda"]
    assert errors["wanda"] < 0.5 * errors["magnitude"]


def test_weights_of_inputs_that_are_always_zero_go_first():
    weight, second, _ = weight_and_moments()
    second[:, [3, 7]] = second[[3, 7]] = 0
    found = sparsegpt(weight, second, HALF)
    assert (found[[3, 7]] == 0).all() and np.mean(found == 0) == 0.5


@pytest.mark.parametrize(
    ("share", "pattern", "message"),
    [
        (1.5, None, r"sparsity=1\.5: must be from 0 to 1"),
        (-0.1, None, r"sparsity=-0\.1: must be from 0 to 1"),
        (None, "4:2", "pattern=4:2: must be none, or as 2:4"),
        (None, "half", "pattern=half: must be none, or as 2:4"),
        (0.75, "2:4", r"sparsity=0\.75: pattern=2:4 has 0\.5; leave one of both"),
    ],
)
def test_what_cannot_be_is_refused(share, pattern, message):
    with pytest.raises(UserError, match=message):
        Sparsity.of(share, pattern)


def test_inputs_that_are_no_whole_groups_are_refused():
    weight, _, _ = weight_and_moments(size=10)
    with pytest.raises(UserError, match="a layer of 10 inputs has no whole groups of 4"):
        magnitude(weight, TWO_OF_FOUR)
