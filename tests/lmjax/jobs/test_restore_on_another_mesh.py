"""A checkpoint goes on with the same losses on another mesh."""

import functools

import jax
import numpy as np
import pytest

from lmjax.models import (
    AttentionConfig,
    GatedFeedForwardConfig,
    RMSNormConfig,
    Rotary,
    TransformerConfig,
)
from lmjax.objectives import CausalLM
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.checkpoints import Checkpointer
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import to_devices
from lmjax.training.schedules import Cosine

STEPS, SAVED = 6, 3
# 8 heads, 2 key-value heads (which do not divide tensor=8) and an odd vocabulary; dropout, so that
# the random key is seen to be restored as well.
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
OBJECTIVE = CausalLM()
SCHEDULE = Cosine(peak=1e-2, warmup=2).build(STEPS)
DEVICES = {"data": 2, "fsdp": 2, "tensor": 2}


class Trainer:
    """The learner on one mesh."""

    def __init__(self, microbatch: int | None = None, **sizes: int):
        self.mesh = Mesh(**sizes).build(jax.devices()[: int(np.prod(list(sizes.values())))])
        layout = training_layout()
        self.learner = Learner(MODEL, OBJECTIVE, AdamW(), SCHEDULE, layout, microbatch=microbatch)

    def start(self):
        """The state before the first step."""
        with jax.set_mesh(self.mesh):
            return self.learner.init(seed=0)

    def restore(self, folder):
        """The state of the newest checkpoint, on this mesh."""
        with jax.set_mesh(self.mesh), Checkpointer(folder) as checkpointer:
            state, extra = checkpointer.restore(None, self.learner.abstract())
        assert extra == {"step": SAVED}
        return state

    def train(self, state, steps):
        """The state after those steps, and their losses."""
        losses = []
        with jax.set_mesh(self.mesh):
            for step in steps:
                placed = to_devices(example(step), self.learner.layout, MODEL.vocab_size)
                state, metrics = self.learner.compiled_step(state, placed)
                losses.append(float(metrics["loss"]))
        return state, np.array(losses)


@functools.cache
def trainer_on(**sizes):
    """One compilation for each mesh."""
    return Trainer(**sizes)


def example(step):
    """Rows that are a function of the step."""
    tokens = np.random.default_rng(step).integers(0, 97, (8, 17), np.int32)
    return OBJECTIVE.prepare(tokens, np.ones_like(tokens), np.zeros(8, np.uint64))


@pytest.fixture(scope="module")
def uninterrupted():
    """Losses of all steps on one device."""
    trainer = trainer_on(fsdp=1)
    return trainer.train(trainer.start(), range(STEPS))[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, uninterrupted):
    """A checkpoint saved in the middle of the run on eight devices."""
    folder = tmp_path_factory.mktemp("checkpoints")
    trainer = trainer_on(**DEVICES)
    state, losses = trainer.train(trainer.start(), range(SAVED))
    np.testing.assert_allclose(losses, uninterrupted[:SAVED], rtol=1e-5)
    with jax.set_mesh(trainer.mesh), Checkpointer(folder) as checkpointer:
        checkpointer.save(SAVED, state, {})
    return folder


def test_losses_go_on_as_if_uninterrupted_on_one_device(folder, uninterrupted):
    """1e-5 relative in float32: sums in another order, amplified by a few steps of training."""
    trainer = trainer_on(fsdp=1)
    _, losses = trainer.train(trainer.restore(folder), range(SAVED, STEPS))
    np.testing.assert_allclose(losses, uninterrupted[SAVED:], rtol=1e-5)


@pytest.mark.slow
def test_losses_go_on_in_a_pipeline(folder):
    """As on one device with as many microbatches, whose dropout is the same; 1e-5 as above."""
    found = []
    for sizes in ({"stage": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 1}):
        trainer = trainer_on(microbatch=2, **sizes)
        found.append(trainer.train(trainer.restore(folder), range(SAVED, STEPS))[1])
    np.testing.assert_allclose(*found, rtol=1e-5)
