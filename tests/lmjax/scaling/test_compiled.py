"""Plans beside compiled training steps for v4 chips that are not there."""

import functools
import importlib.util

import pytest

from lmjax.config import UserError
from lmjax.scaling.clusters import find_cluster
from lmjax.scaling.compiled import CompiledStep, compile_step, compiled_tables, described_devices
from lmjax.scaling.plan_command import PlanCommand
from lmjax.scaling.program import Program
from tests.lmjax.scaling.test_program import LOOP

TOPOLOGY = "v4:2x2x1"
SMALL = (
    "model.num_layers=4",
    "model.hidden=512",
    "model.attention.num_heads=4",
    "model.attention.num_kv_heads=none",
    "model.attention.head_dim=128",
    "model.feed_forward.size=1408",
    "data.length=1024",
    "data.batch_size=16",
    "accumulation=1",
)


@functools.cache
def planned(*words):
    """A job and its plan on four v4 chips."""
    command = PlanCommand(experiment="experiments.llama_1b", topology=TOPOLOGY)
    names = [word.partition("=")[0] for word in words]
    own = [word for word in SMALL if word.partition("=")[0] not in names]
    job, plan, _ = command.made([*own, *words], find_cluster(TOPOLOGY))
    return job, plan


def test_tables_show_both():
    _, plan = planned("mesh.fsdp=4")
    step = CompiledStep(100, 200, 10**9, 1.0, Program(LOOP))
    memory, collectives, work = compiled_tables(plan, step)
    assert memory.rows[1][2] == "1.00"
    assert ("all-gather", "4", "inside 1 loops", "5") in [row[:4] for row in collectives.rows]
    assert len(work.rows) == 3


def test_chips_that_are_not_described():
    _, plan = planned("mesh.fsdp=4")
    for topology, slices in (("h100:4", 1), ("tpu7x:4", 1), ("v4:4", 2)):
        other = plan.__class__(plan.workload, plan.division, find_cluster(topology, slices))
        with pytest.raises(UserError, match="compile=true"):
            described_devices(other)


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu"
)


@functools.cache
def compiled(*words):
    """The plan and the compiled step."""
    job, plan = planned(*words)
    return plan, compile_step(job, plan)


MESHES = {
    "fsdp": ("mesh.fsdp=4", "model.remat=full"),
    "replicas": ("mesh.data=4", "mesh.fsdp=1", "model.remat=dots"),
    "tensor": ("mesh.fsdp=2", "mesh.tensor=2", "model.remat=dots"),
}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", MESHES)
def test_the_state_takes_what_the_formula_says(name):
    """Beside it are the batch and the optimizer's counters: less than a hundredth."""
    plan, step = compiled(*MESHES[name])
    state = plan.memory.parameters + plan.memory.optimizer
    assert step.arguments == pytest.approx(state, rel=0.01)


@pytest.mark.slow
@needs_compiler
def test_a_slice_that_there_is_not():
    _, plan = planned("mesh.fsdp=4")
    odd = plan.__class__(plan.workload, plan.division, find_cluster("v4:3x5x7"))
    with pytest.raises(UserError, match="no slice v4:3x5x7"):
        described_devices(odd)
