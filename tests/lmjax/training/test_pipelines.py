"""Pipelines and divided sequences give the losses and gradients of one device.

`test_combinations` has the other meshes, and every schedule.
"""

from __future__ import annotations

import jax
import pytest

from lmjax.alignment import LabelledAnswers, PreferencePairs, SimPO
from lmjax.config import UserError, replace
from lmjax.models.t5 import t5
from lmjax.objectives import CausalLM, SpanCorruption
from lmjax.parallel import STAGE, Mesh, training_layout
from lmjax.scaling.division import Division
from lmjax.scaling.program import CompiledProgram
from lmjax.scaling.workload import Workload
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.pipeline_checks import check_division
from lmjax.training.pipelining import Pipeline
from lmjax.training.placement import abstract_example
from lmjax.training.trained_part import TrainedPart
from tests.collectives import of_program, program_text
from tests.lmjax.training.combinations import (
    GPT,
    LENGTH,
    LLAMA,
    RATE,
    ROWS,
    VOCABULARY,
    check,
    learner_of,
)


def test_a_pipeline_gives_the_losses_and_gradients_of_one_device():
    check("llama", dict(stage=2, data=2, fsdp=2))


SEQUENCES = dict(fsdp=2, context=2, tensor=2)


@pytest.mark.parametrize(
    ("sizes", "context"),
    [
        (SEQUENCES, "ring"),
        pytest.param(SEQUENCES, "all_to_all", marks=pytest.mark.slow),
        pytest.param(dict(stage=2, context=2), "all_to_all", marks=pytest.mark.slow),
    ],
)
def test_attention_over_divided_sequences(sizes, context):
    """In a pipeline, and without one; the prefix is of ranks, and keys are grouped.

    Beside the ring, `tensor` divides what lies between the layers along the sequence too.
    """
    check("prefix", sizes, context=context, sequence_parallel=context == "ring")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2])
def test_parameters_gathered_once_or_by_stage(zero):
    check("gpt", dict(stage=2, fsdp=2), zero=zero)


@pytest.mark.slow
def test_two_streams_go_through_the_stages_together():
    check("xlnet", dict(stage=2, data=2))


REFUSED = {
    "layers": (dict(model=replace(GPT, num_layers=3)), "model.num_layers=3 does not divide into 2"),
    "offload": (dict(model=replace(GPT, remat="offload")), "use model.remat=full"),
    "windows": (
        dict(model=LLAMA, pipeline=Pipeline(schedule="interleaved")),
        "windows or kinds of layers repeat every 2 layers, and a part of the pipeline has 1",
    ),
    "microbatches": (dict(microbatch=ROWS), "1 microbatches for 2 stages: .*accumulation is"),
    "ring": (
        dict(layout=training_layout("ring"), mesh=Mesh(stage=2, context=2, fsdp=1)),
        "cannot go around in a ring",
    ),
    "trainable": (dict(trained=TrainedPart(lambda path: "bias" in path)), "`trainable` only some"),
    "encoder": (
        dict(model=replace(t5("small"), vocab_size=VOCABULARY), objective=SpanCorruption()),
        "an encoder beside its decoder",
    ),
    "wanted answers": (dict(objective=LabelledAnswers()), "depends on other rows of its batch"),
    "two passes": (
        dict(objective=PreferencePairs(preference=SimPO()), microbatch=ROWS // 4),
        "runs the model 2 times",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_pipeline_trains_is_refused_before_a_step(case):
    given, message = REFUSED[case]
    regular = {"optimizer": AdamW(), "rate": RATE, "microbatch": ROWS // 4}
    regular |= {"model": GPT, "objective": CausalLM(), "layout": training_layout()}
    settings = regular | given
    mesh = settings.pop("mesh", Mesh(stage=2, fsdp=1))
    with jax.sharding.use_abstract_mesh(mesh.abstract(2 * mesh.context)):
        learner, layout = Learner(**settings), settings["layout"]
        shapes = settings["objective"].shapes(ROWS, LENGTH)
        with pytest.raises(UserError, match=message):
            check_division(learner, [ROWS], abstract_example(shapes, layout))


@pytest.mark.parametrize("schedule", [pytest.param("1f1b", marks=pytest.mark.slow), "zb_h1"])
def test_collectives_in_a_branch_stay_on_their_stage(schedule):
    """Each stage takes its branches alone: one that waits for another in them would hang."""
    mesh = Mesh(stage=2, data=2, fsdp=1, tensor=2).build(jax.devices()[:8])
    objective = CausalLM()
    with jax.set_mesh(mesh):
        learner = learner_of(GPT, objective, pipeline=Pipeline(schedule=schedule))
        example = abstract_example(objective.shapes(ROWS, LENGTH), learner.layout)
        text = program_text(learner.step, learner.abstract(), example)
        found = of_program(text, mesh)
    inside = [transfer for transfer in found if transfer.in_branch]
    assert {transfer.axes for transfer in inside} == {("tensor",)}
    # Parameters and gradients enter and leave the stages as they are divided.
    assert not any(t.kind == "all-gather" and not t.loops for t in found)
    # Between the ticks' branches, one message each way; its own chunk's message moves nowhere.
    messages = [transfer for transfer in found if transfer.kind == "collective-permute"]
    assert [transfer.axes for transfer in messages] == [(STAGE,)] * 2
    # Over `data`, gradients are added up once, after the last tick.
    sums = [t for t in found if "data" in t.axes and t.size > ROWS]
    assert sums
    assert not any(transfer.loops for transfer in sums)
    check_flops(text, schedule, mesh.size)


def check_flops(text, schedule, devices):
    """Holds the products of a step to what its passes have: nothing is computed twice in zb_h1."""
    division = Division(stage=2, schedule=schedule, microbatches=4)
    taken = division.microbatches * division.parts / division.ticks
    parts = Workload(GPT, LENGTH, ROWS, float(ROWS * LENGTH)).forward_parts
    passes = 3 if division.split else 4
    # Attention on CPUs computes all pairs, and tied tables have 128 rows. A branch in a branch
    # counts as always taken: the head as if each stage had it.
    pairs = 2 * 2 * GPT.hidden * LENGTH * GPT.num_layers
    head = 2 * 3 * 2 * GPT.padded_vocab * GPT.hidden
    expected = passes * (parts["products"] + pairs) + head
    found = CompiledProgram(text, taken).flops * devices / (ROWS * LENGTH)
    assert found == pytest.approx(expected, rel=1e-3)
