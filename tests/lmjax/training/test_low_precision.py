"""Training in few bits: loss scaling, moments and weights stored in bfloat16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.config import UserError, replace
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.objectives import CausalLM
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.checkpoints import Checkpointer
from lmjax.training.learner import Learner
from lmjax.training.loss_scale import LossScale, Scale, factor_of
from lmjax.training.optimizers import Adafactor, AdamW, Lion, Muon
from lmjax.training.placement import to_devices
from lmjax.training.rounding import exact, round_by_chance, stored_in
from lmjax.training.schedules import Constant

ROWS, LENGTH, WORDS = 8, 16, 60
MODEL = TransformerConfig(
    vocab_size=WORDS,
    hidden=16,
    num_layers=1,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(size=32),
)
HALF = replace(MODEL, dtype="float16")
# Weights, moments and gradients in few bits: a step that takes long to compile.
STORED = dict(
    optimizer=AdamW(moments="bfloat16"),
    weights="bfloat16",
    loss_scale=LossScale(initial=2.0**10, double_after=2),
)


@pytest.fixture
def one():
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        yield


@functools.cache  # a program is compiled once for all tests
def learner(model=MODEL, optimizer=None, **settings) -> Learner:
    optimizer, rate = optimizer or AdamW(), Constant(peak=3e-3, warmup=0).build(100)
    return Learner(model, CausalLM(), optimizer, rate, training_layout(), **settings)


def example(step: int):
    tokens = np.random.default_rng(step).integers(0, WORDS, (ROWS, LENGTH + 1), np.int32)
    tokens[:, 1::2] = tokens[:, 0:-1:2]  # something to learn: each token twice
    rows = CausalLM().prepare(tokens, np.ones_like(tokens), np.zeros(ROWS, np.uint64))
    return to_devices(rows, training_layout(), WORDS)


def trained(made: Learner, steps: int, state=None):
    """The state after so many steps, and the metrics of each."""
    state, found = made.init(0) if state is None else state, []
    for step in range(int(state.step), int(state.step) + steps):
        state, metrics = made.compiled_step(state, example(step))
        found.append({name: float(value) for name, value in metrics.items()})
    return state, found


def assert_same_bits(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_scale_changes_no_bit_in_float32(one):
    """It is a power of two, and nothing over- or underflows."""
    plain, expected = trained(learner(), 3)
    made = learner(loss_scale=LossScale())
    scaled, found = trained(made, 3)
    assert_same_bits(scaled.params, plain.params)
    assert_same_bits(scaled.optimizer, plain.optimizer)
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    assert [line["loss_scale"] for line in found] == [2.0**15] * 3


def test_a_step_that_overflows_is_skipped_and_the_scale_halved(one):
    """Gradients times 2^40 are no float16 numbers; after some halvings they are."""
    scaling, rate = LossScale(initial=2.0**40, most=2.0**40), Constant(peak=3e-3, warmup=4)
    made = dataclasses.replace(
        learner(HALF, loss_scale=scaling, average_decay=0.9), rate=rate.build(100)
    )
    begun = made.init(0)
    before = jax.tree.map(jnp.copy, (begun.params, begun.optimizer, begun.average))
    state, [line] = trained(made, 1, begun)
    assert_same_bits((state.params, state.optimizer, state.average), before)
    assert (int(state.step), line["gradient_norm"], line["skipped_steps"]) == (1, 0.0, 1.0)
    assert np.isfinite(line["loss"]) and float(state.scale.value) == 2.0**39
    state, lines = trained(made, 29, state)
    skipped = int(state.scale.skipped)
    assert 1 < skipped < 25 and float(state.scale.value) == 2.0 ** (40 - skipped)
    assert lines[-1]["gradient_norm"] > 0
    # The schedule counts the steps that were done, as the optimizer does.
    before = [1, *(int(line["skipped_steps"]) for line in lines[:-1])]
    assert [line["learning_rate"] for line in lines] == pytest.approx(
        [float(made.rate(step - skips)) for step, skips in zip(range(1, 30), before, strict=True)]
    )


def test_the_scale_doubles_after_good_steps():
    scaling = LossScale(initial=1.0, double_after=2, most=4.0)
    scale, values = scaling.init(), []
    for sound in [True] * 6 + [False, True, False, False, False]:
        scale = scaling.update(scale, jnp.asarray(sound))
        values.append(float(scale.value))
    assert values == [1, 2, 2, 4, 4, 4, 2, 2, 1, 1, 1]
    assert int(scale.skipped) == 4
    assert bool(scaling.gives_up(scale, jnp.asarray(False)))
    assert not bool(scaling.gives_up(scale, jnp.asarray(True)))


def test_factors_are_of_the_mean():
    scale = LossScale().init()
    assert float(factor_of(scale, 1024)) == 2.0**5 and float(factor_of(scale, 1025)) == 2.0**4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(initial=3.0), "loss_scale.initial=3.0: must be a power of two"),
        (dict(least=0.0), "loss_scale.least=0.0"),
        (dict(initial=2.0, least=4.0), "must be from least=4.0 to most"),
        (dict(double_after=0), "loss_scale.double_after=0"),
    ],
)
def test_scales_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        LossScale(**settings)


def test_float16_trains_as_float32_does(one):
    """Over 30 steps, to 1 percent of the loss: a product has 11 bits. Most of it is learnt."""
    state, found = trained(learner(HALF, loss_scale=LossScale()), 30)
    _, expected = trained(learner(), 30)
    losses, wanted = ([line["loss"] for line in lines] for lines in (found, expected))
    np.testing.assert_allclose(losses, wanted, rtol=1e-2)
    assert wanted[-1] < wanted[0] - 0.3
    assert int(state.scale.skipped) == 0


def test_without_a_scale_gradients_in_float16_vanish(one):
    """The gradients of a mean loss, computed in float16, with a scale and with 1 in its place."""

    def gradients(made, scale=None):
        state = dataclasses.replace(made.init(0), scale=scale)
        found, _ = jax.jit(made.gradients)(state, example(0), jax.random.key(1))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found["blocks"])])

    def scale(value):
        zero = jnp.zeros((), jnp.int32)
        return Scale(jnp.asarray(value, jnp.float32), zero, zero)

    wanted = gradients(learner())
    # A hundredth of the batch's rate: what a model at the end of its training has.
    small = 2.0**-10
    errors = {
        value: np.linalg.norm(gradients(learner(HALF), scale(value)) - wanted)
        / np.linalg.norm(wanted)
        for value in (small, 2.0**15)
    }
    assert errors[2.0**15] < 0.01 < 0.05 < errors[small]


def test_a_scaled_run_resumes_with_the_same_bits(one, tmp_path):
    """The scale is part of the state: here it changes at every step."""
    made = learner(**STORED)
    whole, lines = trained(made, 6)
    assert len({line["loss_scale"] for line in lines}) > 1
    state, _ = trained(made, 3)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state, {})
        restored, _ = checkpointer.restore(None, made.abstract())
    again, rest = trained(made, 3, restored)
    assert rest == lines[3:]
    assert_same_bits((again.params, again.optimizer), (whole.params, whole.optimizer))


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2])
def test_microbatches_and_pipelines_scale_too(stages):
    """No bit of float32 changes."""
    model = replace(MODEL, num_layers=2)
    with jax.set_mesh(Mesh(stage=stages, fsdp=1).build(jax.devices()[:stages])):
        plain, _ = trained(learner(model, microbatch=4), 1)
        scaled, _ = trained(learner(model, microbatch=4, loss_scale=LossScale()), 1)
        assert_same_bits(scaled.params, plain.params)


def test_rounding_by_chance_is_exact_in_the_mean():
    """Of 100,000 roundings; 5 standard errors of a coin between two neighbours 2^-7 apart."""
    x = jnp.full(100_000, 1.0 + 0.3 * 2**-7, jnp.float32)
    found = np.asarray(round_by_chance(x, jax.random.key(0)).astype(jnp.float32))
    assert set(found.tolist()) == {1.0, 1.0 + 2**-7}
    step = 2.0**-7
    error = 5 * step * (0.3 * 0.7 / len(found)) ** 0.5
    assert found.mean(dtype=np.float64) == pytest.approx(float(x[0]), abs=error)


def test_rounding_by_chance_keeps_what_is_exact():
    values = jnp.asarray([0.0, -0.0, 1.5, -3.0, 2.0**-130, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    for seed in range(3):
        found = round_by_chance(values, jax.random.key(seed)).astype(jnp.float32)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(values))


def test_a_running_mean_stands_still_unless_it_is_rounded_by_chance():
    """v <- 0.999 v + 0.001, from 0 on: to the nearest it stops where the steps are small."""

    def update(updates, state, params=None):
        return updates, 0.999 * state + 0.001 * updates

    mean = stored_in(optax.GradientTransformation(jnp.zeros_like, update), "bfloat16")
    ones = jnp.ones(1000)

    def both(carry, _):
        state, nearest = carry
        _, state = mean.update(ones, state)
        nearest = (0.999 * nearest.astype(jnp.float32) + 0.001).astype(jnp.bfloat16)
        return (state, nearest), None

    (state, nearest), _ = jax.lax.scan(
        both, (mean.init(ones), jnp.zeros((), jnp.bfloat16)), length=4000
    )
    wanted = 1 - 0.999**4000
    assert float(jnp.mean(exact(state.inner))) == pytest.approx(wanted, abs=0.005)
    assert float(nearest) < 0.8  # 0.98 is exact


@pytest.mark.parametrize("optimizer", [AdamW, Lion, Muon])
def test_moments_in_bfloat16_take_half_the_memory(one, optimizer):
    def taken(moments):
        leaves = jax.tree.leaves(learner(MODEL, optimizer(moments=moments)).abstract().optimizer)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.ndim > 1)

    assert taken("bfloat16") <= 0.55 * taken("float32")


def test_adafactors_second_moments_stay_in_float32(one):
    """Matrices as small as these have one of each weight: half of the momentum is saved."""

    def dtypes(moments):
        optimizer = Adafactor(momentum=0.9, moments=moments)
        leaves = jax.tree.leaves(learner(MODEL, optimizer).abstract().optimizer)
        return {leaf.dtype.name for leaf in leaves if leaf.ndim > 1}

    assert dtypes("float32") == {"float32"}
    assert dtypes("bfloat16") == {"float32", "bfloat16"}


def test_what_is_stored_in_bfloat16_learns_as_in_float32(one):
    """The losses of 30 steps, to a percent: of weights and moments, which each may be so."""
    state, found = trained(learner(**STORED), 30)
    (_, expected), kinds = trained(learner(), 30), jax.tree.map(lambda a: a.dtype.name, state)
    np.testing.assert_allclose(
        [line["loss"] for line in found], [line["loss"] for line in expected], rtol=1e-2
    )
    assert set(jax.tree.leaves(kinds.params)) == {"bfloat16"}
    assert set(jax.tree.leaves(kinds.optimizer)) == {"bfloat16", "int32"}
    for other in dict(weights="bfloat16"), dict(optimizer=AdamW(moments="bfloat16")):
        kinds = jax.tree.map(lambda a: a.dtype.name, learner(**other).abstract())
        moments = other["optimizer"].moments if "optimizer" in other else "float32"
        assert set(jax.tree.leaves(kinds.params)) == {other.get("weights", "float32")}
        assert set(jax.tree.leaves(kinds.optimizer)) == {moments, "int32"}


def test_rounding_is_the_same_on_any_mesh():
    x = jax.random.normal(jax.random.key(1), (16, 8))
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        whole = np.asarray(round_by_chance(x, jax.random.key(0)).astype(jnp.float32))
    with jax.set_mesh(Mesh(fsdp=4).build(jax.devices()[:4])):
        cut = jax.device_put(np.asarray(x), jax.P("fsdp", None))
        found = jax.jit(round_by_chance)(cut, jax.random.key(0)).astype(jnp.float32)
    np.testing.assert_array_equal(np.asarray(found), whole)
