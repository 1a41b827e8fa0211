"""Regressions over mixtures, beside losses whose best mixture is known; and the job."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lmjax.config import UserError, replace
from lmjax.data import Data, Domain, JsonLines
from lmjax.data.tokenizers import Bytes
from lmjax.jobs.mixture_search import MixtureSearch, held_out_losses
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Evaluation
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.runs.folder import RunFolder
from lmjax.scaling.mixture_regression import (
    best_mixture,
    draw_mixtures,
    fit_linear,
    fit_mixtures,
    fit_trees,
    rank_correlation,
)
from lmjax.training.schedules import Constant

PRIOR = np.array([0.6, 0.3, 0.1])


def simulated_losses(shares):
    """Losses as of tiny runs: each domain's falls as a power of its share; their mean.

    The best mixture has shares in proportion to (a_i b_i)^(1 / (b_i + 1)), with b = 0.3 for all to
    a^(1 / 1.3), by Lagrange's condition.
    """
    return (np.array([1.0, 2.0, 0.5]) * (shares + 1e-3) ** -0.3).mean(1)


BEST = np.array([1.0, 2.0, 0.5]) ** (1 / 1.3)
BEST = BEST / BEST.sum()


def test_mixtures_are_around_the_prior():
    drawn = draw_mixtures(PRIOR, 20_000, seed=0, least=0.002)
    np.testing.assert_allclose(drawn.sum(1), 1, atol=1e-9)
    assert drawn.min() >= 0.002
    # The mean of a Dirichlet distribution is that of its parameters: square roots of the prior.
    expected = np.sqrt(PRIOR) / np.sqrt(PRIOR).sum()
    np.testing.assert_allclose(drawn.mean(0), expected * (1 - 0.006) + 0.002, atol=0.01)
    np.testing.assert_array_equal(drawn, draw_mixtures(PRIOR, 20_000, seed=0, least=0.002))
    near = draw_mixtures(PRIOR, 1000, 0, strengths=(1e3, 1e3))
    assert np.abs(near - expected).max() < 0.1


def test_a_linear_loss_is_found_exactly():
    shares = draw_mixtures(PRIOR, 60, 0)
    losses = 3 + shares @ np.array([0.5, -1.0, 0.25])
    predicted = fit_linear(shares, losses)(draw_mixtures(PRIOR, 50, 1))
    expected = 3 + draw_mixtures(PRIOR, 50, 1) @ np.array([0.5, -1.0, 0.25])
    np.testing.assert_allclose(predicted, expected, atol=2e-3)  # of the ridge


def test_trees_learn_what_is_not_linear():
    shares = draw_mixtures(PRIOR, 300, 0)
    losses = np.where(shares[:, 0] < 0.3, 2.0, 1.0) + np.where(shares[:, 1] > 0.5, 0.5, 0.0)
    unseen = draw_mixtures(PRIOR, 200, 1)
    expected = np.where(unseen[:, 0] < 0.3, 2.0, 1.0) + np.where(unseen[:, 1] > 0.5, 0.5, 0.0)
    errors = np.abs(fit_trees(shares, losses)(unseen) - expected)
    assert np.median(errors) < 0.02 and errors.mean() < 0.1


def test_the_best_mixture_is_near_the_one_that_is_known():
    shares = draw_mixtures(PRIOR, 128, 0)
    noise = np.random.default_rng(1).normal(0, 0.002, 128)
    fit = fit_mixtures(shares, simulated_losses(shares) + noise)
    assert set(fit.correlations) == {"linear", "logarithmic", "boosted trees"}
    assert fit.correlations[fit.name] > 0.9
    best = best_mixture(fit, PRIOR, simulated=20_000, averaged=100)
    assert best.sum() == pytest.approx(1)
    np.testing.assert_allclose(best, BEST, atol=0.1)
    # Its true loss is that of the best mixture but for a hundredth, and below the prior's.
    true = simulated_losses(np.stack([best, BEST, PRIOR]))
    assert true[0] < true[1] * 1.01 and true[0] < true[2]
    # With a quarter of the runs, too.
    few = fit_mixtures(shares[:32], simulated_losses(shares[:32]) + noise[:32])
    assert few.correlations[few.name] > 0.9
    found = best_mixture(few, PRIOR, simulated=20_000, averaged=100)
    assert simulated_losses(found[None])[0] < true[1] * 1.02
    with pytest.raises(UserError, match="9 mixtures are too few"):
        fit_mixtures(shares[:9], noise[:9])


def test_rank_correlation_is_spearman_s():
    a, b = np.array([1.0, 2.0, 2.0, 5.0, 3.0]), np.array([10.0, 20.0, 15.0, 50.0, 30.0])
    ranks = np.array([0, 1.5, 1.5, 4, 3]), np.array([0.0, 2, 1, 4, 3])
    assert rank_correlation(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert rank_correlation(a, -b) == pytest.approx(-np.corrcoef(*ranks)[0, 1])
    assert rank_correlation(a, np.ones(5)) == 0


@pytest.fixture
def search(tmp_path):
    for name, word in (("digits", "0123456789 "), ("letters", "abcdefghij ")):
        texts = [word * 9 + str(n) for n in range(60)]
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    experiment = Pretrain(
        output="runs/none",
        steps=2,
        model=TransformerConfig(
            vocab_size=257,
            hidden=8,
            num_layers=1,
            max_length=16,
            attention=AttentionConfig(num_heads=1, head_dim=8),
            feed_forward=FeedForwardConfig(size=16),
        ),
        data=Data(
            train=tuple(
                Domain(name=name, source=JsonLines(path=str(tmp_path / f"{name}.jsonl")))
                for name in ("digits", "letters")
            ),
            tokenizer=Bytes(),
            held_out=0.2,
            length=16,
            batch_size=8,
            cache=str(tmp_path / "cache"),
        ),
        schedule=Constant(peak=1e-2, warmup=0),
        evaluation=Evaluation(tokens=64),
    )
    return MixtureSearch(
        output=str(tmp_path / "search"), experiment=experiment, runs=10, simulated=1000, averaged=10
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": 3}, "must be 10 or more"),
        ({"target": ("x",)}, "target: x; there are digits, letters"),
        ({"strengths": (2.0, 1.0)}, "two rising numbers"),
    ],
)
def test_searches_that_cannot_be_meant(search, changes, message):
    with pytest.raises(UserError, match=message):
        replace(search, **changes).validate()


def test_runs_differ_in_their_shares_alone(search):
    shares = search.mixtures()
    assert shares.shape == (10, 2) and shares[0].tolist() == [0.5, 0.5]
    jobs = [search.job(Path(search.output), n, row) for n, row in enumerate(shares.tolist())]
    assert len({job.output for job in jobs}) == 10
    same = {replace(job, output="x", data=search.experiment.data).data for job in jobs}
    assert len(same) == 1
    assert [one.weight for one in jobs[0].data.train] == [0.5, 0.5]


@pytest.mark.slow
def test_the_search_runs_and_goes_on(search, tmp_path):
    """Ten tiny runs, of which nine are found when the last one is made again."""
    search.run()
    tried = json.loads((tmp_path / "search" / "mixtures.json").read_text())
    best = json.loads((tmp_path / "search" / "best.json").read_text())
    assert len(tried) == 10 and sum(best.values()) == pytest.approx(1)
    losses = held_out_losses(RunFolder(tmp_path / "search" / "run-003"))
    assert tried[3]["loss"] == pytest.approx(np.mean(list(losses.values())))
    assert set(losses) == {"digits", "letters"}
    (tmp_path / "search" / "results.json").unlink()
    before = (tmp_path / "search" / "run-003" / "metrics.jsonl").stat().st_mtime_ns
    search.run()
    assert (tmp_path / "search" / "run-003" / "metrics.jsonl").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "search" / "mixtures.json").read_text()) == tried
