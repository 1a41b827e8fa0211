"""The training step on TPU holds no logits: read off a program compiled for described chips."""

import math
import re

import jax
import numpy as np
import pytest

from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.objectives import CausalLM
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import abstract_example
from lmjax.training.schedules import Cosine
from pallas_kernels import topologies

ROWS, LENGTH, VOCABULARY = 4, 256, 4096


def step_program(devices) -> str:
    """The compiled training step of a small model, on two shards of rows and two of words."""
    objective, layout = CausalLM(z_loss=1e-4, label_smoothing=0.1), training_layout()
    config = TransformerConfig(
        vocab_size=VOCABULARY - 3,
        hidden=128,
        num_layers=1,
        attention=AttentionConfig(num_heads=2),
        feed_forward=FeedForwardConfig(size=256),
        dtype="bfloat16",
    )
    learner = Learner(config, objective, AdamW(), Cosine(warmup=1).build(10), layout)
    rows = np.ones((ROWS, objective.row_length(LENGTH)), np.int32)
    with jax.set_mesh(Mesh(fsdp=2, tensor=2).build(devices)):
        example = objective.prepare(rows, rows, np.zeros(ROWS, np.uint64))
        example = abstract_example(example, layout)
        # Flat: the checked classes of states and examples do not take what jax says of arguments.
        leaves, structure = jax.tree.flatten((learner.abstract(), example))

        def step(leaves):
            return jax.tree.leaves(learner.step(*jax.tree.unflatten(structure, leaves)))

        return jax.jit(step).lower(leaves).compile().as_text()


def largest_array(program: str) -> int:
    """Most elements of an array in the text of a compiled program."""
    shapes = re.findall(r"\b(?:bf16|f32|s32|pred)\[([\d,]+)\]", program)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.skipif(not topologies.has_tpu_compiler(), reason="needs libtpu: lmjax[tpu]")
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v4", "v5e"])
def test_no_buffer_is_of_tokens_by_words(chip):
    program = step_program(topologies.tpu(chip))
    assert "cross_entropy_forward" in program and "cross_entropy_gradients" in program
    logits = (ROWS // 2 * LENGTH) * (VOCABULARY // 2)  # of a device
    assert largest_array(program) < logits / 2
