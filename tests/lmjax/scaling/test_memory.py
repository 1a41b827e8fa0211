"""Memory of a step: cases worked out by hand, and what more chips or less kept must not do."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import replace
from lmjax.models import gpt3, llama
from lmjax.scaling.division import Division
from lmjax.scaling.memory import plan_memory
from lmjax.scaling.workload import Workload
from lmjax.training.optimizers import AdamW

GPT3 = Workload(replace(gpt3("175B"), dtype="bfloat16"), 2048, 1536, 300e9)
LLAMA = Workload(replace(llama("7B"), dtype="bfloat16"), 2048, 2048, 1e12)


def test_gpt3_takes_16_bytes_a_parameter():
    """175 B parameters x (4 + 4 + 8) = 2.79 TB (Rajbhandari et al. 2020, section 3.1)."""
    found = plan_memory(GPT3, Division())
    assert found.optimizer == pytest.approx(8 * GPT3.count, rel=1e-5)
    # Of the table the rows that pad it are counted, 79 of 12,288 numbers; its gradient, 0.4
    # percent of all, comes when the layers' activations are gone.
    state = found.parameters + found.gradients + found.optimizer
    assert found.moment == "backward"
    assert state == pytest.approx(16 * 174_604_259_328, rel=2e-3)


def test_weights_stored_in_16_bits():
    """6.7 B parameters x (2 + 4 + 8) bytes."""
    found = plan_memory(dataclasses.replace(LLAMA, weights="bfloat16"), Division())
    assert found.parameters == pytest.approx(2 * LLAMA.count, rel=1e-5)
    assert found.optimizer == pytest.approx(8 * LLAMA.count, rel=1e-5)


def test_a_tied_tables_gradient_of_the_head_waits_whole_for_that_of_the_tokens():
    """50,304 rows of 12,288 numbers in bfloat16, an eighth of them on a chip."""
    apart = dataclasses.replace(GPT3, model=replace(GPT3.model, tied_head=False))
    tied, untied = (plan_memory(one, Division(fsdp=16, tensor=8)) for one in (GPT3, apart))
    assert tied.vocabulary - untied.vocabulary == pytest.approx(50_257 * 12_288 / 8 * 2, rel=2e-3)


def test_state_of_gpt3_over_128_chips():
    """21.9 GB, as the experiment says."""
    found = plan_memory(GPT3, Division(fsdp=16, tensor=8))
    state = found.parameters + found.gradients + found.optimizer
    assert state == pytest.approx(21.9e9, rel=5e-3)


def test_layer_inputs_of_gpt3():
    """48 pairs of layers x 2,048 tokens x 12,288 x 2 bytes = 2.42 GB a row, as the experiment says.

    Its windows take turns, so that two layers are scanned as one.
    """
    found = plan_memory(GPT3, Division(fsdp=16, tensor=8, microbatches=96))
    assert found.activations == 48 * 2048 * 12_288 * 2
    along = plan_memory(GPT3, Division(fsdp=16, tensor=8, microbatches=96, sequence_parallel=True))
    assert along.activations == found.activations / 8
    # The sum, and what is added to it.
    assert found.gradients == pytest.approx(2 * found.parameters, rel=5e-3)


def test_stages_hold_their_layers_for_each_live_microbatch():
    one = plan_memory(GPT3, Division(microbatches=64))
    piped = plan_memory(GPT3, Division(stage=8, microbatches=64))
    x = 2048 * 12_288 * 2  # bytes of a part's input; 2 p - 1 microbatches of 1f1b, and messages
    assert piped.activations == one.activations / 8 + (15 + 6) * x
    keeping = plan_memory(GPT3, Division(stage=8, microbatches=64, parts_again=False))
    assert keeping.activations == one.activations / 8 * 15
    blocks = GPT3.on_chip(Division(), part="layer") * 96
    rest = GPT3.on_chip(Division()) - blocks
    assert piped.parameters == pytest.approx(4 * (blocks / 8 + rest))


def test_zero_stages_gather():
    sizes = dict(fsdp=8, microbatches=2)
    whole = 4 * LLAMA.on_chip(Division())
    found = {zero: plan_memory(LLAMA, Division(**sizes, zero=zero)) for zero in (1, 2, 3)}
    # The gradient of a microbatch and the sum: whole or cut. Of the first the two tables, 4
    # percent of the model, may not be there yet.
    assert found[1].gradients == pytest.approx(2 * whole, rel=0.04)
    assert found[2].gradients == pytest.approx(whole * 9 / 8, rel=0.04)
    assert found[3].gradients == pytest.approx(2 * whole / 8, rel=0.04)
    assert found[1].gathered == found[2].gathered == pytest.approx(whole / 2)  # bfloat16
    assert found[3].gathered < whole / 30  # two of 32 layers, or none


def test_an_average_and_few_trained_parameters():
    plain = plan_memory(LLAMA, Division())
    averaged = plan_memory(dataclasses.replace(LLAMA, average=True), Division())
    assert averaged.total - plain.total == plain.parameters
    tuned = plan_memory(dataclasses.replace(LLAMA, trained=0.01), Division())
    assert tuned.gradients == pytest.approx(plain.gradients / 100)
    assert tuned.optimizer == pytest.approx(plain.optimizer / 100)
    assert tuned.parameters == plain.parameters


divisions = st.builds(
    Division,
    data=st.sampled_from([1, 2]),
    fsdp=st.sampled_from([1, 2, 4, 8]),
    stage=st.sampled_from([1, 2, 4]),
    context=st.sampled_from([1, 2]),
    tensor=st.sampled_from([1, 2, 8]),
    rows=st.sampled_from([1, 2, 4]),
    microbatches=st.sampled_from([8, 16]),
    schedule=st.sampled_from(["gpipe", "1f1b", "zb_h1"]),
    remat=st.sampled_from(["none", "dots", "full"]),
    zero=st.sampled_from([1, 2, 3]),
)


@given(divisions)
def test_parts_add_up(division):
    found = plan_memory(LLAMA, division)
    assert found.total == pytest.approx(sum(found.parts.values()))
    assert all(size >= 0 for size in found.parts.values())


@given(divisions)
def test_more_of_an_axis_never_takes_more_memory(division):
    total = plan_memory(LLAMA, division).total
    for axis in ("fsdp", "tensor", "context"):
        more = dataclasses.replace(division, **{axis: 2 * getattr(division, axis)})
        if axis == "fsdp" and division.fsdp == 1:
            more = dataclasses.replace(more, zero=3)  # gathering is what takes more at first
            assert plan_memory(LLAMA, more).parameters < plan_memory(LLAMA, division).parameters
        else:
            assert plan_memory(LLAMA, more).total <= total
    replicas = dataclasses.replace(division, data=2 * division.data)
    if division.shards > 1:  # one shard alone sums nothing
        assert plan_memory(LLAMA, replicas).total == total


@given(divisions)
def test_less_kept_and_fewer_rows_never_take_more_memory(division):
    by_policy = [
        plan_memory(LLAMA, dataclasses.replace(division, remat=remat)).total
        for remat in ("full", "dots", "none")
    ]
    assert by_policy == sorted(by_policy)
    by_rows = [plan_memory(LLAMA, dataclasses.replace(division, rows=n)).total for n in (1, 2, 8)]
    assert by_rows == sorted(by_rows)
    by_zero = [plan_memory(LLAMA, dataclasses.replace(division, zero=z)).total for z in (3, 2, 1)]
    assert by_zero == sorted(by_zero)


def test_optimizers_differ_by_their_numbers():
    lean = dataclasses.replace(LLAMA, optimizer=AdamW(decay_to="start"))
    more = plan_memory(lean, Division()).optimizer / plan_memory(LLAMA, Division()).optimizer
    assert more == pytest.approx(1.5, rel=1e-3)
