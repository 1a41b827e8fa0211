"""A search against all plans one by one; reasons of those that lose."""

import pytest

from lmjax.config import UserError, replace
from lmjax.models import llama, mixtral
from lmjax.scaling.clusters import find_cluster
from lmjax.scaling.division import Division
from lmjax.scaling.plan import StepPlan
from lmjax.scaling.search import divisions, reason, search
from lmjax.scaling.workload import Workload

MODEL = replace(llama("7B"), dtype="bfloat16")
LLAMA = Workload(MODEL, 2048, 64, 1e12)
CLUSTER = find_cluster("a100-40gb:16")


def test_the_best_is_the_fastest_that_fits():
    found = search(LLAMA, CLUSTER)
    plans = [StepPlan(LLAMA, division, CLUSTER) for division in divisions(LLAMA, CLUSTER)]
    assert found.number == len(plans) == len(set(plan.division for plan in plans))
    fastest = min(plan.seconds for plan in plans if plan.fits)
    assert found.best[0].seconds == fastest
    assert all(plan.fits for plan in found.best)
    times = [plan.seconds for plan in found.best]
    assert times == sorted(times)
    assert len({str(plan.division) for plan in found.best}) == len(times)
    assert sum(number for number, _ in found.losers.values()) == len(plans) - 1
    assert "memory: it does not fit" in found.losers


def test_every_division_uses_all_chips_and_rows():
    for division in divisions(LLAMA, CLUSTER):
        assert division.chips == 16
        assert division.batch == 64


def test_reasons():
    def plan(**sizes):
        return StepPlan(LLAMA, Division(**sizes), CLUSTER)

    best = plan(fsdp=16, rows=4, remat="dots")
    assert reason(plan(data=16, rows=4, remat="none"), best) == "memory: it does not fit"
    assert reason(plan(fsdp=16, rows=4, remat="full"), best) == "recomputation"
    assert reason(plan(fsdp=2, tensor=8, rows=32), best) == "sums over tensor"
    piped = plan(stage=16, microbatches=32, rows=2, remat="dots")
    assert reason(piped, best) == "bubble of the pipeline"


def test_nothing_fits():
    with pytest.raises(UserError, match="nothing fits a100-40gb:1: the least memory, with "):
        search(LLAMA, find_cluster("a100-40gb:1"))
    with pytest.raises(UserError, match="no mesh of 7 chips divides"):
        search(LLAMA, find_cluster("a100-40gb:7"))


def test_experts_are_divided():
    """In all ways, each with as many rows as there are."""
    sparse = Workload(replace(mixtral("8x7B"), dtype="bfloat16"), 2048, 64, 1e12)
    cluster = find_cluster("a100-80gb:64")
    found = list(divisions(sparse, cluster))
    assert {division.expert for division in found} == {1, 2, 4, 8}
    assert all((division.batch, division.chips) == (64, 64) for division in found)


def test_long_rows_are_cut_over_context():
    long = Workload(MODEL, 131_072, 1, 1e9)
    best = search(long, find_cluster("h100:64")).best[0].division
    assert best.context * best.tensor * best.stage == 64
