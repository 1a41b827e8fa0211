"""Inference: memory by hand, rooflines against their limits, prices."""

import pytest

from lmjax.config import UserError, replace
from lmjax.models import llama, mistral, mixtral, opt, palm, t5
from lmjax.scaling.clusters import find_cluster
from lmjax.scaling.costs import Prices
from lmjax.scaling.flops import cache_bytes_per_token
from lmjax.scaling.serving import READING, ServedRequests, plan_serving, serving_table

OPT = replace(opt("13B"), dtype="bfloat16")
V100 = find_cluster("v100:1")


def test_thirteen_billion_in_16_bits_with_a_cache_fit_a_32_gb_v100():
    """12.85 B x 2 bytes = 25.7 GB; 2 x 40 layers x 5,120 x 2 bytes = 0.82 MB a token."""
    plan = plan_serving(OPT, ServedRequests(prompt=1792, reply=256), V100)
    assert plan.memory["weights"] == pytest.approx(25.7e9, rel=2e-3)
    assert plan.memory["cache"] == 2048 * 819_200 == 2048 * cache_bytes_per_token(OPT)
    assert plan.fits
    assert "It fits" in serving_table(plan).note
    assert not plan_serving(OPT, ServedRequests(bits=32), V100).fits
    assert not plan_serving(opt("30B"), ServedRequests(), V100).fits


def test_a_token_takes_the_time_of_reading_weights_and_cache():
    plan = plan_serving(OPT, ServedRequests(prompt=1024, reply=2), V100)
    read = plan.weights + 1025 * 819_200
    assert plan.next_token == pytest.approx(read / (900e9 * READING))
    assert plan.bottleneck == "memory bandwidth"


def test_experts_that_no_row_uses_are_not_read():
    """Of 8 experts one row reads 2, two rows 8 (1 - (3/4)^2) = 3.5, many rows all."""
    model = replace(mixtral("8x7B"), dtype="bfloat16")
    cluster, experts = find_cluster("h100:8"), 2 * 32 * 8 * 3 * 4096 * 14_336
    for rows, share in ((1, 1 / 4), (2, 7 / 16), (64, 1)):
        plan = plan_serving(model, ServedRequests(rows=rows), cluster, 1)
        idle = plan.weights - plan.weights_read
        assert idle == pytest.approx(experts * (1 - share), rel=1e-3, abs=1e-6 * experts)


def test_many_rows_are_limited_by_products():
    model = replace(llama("7B"), dtype="bfloat16")
    plan = plan_serving(model, ServedRequests(rows=512, prompt=1, reply=8), find_cluster("h100:1"))
    assert plan.bottleneck == "matrix units"


def test_prompts_take_two_flops_a_parameter():
    model = replace(llama("7B"), dtype="bfloat16")
    plan = plan_serving(model, ServedRequests(prompt=512, reply=1), find_cluster("a100:1"))
    least = 2 * 6.6e9 * 512 / (312e12 * 0.55)
    assert plan.first_token == pytest.approx(least, rel=0.05)


def test_the_fewest_chips_that_hold_it():
    model = replace(llama("65B"), dtype="bfloat16")
    plan = plan_serving(model, ServedRequests(), find_cluster("h100:8"))
    assert (plan.tensor, plan.replicas) == (2, 4)
    assert plan_serving(model, ServedRequests(), find_cluster("h100:8"), 8).replicas == 1
    with pytest.raises(UserError, match=r"mesh.tensor=3 does not divide the 64 heads"):
        plan_serving(model, ServedRequests(), find_cluster("h100:8"), 3)


def test_more_chips_are_faster_and_hold_less():
    model = replace(llama("65B"), dtype="bfloat16")
    plans = [plan_serving(model, ServedRequests(), find_cluster("h100:8"), n) for n in (1, 2, 4, 8)]
    times = [plan.next_token for plan in plans]
    assert times == sorted(times, reverse=True)
    caches = [plan.cache(1024) * plan.tensor for plan in plans]
    assert caches == pytest.approx([caches[0]] * 4)


def test_one_key_head_is_on_every_chip():
    plan = plan_serving(
        replace(palm("8B"), dtype="bfloat16"), ServedRequests(), find_cluster("v4:4"), 4
    )
    assert plan.cache(1) == 2 * 2 * 32 * 256


def test_windows_bound_the_cache():
    model = replace(mistral("7B"), dtype="bfloat16")
    plan = plan_serving(model, ServedRequests(), find_cluster("h100:1"))
    assert plan.cache(100_000) == plan.cache(4096) == 4096 * plan.cache(1)


def test_rows_that_fit():
    plan = plan_serving(OPT, ServedRequests(), V100)
    most = plan.most_rows
    assert plan_serving(OPT, ServedRequests(rows=most), V100).fits
    assert not plan_serving(OPT, ServedRequests(rows=most + 1), V100).fits


def test_dollars_of_tokens():
    plan = plan_serving(OPT, ServedRequests(), V100)
    hours = 1e6 / plan.tokens_per_second / 3600
    assert plan.dollars(Prices(dollars=3.0)) == pytest.approx(3 * hours)
    assert plan.dollars(Prices()) == pytest.approx(1.5 * hours)


def test_encoders_are_refused():
    with pytest.raises(UserError, match="continue a text"):
        plan_serving(t5("small"), ServedRequests(), V100)
    with pytest.raises(UserError, match=r"requests.bits=5"):
        replace(ServedRequests(), bits=5)
