"""The optimizer's state in the host's memory: where it lies, what a step gives, what is moved."""

import jax
import numpy as np
import pytest

from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.objectives import CausalLM
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.checkpoints import Checkpointer
from lmjax.training.learner import Learner
from lmjax.training.loss_scale import LossScale
from lmjax.training.offload import PINNED
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import abstract_example, to_devices
from lmjax.training.schedules import Constant
from pallas_kernels import topologies

ROWS, LENGTH, WORDS = 8, 16, 60
MODEL = TransformerConfig(
    vocab_size=WORDS,
    hidden=16,
    num_layers=1,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(size=32),
)


def learner(place, model=MODEL, **settings) -> Learner:
    rate = Constant(peak=3e-3, warmup=0).build(100)
    return Learner(
        model, CausalLM(), AdamW(), rate, training_layout(), optimizer_memory=place, **settings
    )


def example(step: int):
    tokens = np.random.default_rng(step).integers(0, WORDS, (ROWS, LENGTH + 1), np.int32)
    rows = CausalLM().prepare(tokens, np.ones_like(tokens), np.zeros(ROWS, np.uint64))
    return to_devices(rows, training_layout(), WORDS)


def kinds(tree) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


def test_a_run_with_its_optimizer_on_the_host(tmp_path):
    """The bits of one on the devices, on a mesh, with a loss scale, over a checkpoint."""
    with jax.set_mesh(Mesh(fsdp=2).build(jax.devices()[:2])):
        usual = learner("device", loss_scale=LossScale())
        state = usual.init(0)
        for step in range(3):
            state, _ = usual.compiled_step(state, example(step))
        made = learner("host", loss_scale=LossScale())
        other = made.init(0)
        assert kinds(other.optimizer) == {PINNED} and kinds(other.params) == {"device"}
        for step in range(2):
            other, _ = made.compiled_step(other, example(step))
        assert made.compiled_step._cache_size() == 1
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(2, other, {})
            other, _ = checkpointer.restore(None, made.abstract())
        assert kinds(other.optimizer) == {PINNED}
        other, _ = made.compiled_step(other, example(2))
        assert kinds(other.optimizer) == {PINNED}
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
def test_what_a_tpu_holds():
    """In a program for a v4 chip: both moments, 8 bytes a parameter, are the host's."""
    try:
        mesh = Mesh(fsdp=1).build(list(topologies.tpu("v4")[:1]))
    except topologies.NoCompiler as missing:
        pytest.skip(str(missing))
    found = {}
    with jax.set_mesh(mesh):
        for place in ("device", "host"):
            made = learner(place)
            tokens = np.zeros((ROWS, LENGTH + 1), np.int32)
            rows = CausalLM().prepare(tokens, np.ones_like(tokens), np.zeros(ROWS, np.uint64))
            arguments = made.abstract(), abstract_example(rows, training_layout())
            leaves, tree = jax.tree.flatten(arguments)

            def step(leaves, made=made, tree=tree):
                return jax.tree.leaves(made.step(*tree.unflatten(leaves)))

            found[place] = jax.jit(step).lower(leaves).compile().memory_analysis()
            parameters = sum(leaf.size for leaf in jax.tree.leaves(arguments[0].params))
    assert found["device"].host_argument_size_in_bytes == 0
    assert found["host"].host_argument_size_in_bytes >= 8 * parameters
    assert found["host"].host_output_size_in_bytes >= 8 * parameters
    saved = found["device"].argument_size_in_bytes - found["host"].argument_size_in_bytes
    assert saved >= 8 * parameters
