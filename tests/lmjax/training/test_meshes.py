"""Any mesh and any ZeRO stage give the losses of one device."""

import jax
import numpy as np
import pytest

from lmjax.config import UserError, replace
from lmjax.models import (
    AttentionConfig,
    GatedFeedForwardConfig,
    RMSNormConfig,
    Rotary,
    TransformerConfig,
)
from lmjax.objectives import CausalLM, Example, TokenTargets
from lmjax.parallel import AXES, Mesh, training_layout
from lmjax.training.gradients import count_microbatches
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Cosine

STEPS = 20
# 8 heads, 2 key-value heads (which do not divide tensor=8) and an odd vocabulary; dropout, so that
# the masks are seen to be the same on every mesh.
MODEL = TransformerConfig(
    vocab_size=97,
    hidden=32,
    num_layers=2,
    max_length=16,
    attention=AttentionConfig(
        num_heads=8, num_kv_heads=2, head_dim=4, bias=False, positions=Rotary()
    ),
    feed_forward=GatedFeedForwardConfig(size=64),
    norm=RMSNormConfig(),
    positions=None,
    dropout=0.1,
)
OBJECTIVE = CausalLM(z_loss=1e-3)
SCHEDULE = Cosine(peak=1e-2, warmup=5).build(STEPS)


def examples():
    """Packed rows whose documents end at random places."""
    generator = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = generator.integers(0, 97, (8, 17)).astype(np.int32)
        segments = 1 + np.cumsum(generator.random((8, 17)) < 0.1, axis=1).astype(np.int32)
        yield OBJECTIVE.prepare(tokens, segments, np.zeros(8, np.uint64))


def train(start, mesh, zero=3, accumulation=1, model=MODEL):
    """Losses and gradient norms of 20 steps on a mesh, from a state made on one device."""
    devices = np.prod([getattr(mesh, axis) for axis in AXES])
    mesh, layout = mesh.build(jax.devices()[:devices]), training_layout()
    with jax.set_mesh(mesh):
        learner = learner_of(model, zero=zero, microbatch=8 // accumulation)
        step = jax.jit(learner.step)  # without donation: `start` is used again
        state = jax.tree.map(
            lambda a, shape: jax.device_put(a, jax.NamedSharding(mesh, spec_of(shape))),
            start,
            learner.abstract(),
        )
        sharding = jax.NamedSharding(mesh, layout.spec("batch", "seq"))
        rows = []
        for example in examples():
            state, metrics = step(state, jax.device_put(example, sharding))
            rows.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    return np.array(rows)


def spec_of(shape):
    """Where an array of the state lies; scalars, which say nothing, lie everywhere."""
    return shape.sharding.spec if shape.sharding else jax.sharding.PartitionSpec()


def learner_of(model, **settings):
    """A learner of the model with AdamW."""
    return Learner(model, OBJECTIVE, AdamW(), SCHEDULE, training_layout(), **settings)


def start_on(mesh):
    """The state before training, drawn on that mesh."""
    with jax.set_mesh(mesh):
        return learner_of(MODEL).init(seed=0)


@pytest.fixture(scope="module")
def start():
    return start_on(Mesh(fsdp=1).build(jax.devices()[:1]))


@pytest.fixture(scope="module")
def one_device(start):
    return train(start, Mesh(fsdp=1))


def test_parameters_are_drawn_alike_on_any_mesh(start):
    """Each device draws its part of one global array, from the same random bits.

    Bits to normal numbers is a polynomial, which XLA computes by vectors and, at the edges of an
    array, one by one: with jax 0.12 some of these round otherwise, by 2 units in the last place.
    """
    sharded = start_on(Mesh(data=2, fsdp=2, tensor=2).build())
    jax.tree.map(
        lambda ours, whole: np.testing.assert_array_max_ulp(np.asarray(ours), np.asarray(whole), 4),
        sharded.params,
        start.params,
    )


def test_a_batch_without_targets_is_no_nan(start):
    """Nothing is learned from it: AdamW's first step is decay alone, by the closed form."""
    mesh, layout = Mesh(fsdp=1).build(jax.devices()[:1]), training_layout()
    example = next(examples())
    targets = TokenTargets(example.targets.tokens, np.zeros_like(example.targets.weights))
    with jax.set_mesh(mesh):
        step = jax.jit(learner_of(MODEL).step)
        sharding = jax.NamedSharding(mesh, layout.spec("batch", "seq"))
        empty = jax.device_put(Example(example.inputs, targets), sharding)
        after, metrics = step(start, empty)
    assert metrics["loss"] == metrics["gradient_norm"] == metrics["tokens"] == 0
    kept = 1 - AdamW().weight_decay * float(SCHEDULE(0))
    before = start.params["embedding"]["table"]
    np.testing.assert_allclose(after.params["embedding"]["table"], kept * before, rtol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "zero"),
    [
        (dict(fsdp=8), 3),
        (dict(data=2, fsdp=2, tensor=2), 2),
        (dict(fsdp=2, context=2, tensor=2), 1),
        *(
            pytest.param(*given, marks=pytest.mark.slow)
            for given in (
                (dict(fsdp=8), 1),
                (dict(data=2, fsdp=2, tensor=2), 3),
                (dict(fsdp=2, context=2, tensor=2), 2),
                (dict(fsdp=1, tensor=8), 3),
            )
        ),
    ],
    ids=str,
)
def test_mesh_gives_the_losses_of_one_device(start, one_device, sizes, zero):
    """1e-5 relative in float32: sums in another order, amplified by 20 steps of training.

    Gradient norms are amplified more, so that of the first step is held to the same tolerance.
    """
    rows = train(start, Mesh(**sizes), zero)
    np.testing.assert_allclose(rows[:, 0], one_device[:, 0], rtol=1e-5)
    np.testing.assert_allclose(rows[0, 1], one_device[0, 1], rtol=1e-5)


@pytest.fixture(scope="module")
def whole(start):
    """In one part, without dropout, whose masks depend on the parts."""
    return train(start, Mesh(fsdp=1), model=replace(MODEL, dropout=0.0))


@pytest.mark.parametrize(
    "zero", [2, *(pytest.param(zero, marks=pytest.mark.slow) for zero in (1, 3))]
)
def test_accumulation_gives_the_losses_of_the_whole_batch(start, whole, zero):
    """1e-5 relative, as above."""
    model = replace(MODEL, dropout=0.0)
    parts = train(start, Mesh(data=2, fsdp=2, tensor=2), zero, accumulation=2, model=model)
    np.testing.assert_allclose(parts[:, 0], whole[:, 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "most", "parts"),
    [
        (1536, 16, 96),
        (16, 16, 1),
        (8, 16, 1),  # a batch smaller than a part
        (24, 16, 3),  # 12 rows would not divide among 8 devices
        (208, 16, 13),
    ],
)
def test_a_small_batch_takes_fewer_parts(rows, most, parts):
    layout = training_layout()
    with jax.sharding.use_abstract_mesh(Mesh(data=2, fsdp=4).abstract(8)):
        assert count_microbatches(rows, most, layout) == parts
        assert count_microbatches(rows, None, layout) == 1
        with pytest.raises(UserError, match=f"a batch of {rows + 1} rows does not divide"):
            count_microbatches(rows + 1, most, layout)
