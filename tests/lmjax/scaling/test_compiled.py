"""Plans beside compiled training steps for v4 chips that are not there."""

import functools
import importlib.util

import pytest

from lmjax.config import UserError
from lmjax.parallel import Mesh
from lmjax.scaling.clusters import find_cluster
from lmjax.scaling.compiled import CompiledStep, compile_step, compiled_tables, described_devices
from lmjax.scaling.plan import StepPlan
from lmjax.scaling.plan_command import PlanCommand
from lmjax.scaling.program import CompiledProgram
from tests.collectives import of_program
from tests.lmjax.scaling.test_program import LOOP

TOPOLOGY = "v4:2x2x1"
# Many narrow layers, which are in the program once, and few tokens: of wider ones and more the
# compiler makes longer kernels; of fewer layers less memory is arrays.
MODEL = {
    "model.num_layers": "64",
    "model.hidden": "1024",
    "model.attention.num_heads": "8",
    "model.attention.num_kv_heads": "none",
    "model.attention.head_dim": "128",
    "model.feed_forward.size": "2048",
    "data.length": "512",
    "data.batch_size": "16",
    "accumulation": "1",
}
EXPERTS = "model.feed_forward=Experts model.feed_forward.experts=8 model.feed_forward.size=768"
CAPACITY = "model.feed_forward.router.capacity=1.25"
# What is kept for the gradients of weights is counted with all of it.
ZERO_BUBBLE = "model.remat=none accumulation=4"
CASES = {
    # With few rows, activations are smaller than what `check_copies` looks for.
    "full": "mesh.fsdp=4 model.remat=full data.batch_size=8",
    "dots": "mesh.fsdp=4 model.remat=dots",
    "none": "mesh.fsdp=4 model.remat=none",
    "accumulation": "mesh.fsdp=4 model.remat=full accumulation=4",
    "zero 1": "mesh.fsdp=4 model.remat=full zero=1",
    "zero 2": "mesh.fsdp=4 model.remat=full zero=2 accumulation=2",
    "fsdp and tensor": "mesh.fsdp=2 mesh.tensor=2 model.remat=full data.batch_size=8",
    "sequence": "mesh.fsdp=1 mesh.tensor=4 model.remat=full sequence_parallel=true",
    "tensor": "mesh.fsdp=1 mesh.tensor=4 model.remat=dots",
    "replicas": "mesh.fsdp=1 mesh.data=4 model.remat=full ema_decay=0.99",
    "context": "mesh.fsdp=1 mesh.context=4 model.remat=dots data.length=2048 data.batch_size=4",
    "adafactor": "mesh.fsdp=4 model.remat=full optimizer=Adafactor weights=bfloat16",
    "pipeline": "mesh.fsdp=2 mesh.stage=2 model.remat=full accumulation=4",
    "zb_h1": f"{ZERO_BUBBLE} pipeline.schedule=zb_h1 mesh.fsdp=2 mesh.stage=2",
    "zb_v": f"{ZERO_BUBBLE} pipeline.schedule=zb_v mesh.fsdp=2 mesh.stage=2",
    "zb_h1 of four stages": f"{ZERO_BUBBLE} pipeline.schedule=zb_h1 mesh.fsdp=1 mesh.stage=4",
    "experts": f"{EXPERTS} mesh.fsdp=2 mesh.expert=2 model.remat=full",
    "capacity": f"{EXPERTS} {CAPACITY} mesh.fsdp=1 mesh.expert=4 model.remat=full",
}


@functools.cache
def planned(words):
    """A job and its plan on four v4 chips."""
    given = dict(word.split("=", 1) for word in words.split())
    # The kind of a layer comes before its settings.
    given = {name: given[name] for name in given if name == "model.feed_forward"} | MODEL | given
    settings = [f"{name}={value}" for name, value in given.items()]
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
def test_the_compiled_step_is_as_planned(name):
    """Memory and products, and of some cases what is sent: one test, as compiling is slow."""
    plan, step = compiled(name)
    check_memory(plan, step)
    # The compiler counts nothing of what is in a kernel, as experts' products are.
    if name != "experts":
        check_products(plan, step)
    for check in FURTHER.get(name, ()):
        check(plan, step)


def check_memory(plan, step):
    """State to 1 percent, beside which are the batch and counters; all of it to 10 percent."""
    memory = plan.memory
    state = memory.parameters + memory.optimizer + memory.average
    assert step.arguments == pytest.approx(state, rel=0.01)
    assert memory.total == pytest.approx(step.peak, rel=0.10)


def check_products(plan, step):
    division = plan.division
    products = plan.workload.hardware_flops(division) - plan.workload.attention_flops(division)
    assert step.program.flops == pytest.approx(products * plan.tokens / 4, rel=0.05)


def check_gathers(plan, step):
    """Weights are gathered in the loop over layers."""
    expected = sum(t.bytes for t in plan.traffic if t.kind == "all-gather" and "layer" in t.what)
    inner = 2 if plan.division.microbatches > 1 else 1
    found = sum(
        one.sent
        for one in step.program.collectives
        if one.kind == "all-gather" and one.loops == inner
    )
    assert found == pytest.approx(expected, rel=0.05)


def check_sums(plan, step):
    """Sums over `tensor`."""
    expected = sum(t.bytes for t in plan.traffic if t.axis == "tensor")
    sums = [one for one in step.program.collectives if one.devices == plan.division.tensor]
    found = sum(one.sent for one in sums if one.kind == "all-reduce" and one.loops)
    assert found == pytest.approx(expected, rel=0.05)


def check_sequences(plan, step):
    """Gathers before each layer and sums behind it, of which a chip gets its part."""
    for kind in ("all-gather", "reduce-scatter"):
        expected = sum(t.bytes for t in plan.traffic if t.kind == kind)
        inside = [c for c in step.program.collectives if c.kind == kind and c.loops]
        assert sum(c.sent for c in inside) == pytest.approx(expected, rel=0.05)


def check_experts(plan, step):
    """Tokens on their way over the axis of experts; beside the rows of choices, some bytes each."""
    kinds = {t.kind for t in plan.traffic if "experts" in t.what} - {"all-reduce"}
    # Gradients of attention may be summed over both axes at once, and cut afterwards.
    together = plan.division.fsdp * plan.division.expert
    sums = [c for c in step.program.collectives if c.kind == "all-reduce" and c.devices == together]
    cut = sum(c.bytes * c.times for c in sums if c.loops and plan.division.fsdp > 1)
    for kind in kinds:
        expected = sum(t.bytes for t in plan.traffic if (t.axis, t.kind) == ("expert", kind))
        inside = [c for c in step.program.collectives if c.kind == kind and c.loops]
        found = sum(c.sent for c in inside if c.devices == plan.division.expert)
        if kind == "reduce-scatter":
            found += cut * (1 - 1 / plan.division.fsdp)
        of_layers = [t for t in plan.traffic if t.axis == "fsdp" and "layer" in t.what]
        fsdp = sum(t.bytes for t in of_layers if t.kind == kind)
        shared = plan.division.fsdp == plan.division.expert
        assert found == pytest.approx(expected + (fsdp if shared else 0), rel=0.05)


def check_stages(plan, step):
    """Collectives of a stage's work stay in the stage."""
    mesh = Mesh(**plan.division.sizes).build(described_devices(plan))
    found = of_program(step.program.text, mesh)
    inside = [transfer for transfer in found if transfer.in_branch]
    assert {axis for transfer in inside for axis in transfer.axes} == {"fsdp"}
    messages = {t.axes for t in found if t.kind == "collective-permute"}
    assert ("stage",) in messages


def check_copies(plan, step):
    """No copy is as large as a parameter of all layers, the smallest of which is an attention's."""
    smallest = 4 * 64 * 1024 * 1024 / 4
    assert [copy for copy in step.program.copies if copy[0] >= smallest] == []


FURTHER = {
    "full": (check_gathers, check_copies),
    "dots": (check_gathers,),
    "none": (check_gathers,),
    "accumulation": (check_gathers,),
    "fsdp and tensor": (check_gathers, check_sums, check_copies),
    "sequence": (check_sequences,),
    "tensor": (check_sums,),
    "experts": (check_experts,),
    "capacity": (check_experts,),
    "pipeline": (check_stages,),
}


@pytest.mark.slow
@needs_compiler
def test_a_model_of_forty_billion_parameters_compiles_and_fits():
    """Falcon-40B for 128 chips, each of which has 30.75 GiB for a program."""
    topology = "v4:4x4x8"
    words = ["mesh.data=1", "mesh.fsdp=16", "mesh.tensor=8", "accumulation=72"]
    command = PlanCommand(experiment="experiments.falcon_40b", topology=topology)
    job, plan, _ = command.made(words, find_cluster(topology))
    step = compile_step(job, plan)
    assert step.peak < 30.75 * 2**30
    assert plan.memory.total == pytest.approx(step.peak, rel=0.10)


@pytest.mark.slow
@needs_compiler
def test_a_slice_that_there_is_not():
    _, plan = planned(CASES["full"])
    odd = StepPlan(plan.workload, plan.division, find_cluster("v4:3x5x7"))
    with pytest.raises(UserError, match="no slice v4:3x5x7"):
        described_devices(odd)
