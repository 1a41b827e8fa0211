"""Plans beside compiled training steps for v4 chips that are not there."""

import functools
import importlib.util

import pytest

from lmjax.config import UserError
from lmjax.scaling.clusters import find_cluster
from lmjax.scaling.compiled import CompiledStep, compile_step, compiled_tables, described_devices
from lmjax.scaling.plan import StepPlan
from lmjax.scaling.plan_command import PlanCommand
from lmjax.scaling.program import CompiledProgram
from tests.lmjax.scaling.test_program import LOOP

TOPOLOGY = "v4:2x2x1"
# A billion parameters: compiling takes as long for fewer, of which less memory is arrays.
BILLION = {
    "model.num_layers": "16",
    "model.hidden": "2048",
    "model.attention.num_heads": "16",
    "model.attention.num_kv_heads": "none",
    "model.attention.head_dim": "128",
    "model.feed_forward.size": "5632",
    "data.length": "2048",
    "data.batch_size": "16",
    "accumulation": "1",
}
CASES = {
    "full": "mesh.fsdp=4 model.remat=full",
    "dots": "mesh.fsdp=4 model.remat=dots",
    "none": "mesh.fsdp=4 model.remat=none",
    "accumulation": "mesh.fsdp=4 model.remat=full accumulation=4",
    "zero 1": "mesh.fsdp=4 model.remat=full zero=1",
    "zero 2": "mesh.fsdp=4 model.remat=full zero=2 accumulation=2",
    "fsdp and tensor": "mesh.fsdp=2 mesh.tensor=2 model.remat=full",
    "tensor": "mesh.fsdp=1 mesh.tensor=4 model.remat=dots",
    "replicas": "mesh.fsdp=1 mesh.data=4 model.remat=full",
    "context": "mesh.fsdp=1 mesh.context=4 model.remat=dots data.batch_size=4",
    "adafactor": "mesh.fsdp=4 model.remat=full optimizer=Adafactor",
    "average": "mesh.fsdp=4 model.remat=full ema_decay=0.99",
}


@functools.cache
def planned(words):
    """A job and its plan on four v4 chips."""
    given = dict(word.split("=", 1) for word in words.split())
    settings = [f"{name}={value}" for name, value in (BILLION | given).items()]
    command = PlanCommand(experiment="experiments.llama_1b", topology=TOPOLOGY)
    job, plan, _ = command.made(settings, find_cluster(TOPOLOGY))
    return job, plan


def test_tables_show_both():
    _, plan = planned(CASES["full"])
    step = CompiledStep(100, 200, 10**9, 1.0, CompiledProgram(LOOP))
    memory, collectives, work = compiled_tables(plan, step)
    assert memory.rows[1][2] == "1.00"
    assert ("all-gather", "4", "inside 1 loops", "5") in [row[:4] for row in collectives.rows]
    assert len(work.rows) == 3


@pytest.mark.parametrize(("topology", "slices"), [("h100:4", 1), ("tpu7x:4", 1), ("v4:4", 2)])
def test_chips_that_are_not_described(topology, slices):
    _, plan = planned(CASES["full"])
    other = StepPlan(plan.workload, plan.division, find_cluster(topology, slices))
    with pytest.raises(UserError, match="compile=true"):
        described_devices(other)


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu"
)


@functools.cache
def compiled(name):
    """The plan of a case and its compiled step."""
    job, plan = planned(CASES[name])
    return plan, compile_step(job, plan)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_memory_is_near_the_compilers(name):
    """State to 1 percent, beside which are the batch and counters; all of it to 10 percent."""
    plan, step = compiled(name)
    memory = plan.memory
    state = memory.parameters + memory.optimizer + memory.average
    assert step.arguments == pytest.approx(state, rel=0.01)
    assert memory.total == pytest.approx(step.peak, rel=0.10)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_formula(name):
    plan, step = compiled(name)
    remat = plan.division.remat
    products = plan.workload.hardware_flops(remat) - plan.workload.attention_flops(remat)
    assert step.program.flops == pytest.approx(products * plan.tokens / 4, rel=0.05)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["full", "dots", "none", "accumulation", "fsdp and tensor"])
def test_weights_are_gathered_in_the_layers_loop(name):
    plan, step = compiled(name)
    expected = sum(t.bytes for t in plan.traffic if t.kind == "all-gather" and "layer" in t.what)
    inner = 2 if plan.division.microbatches > 1 else 1
    found = sum(
        one.sent
        for one in step.program.collectives
        if one.kind == "all-gather" and one.loops == inner
    )
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["fsdp and tensor", "tensor"])
def test_sums_over_tensor_are_those_of_the_formula(name):
    plan, step = compiled(name)
    expected = sum(t.bytes for t in plan.traffic if t.axis == "tensor")
    sums = [one for one in step.program.collectives if one.devices == plan.division.tensor]
    found = sum(one.sent for one in sums if one.kind == "all-reduce" and one.loops)
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@needs_compiler
def test_a_slice_that_there_is_not():
    _, plan = planned(CASES["full"])
    odd = StepPlan(plan.workload, plan.division, find_cluster("v4:3x5x7"))
    with pytest.raises(UserError, match="no slice v4:3x5x7"):
        described_devices(odd)
