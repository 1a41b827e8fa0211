"""Pretraining text in the updates of `PolicyOptimization` (PPO-ptx)."""

from __future__ import annotations

from typing import Any

from lmjax.config import UserError
from lmjax.console import RunLog
from lmjax.jobs.text import prepare_text, print_rows
from lmjax.objectives import CausalLM, Objective, WeightedSum
from lmjax.parallel import axis_size
from lmjax.runs.folder import RunFolder
from lmjax.training.feed import TextFeed
from lmjax.training.learner import Learner, Metrics


def prepare_pretraining(
    job: Any, folder: RunFolder, log: RunLog, saved: dict[str, Any]
) -> TextFeed | None:
    """Rows of the pretraining text of each step; None where there is none.

    Args:
      job: a `PolicyOptimization`.
      folder, log, saved: see `TrainingJob.prepare`.
    """
    if (text := job.pretraining) is None:
        return None
    before = saved and {"step": saved["step"], **saved.get("pretraining", {})}
    stored = prepare_text(text, folder.tokenizer, job.model.vocab_size, log, before)
    feed = TextFeed(stored, text.plan(job.seed), CausalLM(), text.length, _rows_of_part(job))
    print_rows(log, feed)
    return feed


def with_pretraining(job: Any, learner: Learner) -> Objective:
    """The objective of an update: the policy's, with that of the text beside it.

    Args:
      job: a `PolicyOptimization`.
      learner: its learner.

    Raises:
      UserError: the rows of text do not divide among the devices.
    """
    if job.pretraining is None:
        return job.objective
    rows = _rows_of_part(job)
    if rows % (shards := axis_size(*learner.layout.axes("batch"))):
        raise UserError(
            f"pretraining.batch_size={job.pretraining.batch_size}: the {rows} rows of a part "
            f"do not divide among mesh.data x mesh.fsdp x mesh.expert = {shards} devices"
        )
    weights = 1.0, job.pretraining_weight
    return WeightedSum(objectives=(job.objective, CausalLM()), weights=weights)


def _rows_of_part(job: Any) -> int:
    """Rows of text that are computed at once."""
    return job.pretraining.batch_size // (job.updates * job.accumulation)


def policy_names(metrics: Metrics) -> Metrics:
    """Metrics of an update with text, those of the policy under the names that they have without.

    The losses keep their numbers: "loss_1" of the policy, "loss_2" of the text.
    """
    return {
        name if name == "loss_1" else name.removesuffix("_1"): value
        for name, value in metrics.items()
    }
