"""Checks of the settings of `PolicyOptimization`."""

from __future__ import annotations

from typing import Any

from lmjax.config import UserError
from lmjax.generation.sampling import Sampling
from lmjax.jobs.settings import at_least
from lmjax.objectives import CausalLM


def check_settings(job: Any) -> None:
    """Raises UserError for settings that do not go together.

    Args:
      job: a `PolicyOptimization`, whose module imports this one.
    """
    if not job.rewards:
        raise UserError("rewards: give at least one")
    at_least(1, job, "samples", "reply_length", "epochs", "updates")
    if job.begin_with is None:
        raise UserError("begin_with: the policy, and the reference that it is held to")
    if job.sampling != Sampling(temperature=job.sampling.temperature):
        raise UserError(
            "sampling: the temperature alone may be set; other filters draw from another "
            "distribution than the one that is trained"
        )
    if job.objective.temperature != job.sampling.temperature:
        raise UserError(
            f"objective.temperature={job.objective.temperature} and sampling.temperature="
            f"{job.sampling.temperature} must be the same"
        )
    if job.reward_kl is not None and job.objective.kl:
        raise UserError(
            f"objective.kl={job.objective.kl} and reward_kl: the divergence would count "
            "twice; set one of them"
        )
    if job.stop_kl is not None and job.stop_kl <= 0:
        raise UserError(f"stop_kl={job.stop_kl}: must be above 0, or none")
    _check_critic(job)
    if job.data.rows != "groups" or job.data.ramp:
        raise UserError("requests are read with data.rows=groups, and without a ramp")
    if job.replies % job.updates:
        raise UserError(f"{job.replies} replies of a step do not divide into updates={job.updates}")
    _check_pretraining(job)


def _check_critic(job: Any) -> None:
    """Raises UserError for advantages that cannot be had."""
    if not 0 <= job.gae_lambda <= 1:
        raise UserError(f"gae_lambda={job.gae_lambda}: must be between 0 and 1")
    at_least(0, job, "value_warmup")
    for name in ("value_warmup", "value_network"):
        if (value := getattr(job, name)) and not job.has_critic:
            shown = value if name == "value_warmup" else type(value).__name__
            raise UserError(f"{name}={shown}: advantage=gae alone has a critic")
    if job.samples == 1 and not job.has_critic:
        raise UserError(
            f"samples=1: advantage={job.advantage} compares a reply with the others to its request,"
            " and nothing would be learnt; give at least 2, or advantage=gae"
        )


def _check_pretraining(job: Any) -> None:
    """Raises UserError for pretraining text that does not go together with the updates."""
    if (text := job.pretraining) is None:
        return
    if job.pretraining_weight <= 0:
        raise UserError(f"pretraining_weight={job.pretraining_weight}: must be above 0")
    parts = job.updates * job.accumulation
    if text.ramp or text.batch_size % parts:
        raise UserError(
            f"pretraining.batch_size={text.batch_size} must divide into updates={job.updates} "
            f"x accumulation={job.accumulation} parts, without a ramp"
        )


def check_policy(job: Any) -> None:
    """Raises UserError for a model that does not go with the other settings.

    Args:
      job: a `PolicyOptimization` with a model.
    """
    if job.has_value_head and not job.trained().trains("heads.value.outputs.weight"):
        raise UserError("trainable: the critic of advantage=gae, heads.value, is not trained")
    longest = job.model.max_length
    if longest is not None and job.length > longest:
        raise UserError(
            f"data.length={job.data.length} and reply_length={job.reply_length} are more "
            f"than model.max_length={longest}"
        )
    if job.pretraining is not None:
        CausalLM().check(job.model)
        if longest is not None and job.pretraining.length > longest:
            raise UserError(
                f"pretraining.length={job.pretraining.length} is more than model.max_length="
                f"{longest}"
            )
