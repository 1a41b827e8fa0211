"""Refusals of what pipelines and divided sequences cannot train, before the first step."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from lmjax.config import UserError
from lmjax.models import TransformerConfig
from lmjax.models.stretches import pattern
from lmjax.objectives import Example, Objective
from lmjax.parallel import STAGE, axis_size
from lmjax.parallel.schedules import PipelineSchedule
from lmjax.training.gradients import count_microbatches
from lmjax.training.learner import Learner


def check_stages(learner: Learner) -> None:
    """Raises UserError where stages of the mesh would train some of the parameters."""
    if axis_size(STAGE) > 1 and not learner.trains_all:
        raise UserError(
            f"mesh.stage={axis_size(STAGE)}: a pipeline trains all parameters, and `trainable`"
            " only some"
        )


def check_division(learner: Learner, rows: Sequence[int], example: Example) -> None:
    """Checks that pipelines and divided sequences can train a model with its loss.

    A mesh must be set.

    Args:
      learner: has the model and the loss.
      rows: numbers of rows that examples have.
      example: one as shapes with shardings.

    Raises:
      UserError: what cannot be trained so.
    """
    stages, sequences = axis_size(STAGE), axis_size(*learner.layout.axes("seq"))
    if stages > 1:
        _check_pipeline(learner, rows)
    if stages > 1 or (sequences > 1 and learner.layout.context != "gather"):
        jax.eval_shape(learner.step, learner.abstract(), example)


def _check_pipeline(learner: Learner, rows: Sequence[int]) -> None:
    check_stages(learner)
    where, layout = f"mesh.stage={axis_size(STAGE)}", learner.layout
    if layout.axes("seq") and layout.context == "ring":
        # Permutations are one operation of all stages, of which each takes its own branch.
        raise UserError(
            f"{where}: keys cannot go around in a ring inside of a stage; set "
            "context=all_to_all, or gather"
        )
    for number in sorted(set(rows)):
        made = learner.pipeline.made(count_microbatches(number, learner.microbatch, layout))
        _check_model(learner.model, made)
    if learner.frozen:
        names = ", ".join(learner.frozen)
        raise UserError(f"{where}: the loss reads further models ({names}): a pipeline has one")
    if type(learner.objective).batch_sums is not Objective.batch_sums:
        raise UserError(
            f"{where}: with {type(learner.objective).__name__} the loss of a row depends on other "
            "rows of its batch, which a pipeline sees in parts"
        )


def _check_model(model: TransformerConfig, made: PipelineSchedule) -> None:
    """Raises UserError for a model that no pipeline with this schedule can hold."""
    parts, layers = len(made.holder), model.num_layers
    where = f"mesh.stage={made.stages}"
    if made.chunks > 1:
        where += f" times {made.chunks} parts on each (pipeline.schedule={made.name})"
    if model.depth != layers:
        raise UserError(
            f"{where}: a pipeline holds one stack of blocks, and this model has an encoder beside "
            "its decoder; use mesh.fsdp, mesh.tensor and mesh.context"
        )
    if model.remat == "offload":
        raise UserError(
            f"{where}: what a pipeline keeps lies in slots on the devices, and model.remat=offload "
            "wants it in the host's memory; use model.remat=full"
        )
    if layers % parts:
        raise UserError(f"{where}: model.num_layers={layers} does not divide into {parts} parts")
    if (layers // parts) % (period := len(pattern(model.windows, model.group))):
        raise UserError(
            f"{where}: windows or kinds of layers repeat every {period} layers, and a part of the"
            f" pipeline has {layers // parts}: each must hold whole periods"
        )
