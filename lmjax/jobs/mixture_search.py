"""Search for the best mixture by many tiny runs and a regression over them (RegMix)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from lmjax.config import UserError, config, replace
from lmjax.console import RunLog, Table, make_console
from lmjax.data import TokenizerFolder
from lmjax.evaluation.held_out import HELD_OUT
from lmjax.jobs.job import Job
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.report import write_report
from lmjax.jobs.results import Results
from lmjax.jobs.text import prepare_text
from lmjax.launch import on_first
from lmjax.remote import is_url
from lmjax.runs.folder import RESULTS, RunFolder
from lmjax.runs.lock import lock_run_folder
from lmjax.scaling.mixture_regression import (
    FOLDS,
    MixtureFit,
    best_mixture,
    draw_mixtures,
    fit_mixtures,
)

UNSURE = 0.7  # rank correlation below which a remark is made
LEAST = 0.002  # share of each domain in a run: all stay domains that are trained on
MIXTURES = "mixtures.json"  # shares and loss of each run
BEST = "best.json"  # the shares that were found


@config
class MixtureSearch(Job):
    """Search for the shares of domains with which held-out losses are lowest.

    RegMix (Liu et al. 2024, arXiv:2407.01492): `experiment`, with a tiny model, is run on many
    random mixtures of its domains, a regression learns their held-out losses, and the mixtures with
    the lowest predicted ones are averaged. The order of mixtures hardly depends on the size of a
    model (the paper: 512 runs of a million parameters and a billion tokens, rank correlation 0.97
    with runs of a billion parameters). The command goes on after an interruption, run by run.
    """

    experiment: Pretrain  # of a tiny model; its weights are the prior, its output is of no concern
    runs: int = 32  # mixtures that are tried
    target: tuple[str, ...] = ()  # domains whose mean held-out loss counts; empty: all
    # of the random mixtures, between which they are drawn; of large ones they are near the prior
    strengths: tuple[float, float] = (0.1, 5.0)
    simulated: int = 100_000  # mixtures whose loss is predicted
    averaged: int = 100  # of these, the best ones, whose mean is the result
    seed: int = 0  # of the mixtures

    def validate(self) -> None:
        """Raises UserError for settings that cannot be meant."""
        names = [domain.name for domain in self.experiment.data.train]
        if is_url(self.output):
            raise UserError(f"output={self.output}: the folder of a search is on this machine")
        if len(names) < 2:
            raise UserError("experiment.data.train: a search needs two domains or more")
        if unknown := set(self.target) - set(names):
            raise UserError(f"target: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        if self.experiment.data.stages:
            raise UserError("experiment.data.stages: one mixture is searched for, without stages")
        if self.runs < 2 * FOLDS or not 1 <= self.averaged <= self.simulated:
            raise UserError(
                f"runs={self.runs}, averaged={self.averaged}, simulated={self.simulated}: must be "
                f"{2 * FOLDS} or more, and rise from 1"
            )
        if not 0 < self.strengths[0] <= self.strengths[1]:
            raise UserError(f"strengths={self.strengths}: give two rising numbers above 0")
        if any(domain.weight <= 0 for domain in self.experiment.data.train):
            raise UserError("experiment.data.train: each domain needs a weight above 0, the prior")

    def run(self) -> None:
        """See `Job.run`."""
        log = RunLog(make_console())
        with lock_run_folder(self) as folder:
            log.title(folder.path.name, folder.location)
            if not folder.results():
                data, model = self.experiment.data, self.experiment.model
                prepare_text(data, folder.tokenizer, model.vocab_size, log, {})
                shares = self.mixtures()
                losses = np.array([self._loss(folder, n, row, log) for n, row in enumerate(shares)])
                fit = fit_mixtures(shares, losses, self.seed)
                settings = self.simulated, self.averaged, self.seed
                best = best_mixture(fit, self.prior(), *settings)
                on_first(lambda: self._write(folder, shares, losses, fit, best))
            for table in Results.from_json(folder.results()).tables:
                if table.picture is None:
                    log.table(table)
            log.files(
                folder.path,
                [(BEST, "the shares that were found"), ("the report", str(folder.report))],
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the domains."""
        return tuple(domain.name for domain in self.experiment.data.train)

    def prior(self) -> Float[np.ndarray, "domains"]:
        """The experiment's own shares."""
        weights = np.array([domain.weight for domain in self.experiment.data.train], float)
        return weights / weights.sum()

    def mixtures(self) -> Float[np.ndarray, "runs domains"]:
        """Shares of each run; the first one has the prior's."""
        drawn = draw_mixtures(self.prior(), self.runs - 1, self.seed, self.strengths, LEAST)
        return np.concatenate([self.prior()[None], drawn])

    def job(self, folder: Path, number: int, shares: Sequence[float]) -> Pretrain:
        """The run of a mixture."""
        experiment = self.experiment
        domains = tuple(
            replace(domain, weight=round(float(share), 6))
            for domain, share in zip(experiment.data.train, shares, strict=True)
        )
        tokenizer = TokenizerFolder(path=str(RunFolder(folder).tokenizer))
        data = replace(experiment.data, train=domains, tokenizer=tokenizer, shares=None)
        return replace(experiment, output=str(folder / f"run-{number:03}"), data=data)

    def _loss(self, folder: RunFolder, number: int, shares: np.ndarray, log: RunLog) -> float:
        """Mean held-out loss of a run, which is made where it is not there."""
        job = self.job(folder.path, number, shares.tolist())
        log.heading(f"Mixture {number + 1} of {self.runs}", _words(self.names, shares))
        job.run()
        if number % 16 == 15:
            jax.clear_caches()  # programs of many runs pile up
        losses = held_out_losses(RunFolder(job.output))
        return float(np.mean([losses[name] for name in self.target or self.names]))

    def _write(
        self,
        folder: RunFolder,
        shares: np.ndarray,
        losses: np.ndarray,
        fit: MixtureFit,
        best: np.ndarray,
    ) -> None:
        found = dict(zip(self.names, best.tolist(), strict=True))
        folder.write(BEST, json.dumps(found, indent=1))
        tried = [
            {"shares": dict(zip(self.names, row.tolist(), strict=True)), "loss": loss}
            for row, loss in zip(shares, losses.tolist(), strict=True)
        ]
        folder.write(MIXTURES, json.dumps(tried, indent=1))
        tables = search_tables(self.names, shares, losses, fit, best)
        tiles = (
            ("runs", f"{len(losses)}"),
            ("rank correlation, unseen mixtures", f"{fit.correlations[fit.name]:.3f}"),
            ("regression", fit.name),
        )
        folder.write_json(RESULTS, Results(step=1, tables=tables, tiles=tiles).to_json())
        write_report(folder)


def held_out_losses(folder: RunFolder) -> dict[str, float]:
    """The last bits per byte on each held-out set, or the loss where there are none.

    UserError: the run has evaluated nothing.
    """
    found = {}
    for record in folder.metrics():
        if record["split"].startswith(HELD_OUT):
            name = record["split"].removeprefix(HELD_OUT)
            found[name] = record.get("bits_per_byte", record["loss"])
    if not found:
        raise UserError(f"{folder.location} has no held-out loss: see data.held_out, evaluation")
    return found


def search_tables(
    names: Sequence[str],
    shares: np.ndarray,
    losses: np.ndarray,
    fit: MixtureFit,
    best: np.ndarray,
) -> tuple[Table, ...]:
    """Tables of a search: what it found, how well the regression ranks, and all runs."""
    lowest = shares[int(losses.argmin())]
    mixtures = [("found", best), ("best run", lowest), ("prior", shares[0])]
    values = [float(fit.predict(row[None])[0]) for _, row in mixtures]
    rows = tuple((name, *(float(row[at]) for _, row in mixtures)) for at, name in enumerate(names))
    columns = ("domain", *(name for name, _ in mixtures))
    told = ", ".join(f"{name} {value:.4f}" for (name, _), value in zip(mixtures, values))
    notes = [f"Losses as the regression predicts them: {told}."]
    if fit.correlations[fit.name] < UNSURE:
        notes.append("The regression ranks unseen mixtures badly: try more runs, or longer ones.")
    outside = np.minimum(shares.min(0), best) < shares.min(0) - 1e-3
    if outside.any():
        some = ", ".join(name for name, out in zip(names, outside) if out)
        notes.append(f"No run had as little of {some} as the mixture that was found.")
    kinds = tuple(fit.correlations.items())
    order = np.argsort(losses)
    runs = tuple(
        (_words(names, shares[n]), float(losses[n]), float(fit.predicted[n])) for n in order
    )
    line = tuple((f"{losses[n]:.4f}", float(fit.predicted[n]), float(losses[n])) for n in order)
    return (
        Table("Mixture", columns, rows, "Shares of the domains.", notes=tuple(notes)),
        Table(
            "Rank correlation",
            ("regression", "Spearman"),
            kinds,
            f"Of losses with those predicted for mixtures that were left out, in {FOLDS} parts.",
            more_is_better=True,
        ),
        Table("Runs", ("mixture", "loss", "predicted"), runs, "Predicted without this run."),
        Table(
            "Prediction",
            ("loss", "predicted", "as it was"),
            line,
            "Of each run, by one fit that had not seen it.",
            picture="lines",
        ),
    )


def _words(names: Sequence[str], shares: np.ndarray) -> str:
    return ", ".join(f"{name} {share:.3f}" for name, share in zip(names, shares))
