"""Small models of five families, trained on any mesh beside one device."""

from __future__ import annotations

import functools

import jax
import numpy as np

from lmjax.config import replace
from lmjax.models import (
    AttentionConfig,
    BlockPositions,
    ExpertsConfig,
    FeedForwardConfig,
    GatedFeedForwardConfig,
    Parallel,
    RMSNormConfig,
    Rotary,
    TopKRouter,
    TransformerConfig,
)
from lmjax.models.xlnet import xlnet
from lmjax.objectives import BlankInfilling, CausalLM, PermutationLM, PrefixLM
from lmjax.parallel import AXES, Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import to_devices
from lmjax.training.schedules import Cosine
from tests.lmjax.objectives.rows import LEXICON, VOCABULARY, full_batch

# Four parts of a batch, each of which has a row for each of eight devices.
STEPS, PARTS, ROWS, LENGTH = 10, 4, 32, 16
LAYERS, PERIOD = 4, {"llama": 2}  # of windows, which a stage holds whole
RATE = Cosine(peak=1e-2, warmup=3).build(STEPS)
SIZES = {"vocab_size": VOCABULARY, "hidden": 32, "num_layers": LAYERS, "max_length": LENGTH}
GPT = TransformerConfig(
    **SIZES,
    attention=AttentionConfig(num_heads=8, head_dim=4, dropout=0.1),
    feed_forward=FeedForwardConfig(size=64),
    dropout=0.1,
)
LLAMA = TransformerConfig(
    **SIZES,
    attention=AttentionConfig(
        num_heads=8, num_kv_heads=2, head_dim=4, bias=False, positions=Rotary(), windows=(8, None)
    ),
    feed_forward=GatedFeedForwardConfig(size=64),
    norm=RMSNormConfig(),
    positions=None,
    tied_head=False,
    remat="full",
)
PREFIX = replace(LLAMA, attention=replace(LLAMA.attention, windows=(None,)), remat="dots")
ROUTER = TopKRouter(balance=0.3, z_loss=0.1)
XLNET = replace(
    xlnet(),
    **SIZES | {"max_length": None},
    attention=replace(xlnet().attention, num_heads=8, head_dim=4),
    feed_forward=replace(xlnet().feed_forward, size=64),
)
MODELS = {
    "gpt": (GPT, CausalLM(z_loss=1e-3)),
    "llama": (LLAMA, CausalLM()),
    "glm": (replace(GPT, positions=BlockPositions()), BlankInfilling()),
    "mixtral": (
        replace(PREFIX, feed_forward=ExpertsConfig(size=32, experts=8, router=ROUTER)),
        CausalLM(),
    ),
    "prefix": (PREFIX, PrefixLM()),
    "xlnet": (XLNET, PermutationLM()),
    "parallel": (replace(GPT, arrangement=Parallel()), CausalLM()),
    "parallel norms": (replace(GPT, arrangement=Parallel(shared_norm=False)), CausalLM()),
}


def examples(objective):
    """Packed rows whose documents end at random places."""
    length = objective.row_length(LENGTH)
    for step in range(STEPS):
        given = full_batch(length, ROWS, seed=step, longest=10)
        yield objective.prepare(*given, LEXICON, LENGTH)


def learner_of(model, objective, context="gather", sequence_parallel=False, **settings):
    """A learner with AdamW, of batches in parts."""
    layout = training_layout(context, sequence_parallel)
    return Learner(model, objective, AdamW(), RATE, layout, microbatch=ROWS // PARTS, **settings)


def train(case, sizes, **settings):
    """Losses and held-out losses of 10 steps, and gradients of the first, on a mesh."""
    model, objective = MODELS[case]
    mesh = Mesh(**{"fsdp": 1} | sizes)
    devices = np.prod([getattr(mesh, axis) for axis in AXES])
    with jax.set_mesh(mesh.build(jax.devices()[:devices])):
        learner, found = learner_of(model, objective, **settings), []

        def step(state, example):
            held_out, seen = learner.evaluate(state.params, example), []
            gradients = learner.gradients

            def kept(*inputs):
                seen.append(gradients(*inputs))
                return seen[0]

            object.__setattr__(learner, "gradients", kept)
            state, metrics = learner.step(state, example)
            object.__setattr__(learner, "gradients", gradients)
            return state, (metrics["loss"], held_out.loss / held_out.weight), seen[0][0]

        step, state, first = jax.jit(step), learner.init(seed=0), None
        for example in examples(objective):
            state, losses, d = step(state, to_devices(example, learner.layout, VOCABULARY))
            first = jax.tree.map(np.asarray, d) if first is None else first
            found.append(losses)
    return np.array(found), first


@functools.cache
def one_device(case):
    """The same on one device, with as many microbatches: dropout is the same."""
    return train(case, {})


def check(case, sizes, **settings):
    """Holds a mesh to one device: float32 sums in another order, amplified by 10 steps."""
    (expected, gradients), (losses, found) = one_device(case), train(case, sizes, **settings)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    top = max(float(np.max(np.abs(d))) for d in jax.tree.leaves(gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * top), found, gradients
    )
