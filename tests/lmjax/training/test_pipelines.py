"""Pipelines give the losses and gradients of one device, by every schedule, on every mesh."""

from __future__ import annotations

import functools
import itertools

import jax
import numpy as np
import pytest

from lmjax.alignment import LabelledAnswers, PreferencePairs, SimPO
from lmjax.config import UserError, replace
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    GatedFeedForwardConfig,
    RMSNormConfig,
    Rotary,
    TransformerConfig,
)
from lmjax.models.t5 import t5
from lmjax.objectives import CausalLM, PrefixLM, SpanCorruption
from lmjax.parallel import AXES, STAGE, Mesh, training_layout
from lmjax.scaling.division import Division
from lmjax.scaling.program import CompiledProgram
from lmjax.scaling.workload import Workload
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.pipelining import Pipeline
from lmjax.training.placement import abstract_example, to_devices
from lmjax.training.schedules import Cosine
from tests.collectives import of_program, program_text

STEPS, ROWS, LENGTH, VOCABULARY = 10, 16, 16, 97
RATE = Cosine(peak=1e-2, warmup=3).build(STEPS)
SIZES = {"vocab_size": VOCABULARY, "hidden": 32, "num_layers": 4, "max_length": LENGTH}
GPT = TransformerConfig(
    **SIZES,
    attention=AttentionConfig(num_heads=4, head_dim=8, dropout=0.1),
    feed_forward=FeedForwardConfig(size=64),
    dropout=0.1,
)
LLAMA = TransformerConfig(
    **SIZES,
    attention=AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=8, bias=False, positions=Rotary(), windows=(8, None)
    ),
    feed_forward=GatedFeedForwardConfig(size=64),
    norm=RMSNormConfig(),
    positions=None,
    tied_head=False,
    remat="full",
)
PREFIX = replace(LLAMA, attention=replace(LLAMA.attention, windows=(None,)), remat="dots")
CASES = {
    "gpt": (GPT, CausalLM(z_loss=1e-3)),
    "llama": (LLAMA, CausalLM()),
    "prefix": (PREFIX, PrefixLM()),
}


def examples(objective):
    """Packed rows whose documents end at random places."""
    generator, length = np.random.default_rng(0), objective.row_length(LENGTH)
    for _ in range(STEPS):
        tokens = generator.integers(0, VOCABULARY, (ROWS, length)).astype(np.int32)
        ends = generator.random((ROWS, length)) < 0.1
        segments = 1 + np.cumsum(ends, axis=1).astype(np.int32)
        seeds = generator.integers(0, 2**63, ROWS, np.uint64)
        yield objective.prepare(tokens, segments, seeds, None, LENGTH)


def learner_of(model, objective, context="gather", **settings):
    """A learner with AdamW, of batches in 4 parts."""
    layout = training_layout(context)
    return Learner(model, objective, AdamW(), RATE, layout, microbatch=ROWS // 4, **settings)


def train(case, mesh, **settings):
    """Losses and held-out losses of 10 steps, and gradients of the first, on a mesh."""
    model, objective = CASES[case]
    devices = np.prod([getattr(mesh, axis) for axis in AXES])
    with jax.set_mesh(mesh.build(jax.devices()[:devices])):
        learner, found = learner_of(model, objective, **settings), []

        def step(state, example):
            held_out, seen = learner.evaluate(state.params, example), []
            gradients = learner.gradients

            def kept(*inputs):
                seen.append(gradients(*inputs))
                return seen[0]

            object.__setattr__(learner, "gradients", kept)
            state, metrics = learner.step(state, example)
            object.__setattr__(learner, "gradients", gradients)
            return state, (metrics["loss"], held_out.loss / held_out.weight), seen[0][0]

        step, state, first = jax.jit(step), learner.init(seed=0), None
        for example in examples(objective):
            state, losses, d = step(state, to_devices(example, learner.layout, VOCABULARY))
            first = jax.tree.map(np.asarray, d) if first is None else first
            found.append(losses)
    return np.array(found), first


@functools.cache
def one_device(case):
    """The same on one device, with as many microbatches: dropout is the same."""
    return train(case, Mesh(fsdp=1))


def check(case, mesh, **settings):
    """Holds a mesh to one device: float32 sums in another order, amplified by 10 steps."""
    (expected, gradients), (losses, found) = one_device(case), train(case, mesh, **settings)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    top = max(float(np.max(np.abs(d))) for d in jax.tree.leaves(gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * top), found, gradients
    )


MESHES = {
    "sequences": Mesh(fsdp=2, context=2, tensor=2),
    "stage": Mesh(stage=2, fsdp=1),
    "data": Mesh(stage=2, data=2, fsdp=1),
    "fsdp": Mesh(stage=2, fsdp=2),
    "tensor": Mesh(stage=2, fsdp=1, tensor=2),
    "context": Mesh(stage=2, fsdp=1, context=2),
    "data-fsdp": Mesh(stage=2, data=2, fsdp=2),
    "fsdp-tensor": Mesh(stage=2, fsdp=2, tensor=2),
    "context-tensor": Mesh(stage=2, fsdp=1, context=2, tensor=2),
    "stages-data": Mesh(stage=4, data=2, fsdp=1),
    "stages-tensor": Mesh(stage=4, fsdp=1, tensor=2),
}
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb_h1", "zb_v")
FEW = [("llama", "data-fsdp", "1f1b")]


def is_possible(case, mesh, schedule):
    """Returns whether 4 layers hold whole periods of windows on each part."""
    chunks = 2 if schedule in ("interleaved", "zb_v") else 1
    period = 2 if case == "llama" else 1
    return 4 % (MESHES[mesh].stage * chunks * period) == 0


def many():
    """Every schedule beside every other axis, with one of the models in turn."""
    turns = itertools.cycle(CASES)
    pipelines = ("data-fsdp", "context-tensor", "stages-data", "stages-tensor")
    for mesh, schedule in itertools.product(pipelines, SCHEDULES):
        case = next(case for case in turns if case != "llama" or is_possible(case, mesh, schedule))
        if is_possible(case, mesh, schedule) and (case, mesh, schedule) not in FEW:
            yield case, mesh, schedule


@pytest.mark.parametrize(("case", "mesh", "schedule"), FEW)
def test_a_pipeline_gives_the_losses_and_gradients_of_one_device(case, mesh, schedule):
    check(case, MESHES[mesh], pipeline=Pipeline(schedule=schedule))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "mesh", "schedule"), [*many(), ("gpt", "fsdp-tensor", "interleaved")]
)
def test_every_schedule_beside_every_axis(case, mesh, schedule):
    check(case, MESHES[mesh], pipeline=Pipeline(schedule=schedule))


@pytest.mark.parametrize(
    ("mesh", "context"),
    [
        ("sequences", "ring"),
        pytest.param("sequences", "all_to_all", marks=pytest.mark.slow),
        pytest.param("context", "all_to_all", marks=pytest.mark.slow),
    ],
)
def test_attention_over_divided_sequences(mesh, context):
    """In a pipeline, and without one; the prefix is of ranks, and keys are grouped."""
    check("prefix", MESHES[mesh], context=context)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2])
def test_parameters_gathered_once_or_by_stage(zero):
    check("gpt", MESHES["fsdp"], zero=zero)


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
    "trainable": (dict(trainable=lambda path: "bias" in path), "`trainable` only some"),
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
            learner.check_division([ROWS], abstract_example(shapes, layout))


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
