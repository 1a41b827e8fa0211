"""Communication and time of a step: bytes by hand, conservation, and what must fall or rise."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.models import TopKRouter, glam, gpt3, llama, mixtral, palm
from lmjax.scaling import advice
from lmjax.scaling.advice import savers
from lmjax.scaling.clusters import find_cluster
from lmjax.scaling.costs import Prices, plan_costs
from lmjax.scaling.division import Division
from lmjax.scaling.plan import BOTTLENECKS, StepPlan, check_division, near_divisors
from lmjax.scaling.workload import Workload

MODEL = replace(llama("7B"), dtype="bfloat16")
LLAMA = Workload(MODEL, 2048, 2048, 1e12)
WEIGHTS = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)  # of the blocks


def plan(topology="v4:4x4x4", workload=LLAMA, **sizes):
    """A plan of LLaMA-7B with so many rows a shard at once."""
    division = Division(**sizes)
    batch = dataclasses.replace(workload, rows=division.batch)
    return StepPlan(batch, division, find_cluster(topology))


def sent(made, axis, kind):
    """Bytes of the collectives of an axis and a kind."""
    return sum(t.bytes for t in made.traffic if (t.axis, t.kind) == (axis, kind))


def test_one_chip_sends_nothing():
    assert plan("v4:1", remat="none").traffic == ()


def test_zero_3_gathers_every_weight_twice_a_microbatch():
    made = plan(fsdp=64, microbatches=3)
    table = 32_000 * 4096
    layers, tables = 2 * WEIGHTS, 2 * (3 + 1) * table  # bytes, in bfloat16; the head's once
    gathered = sent(made, "fsdp", "all-gather")
    assert gathered == pytest.approx((3 * 2 * layers + tables) * 63 / 64, rel=1e-3)
    scattered = 3 * (layers + (4 + 2) * table) * 63 / 64  # the table's gradient is float32
    assert sent(made, "fsdp", "reduce-scatter") == pytest.approx(scattered, rel=1e-3)
    one = plan(fsdp=64, microbatches=3, zero=1)
    whole = 2 * (WEIGHTS + 2 * table)
    assert sent(one, "fsdp", "all-gather") == pytest.approx(whole * 63 / 64, rel=1e-3)
    assert sent(one, "fsdp", "all-reduce") == pytest.approx(2 * 3 * layers * 63 / 64, rel=1e-3)


def test_replicas_sum_what_fsdp_left():
    made = plan(data=4, fsdp=16)
    own = (2 * WEIGHTS + (4 + 2) * 32_000 * 4096) / 16  # bytes; the table's are float32
    assert sent(made, "data", "all-reduce") == pytest.approx(2 * own * 3 / 4, rel=1e-3)


def test_sums_over_tensor():
    """Two in forward and two in backward for each layer (Shoeybi et al. 2019), two at the ends."""
    activations = 2 * 2048 * 4096
    made = plan(fsdp=8, tensor=8, remat="none")
    expected = 2 * 7 / 8 * activations * (4 * 32 + 2)
    assert sent(made, "tensor", "all-reduce") == pytest.approx(expected)
    again = plan(fsdp=8, tensor=8, remat="full")
    assert sent(again, "tensor", "all-reduce") == pytest.approx(expected * (5 * 32 + 2) / 130)


def test_parallel_blocks_sum_once():
    wide = Workload(replace(palm("8B"), dtype="bfloat16"), 2048, 8, 1e9)
    made = plan(workload=wide, fsdp=8, tensor=8, remat="none")
    activations = 2 * 2048 * 4096
    assert sent(made, "tensor", "all-reduce") == pytest.approx(7 / 4 * activations * (2 * 32 + 2))


def test_keys_and_values_over_context():
    made = plan(fsdp=16, context=4, remat="none")
    whole = 2 * 2048 * 2 * 4096 * 32  # bytes of keys and values of a row in all layers
    assert sent(made, "context", "all-gather") == pytest.approx(whole * 3 / 4)
    assert sent(made, "context", "reduce-scatter") == pytest.approx(whole * 3 / 4)


def test_stages_send_activations_and_gradients():
    made = plan(fsdp=16, stage=4, microbatches=8)
    ticks = 8 + 2 * (4 - 1)  # a message both ways at the end of each
    expected = 2 * ticks * 2 * 2048 * 4096
    assert sent(made, "stage", "collective-permute") == pytest.approx(expected)
    halves = plan(fsdp=16, stage=4, microbatches=8, schedule="interleaved", chunks=2)
    ticks = 8 * 2 + 4 * 2 + 4 - 2
    expected = 2 * ticks * 2 * 2048 * 4096
    assert sent(halves, "stage", "collective-permute") == pytest.approx(expected)


def test_pipelines_gather_and_sum_once_more():
    """Forward of a part, and forward and backward of it when its gradients come."""
    none = plan(fsdp=4, tensor=8, stage=2, microbatches=2, remat="none")
    layers = 2 * WEIGHTS / 8  # bytes on a device of `tensor`
    gathered = sum(t.bytes for t in none.traffic if "weights of each layer" in t.what)
    assert gathered == pytest.approx(2 * 3 * layers / 2 * 3 / 4, rel=1e-3)
    sums = [t.bytes for t in none.traffic if t.what == "activations of each layer"]
    assert sums == [pytest.approx(2 * 7 / 8 * 2 * 6 * 16 * 2 * 2048 * 4096)]


MIXTRAL = Workload(replace(mixtral("8x7B"), dtype="bfloat16"), 2048, 8, 1e9)
STREAM = 2 * 2048 * 4096  # bytes of a row's activations


def within_capacity(workload, capacity):
    """The workload with a capacity of its experts."""
    router = TopKRouter(chosen=2, capacity=capacity)
    experts = replace(workload.model.feed_forward, router=router)
    return dataclasses.replace(workload, model=replace(workload.model, feed_forward=experts))


@pytest.mark.parametrize(("remat", "times"), [("none", 4), ("full", 6)])
def test_tokens_within_a_capacity_go_to_experts_and_back(remat, times):
    """Slots of 1.25 x 2 experts a token, forward and backward, and once more as made again."""
    made = plan("v4:8", within_capacity(MIXTRAL, 1.25), expert=8, remat=remat)
    slots = 1.25 * 2 * STREAM * 32
    assert sent(made, "expert", "all-to-all") == pytest.approx(times * slots * 7 / 8)
    assert sent(made, "expert", "all-gather") == 0
    assert made.times["expert"] > 0


def test_tokens_without_a_capacity_are_gathered():
    made = plan("v4:8", MIXTRAL, expert=8, remat="none", microbatches=3)
    whole = 3 * 8 * STREAM * 32
    assert sent(made, "expert", "all-gather") == pytest.approx(2 * whole * 7 / 8)
    assert sent(made, "expert", "reduce-scatter") == pytest.approx(2 * whole * 7 / 8)


def test_gradients_of_experts_are_summed_where_they_are_copied():
    """Over `expert` only those of attention, routers, norms and tables."""
    made = plan("v4:8", MIXTRAL, expert=8)
    layer = 2 * 4096**2 + 2 * 4096 * 1024 + 4096 * 8 + 2 * 4096
    dense = 2 * 32 * layer + (4 + 2) * 32_000 * 4096
    assert sent(made, "expert", "all-reduce") == pytest.approx(2 * dense * 7 / 8, rel=1e-3)
    copied = plan("v4:8", MIXTRAL, data=8)
    whole = dense + 2 * 32 * 8 * 3 * 4096 * 14_336
    assert sent(copied, "data", "all-reduce") == pytest.approx(2 * whole * 7 / 8, rel=1e-3)


def test_every_second_layer_sends_tokens():
    half = Workload(replace(glam("1.7B"), dtype="bfloat16"), 1024, 64, 1e9)
    made = plan("v4:64", half, expert=64, remat="none")
    slots = 1.25 * 2 * 2 * 1024 * 2048 * 12
    assert sent(made, "expert", "all-to-all") == pytest.approx(4 * slots * 63 / 64)


def test_more_chips_for_experts_save_memory(monkeypatch):
    monkeypatch.setattr(advice, "MOST", 20)
    made = plan("v4:4x4x4", MIXTRAL, data=8, fsdp=8, rows=1)
    by_expert = plan("v4:4x4x4", MIXTRAL, fsdp=8, expert=8, rows=1)
    assert by_expert.memory.parameters < made.memory.parameters / 4
    big = dataclasses.replace(MIXTRAL, model=replace(MIXTRAL.model, num_layers=48))
    assert "mesh.expert=8 mesh.data=1" in savers(plan("v4:64", big, data=8, fsdp=8))


def test_time_of_products_is_flops_over_the_reachable_peak():
    made = plan("h100:8", fsdp=8, rows=8, remat="full")
    flops = made.tokens * LLAMA.hardware_flops(Division(remat="full"))
    assert made.times["products"] == pytest.approx(flops / (8 * 989.4e12 * 0.525))
    assert made.bottleneck == "matrix units"


def test_waiting_is_in_proportion_to_the_bubble():
    made = plan(fsdp=16, stage=4, microbatches=8)
    working = made.times["products"] + made.times["tensor"]
    assert made.times["bubble"] == pytest.approx(working * 3 / 8)


@pytest.mark.parametrize(
    ("topology", "sizes", "bottleneck"),
    [
        ("v4:4x4x4", dict(fsdp=64, rows=8), "matrix units"),
        ("a100:32", dict(tensor=32, remat="none"), "sums over tensor"),
        ("a100:64", dict(stage=32, fsdp=2, microbatches=32, rows=4), "matrix units"),
        ("v4:4x4x4", dict(stage=32, tensor=2, microbatches=16), "bubble of the pipeline"),
    ],
)
def test_bottlenecks_are_named(topology, sizes, bottleneck):
    assert plan(topology, **sizes).bottleneck == bottleneck


def test_short_rows_wait_for_weights():
    short = dataclasses.replace(LLAMA, length=128)
    made = plan("a100:64", short, fsdp=64)
    assert made.bottleneck == made.lost == "weights and gradients over fsdp and data"
    alone = plan("h100:1", dataclasses.replace(LLAMA, length=1))
    assert alone.bottleneck in ("memory bandwidth", "optimizer's memory traffic")


meshes = st.sampled_from(
    [
        dict(fsdp=64),
        dict(data=8, fsdp=8),
        dict(fsdp=8, tensor=8),
        dict(fsdp=8, stage=8),
        dict(fsdp=16, context=4),
        dict(data=2, fsdp=2, stage=2, context=2, tensor=4),
    ]
)
remats = st.sampled_from(["none", "dots", "full"])


@given(meshes, remats, st.sampled_from([8, 16]), st.sampled_from(["v4:4x4x4", "a100:64"]))
def test_times_add_up(sizes, remat, microbatches, topology):
    made = plan(topology, **sizes, remat=remat, microbatches=microbatches)
    assert made.seconds == pytest.approx(sum(made.times.values()))
    assert made.times.keys() == BOTTLENECKS.keys()
    assert 0 < made.mfu <= made.hfu <= made.cluster.accelerator.efficiency + 1e-9
    flops = made.workload.model_flops * made.workload.tokens
    assert made.days * 86_400 * made.mfu * made.cluster.peak == pytest.approx(flops)


@given(meshes, st.integers(1, 6))
def test_longer_batches_are_never_less_efficient(sizes, times):
    few = plan(**sizes, microbatches=8)
    many = plan(**sizes, microbatches=8 * times)
    assert many.tokens_per_second >= few.tokens_per_second * (1 - 1e-9)


@given(meshes)
def test_recomputation_costs_time(sizes):
    speeds = [plan(**sizes, microbatches=8, remat=remat).mfu for remat in ("none", "dots", "full")]
    assert speeds == sorted(speeds, reverse=True)


GPT3 = Workload(replace(gpt3("175B"), dtype="bfloat16"), 2048, 1536, 300e9)


def test_savers_do_save():
    made = plan(data=8, fsdp=8, rows=8, remat="none")
    assert not made.fits
    assert savers(made)
    assert savers(plan("v4:1", GPT3)) == []


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (dict(tensor=64), "mesh.tensor=64 does not divide model.attention.num_heads=32"),
        (dict(fsdp=3, tensor=1), "mesh.fsdp=3 does not divide model.hidden=4,096"),
        (
            dict(stage=3, fsdp=1),
            r"mesh.stage=3 does not divide model.num_layers=32; near .* 2 and 4",
        ),
        (dict(stage=4, fsdp=16), "1 microbatches are too few for 4 stages"),
        (dict(stage=4, fsdp=16, microbatches=6, schedule="zb_v"), "no multiple of 4 stages"),
        (dict(fsdp=32), "32 chips of 64"),
    ],
)
def test_divisions_that_cannot_be(sizes, words):
    with pytest.raises(UserError, match=words):
        check_division(LLAMA, Division(**sizes), find_cluster("v4:4x4x4"))


def test_experts_that_do_not_divide():
    with pytest.raises(UserError, match=r"mesh.expert=16 does not divide .*experts=8; near"):
        check_division(MIXTRAL, Division(expert=16, fsdp=4), find_cluster("v4:4x4x4"))


def test_slices_need_replicas():
    with pytest.raises(UserError, match=r"mesh.data=1 is no multiple of slices=2"):
        check_division(LLAMA, Division(fsdp=128), find_cluster("v4:4x4x4", 2))


def test_divisors():
    assert near_divisors(32, 3) == (2, 4)
    assert near_divisors(32, 4) == (4,)
    assert near_divisors(96, 100) == (96,)


def test_costs():
    """LLaMA-65B took 1,022,362 hours, 449 MWh and 173 t (Touvron et al. 2023, table 15)."""
    cluster = find_cluster("a100-80gb:2048")
    days = 1_022_362 / 2048 / 24
    found = plan_costs(days, cluster, Prices(uptime=1.0))
    assert found.kilowatt_hours == pytest.approx(449_000, rel=5e-3)
    assert found.carbon == pytest.approx(173_000, rel=5e-3)
    assert found.dollars == pytest.approx(1_022_362 * 2.50)
    half = plan_costs(days, cluster, Prices(uptime=0.5, dollars=1.0))
    assert (half.days, half.dollars) == (2 * days, pytest.approx(2 * 1_022_362))


@pytest.mark.parametrize(
    "prices", [dict(uptime=0.0), dict(uptime=1.5), dict(building=0.5), dict(dollars=-1.0)]
)
def test_prices_that_there_are_not(prices):
    with pytest.raises(UserError):
        Prices(**prices)
