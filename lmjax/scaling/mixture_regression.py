"""Regression of a loss on the shares of a mixture, and the mixture that it thinks best.

RegMix (Liu et al. 2024, arXiv:2407.01492): many tiny models are trained on random mixtures, a
regression learns their losses, and of very many simulated mixtures those with the lowest predicted
losses are averaged. The paper takes linear regression and boosted trees. Both are here, and a
linear one that has the logarithms of the shares too, which needs fewer runs: losses rise ever
faster where a domain goes missing. The one with the best rank correlation on mixtures that it has
not seen is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lmjax.config import UserError

FOLDS = 5  # of the cross-validation
RIDGE = 1e-3  # penalty of the linear regressions' squared weights
LEAST = 1e-3  # added to a share whose logarithm is taken
TREES, DEPTH, RATE, FEWEST = 200, 3, 0.1, 3  # of the boosted trees; FEWEST examples in a leaf
Shares = Float[np.ndarray, "mixtures domains"]
Losses = Float[np.ndarray, "mixtures"]
Predict = Callable[[np.ndarray], np.ndarray]  # mixtures -> losses


def draw_mixtures(
    prior: Float[np.ndarray, "domains"],
    count: int,
    seed: int,
    strengths: tuple[float, float] = (0.1, 5.0),
    least: float = 0.0,
) -> Shares:
    """Random mixtures around a prior, from nearly one domain alone to nearly the prior.

    Each is drawn from a Dirichlet distribution whose strength is drawn itself, uniformly in its
    logarithm; the prior's square root is taken first, so that small domains occur (the paper's
    temperature of 0.5).

    Args:
        prior: share of each domain.
        count: of the mixtures.
        seed: of the draws.
        strengths: the least and the largest, as sums of the parameters for each domain.
        least: share of every domain.
    """
    rng = np.random.default_rng(seed)
    center = np.sqrt(prior / prior.sum())
    center = center / center.sum() * len(prior)
    strength = np.exp(rng.uniform(*np.log(strengths), count))
    gamma = rng.standard_gamma(strength[:, None] * center + 1e-6)
    found = (gamma + 1e-12) / (gamma + 1e-12).sum(1, keepdims=True)
    return least + (1 - least * len(prior)) * found


@dataclasses.dataclass(frozen=True)
class MixtureFit:
    """A regression of losses on mixtures.

    Attributes:
        name: of the kind that was chosen.
        predict: mixtures -> losses.
        correlations: Spearman's rank correlation of each kind on mixtures that it had not seen.
        predicted: losses of the mixtures, each by a fit that had not seen it.
    """

    name: str
    predict: Predict
    correlations: dict[str, float]
    predicted: Losses


def fit_mixtures(shares: Shares, losses: Losses, seed: int = 0) -> MixtureFit:
    """Fits each kind of regression, and takes the one that ranks unseen mixtures best.

    Raises:
        UserError: there are fewer mixtures than twice the folds.
    """
    count = len(losses)
    if count < 2 * FOLDS:
        raise UserError(f"{count} mixtures are too few for a regression: at least {2 * FOLDS}")
    fold = np.random.default_rng(seed).permutation(count) % FOLDS
    kinds = {"linear": fit_linear, "logarithmic": fit_logarithms, "boosted trees": fit_trees}
    unseen = {name: np.zeros(count) for name in kinds}
    for name, fit in kinds.items():
        for number in range(FOLDS):
            out = fold == number
            unseen[name][out] = fit(shares[~out], losses[~out])(shares[out])
    correlations = {name: rank_correlation(unseen[name], losses) for name in kinds}
    best = max(kinds, key=lambda name: correlations[name])
    return MixtureFit(best, kinds[best](shares, losses), correlations, unseen[best])


def best_mixture(
    fit: MixtureFit,
    prior: Float[np.ndarray, "domains"],
    simulated: int = 100_000,
    averaged: int = 100,
    seed: int = 0,
) -> Float[np.ndarray, "domains"]:
    """The mean of the simulated mixtures with the lowest predicted losses.

    Args:
        fit: of `fit_mixtures`.
        prior: that mixtures are drawn around.
        simulated: how many are drawn.
        averaged: how many of the best the mean is of.
        seed: of the draws.
    """
    drawn = draw_mixtures(prior, simulated, seed)
    order = np.argsort(fit.predict(drawn), kind="stable")[:averaged]
    return drawn[order].mean(0)


def fit_linear(shares: Shares, losses: Losses) -> Predict:
    """Ridge regression on the shares."""
    mean, center = losses.mean(), shares.mean(0)
    x = shares - center
    weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ (losses - mean))
    return lambda some: mean + (some - center) @ weights


def fit_logarithms(shares: Shares, losses: Losses) -> Predict:
    """Ridge regression on the shares and their logarithms, each scaled to a deviation of 1."""

    def features(some: Shares) -> Float[np.ndarray, "mixtures features"]:
        return np.concatenate([some, np.log(some + LEAST)], 1)

    found = features(shares)
    scale = np.maximum(found.std(0), 1e-9)
    predict = fit_linear(found / scale, losses)
    return lambda some: predict(features(some) / scale)


def fit_trees(shares: Shares, losses: Losses) -> Predict:
    """Gradient boosting of small regression trees for the squared error (Friedman 2001)."""
    mean = losses.mean()
    value, trees = np.full(len(losses), mean), []
    for _ in range(TREES):
        tree = _grown(shares, losses - value, DEPTH)
        trees.append(tree)
        value = value + RATE * _read(tree, shares)
    return lambda some: mean + RATE * sum(_read(tree, some) for tree in trees)


# A leaf's value, or the domain that is asked, the share that divides, and what is below.
Tree = float | tuple[int, float, Any, Any]


def _grown(x: Shares, y: Losses, depth: int) -> Tree:
    """A tree that divides the examples where the squared error falls most."""
    if depth == 0 or len(y) < 2 * FEWEST:
        return float(y.mean())
    best: tuple[float, int, float] | None = None
    left = np.arange(1, len(y))
    for domain in range(x.shape[1]):
        order = np.argsort(x[:, domain], kind="stable")
        sums = np.cumsum(y[order])[:-1]
        gain = sums**2 / left + (y.sum() - sums) ** 2 / (len(y) - left)
        values = x[order, domain]
        allowed = (left >= FEWEST) & (len(y) - left >= FEWEST) & (values[1:] > values[:-1])
        if allowed.any():
            at = int(np.where(allowed, gain, -np.inf).argmax())
            if best is None or gain[at] > best[0]:
                best = float(gain[at]), domain, float((values[at] + values[at + 1]) / 2)
    if best is None:
        return float(y.mean())
    _, domain, share = best
    below = x[:, domain] < share
    return (
        domain,
        share,
        _grown(x[below], y[below], depth - 1),
        _grown(x[~below], y[~below], depth - 1),
    )


def _read(tree: Tree, x: Shares) -> Losses:
    """Values of a tree."""
    if isinstance(tree, float):
        return np.full(len(x), tree)
    domain, share, low, high = tree
    below = x[:, domain] < share
    found = np.zeros(len(x))
    found[below], found[~below] = _read(low, x[below]), _read(high, x[~below])
    return found


def rank_correlation(one: Losses, other: Losses) -> float:
    """Spearman's rank correlation; 0 where one side is all alike."""
    a, b = (_ranks(values) - (len(values) - 1) / 2 for values in (one, other))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else 0.0


def _ranks(values: Losses) -> Float[np.ndarray, "mixtures"]:
    """Ranks from 0, those of equal values their mean."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends: Int[np.ndarray, "values"] = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[which]
