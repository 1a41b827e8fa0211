"""Steps compile once, before the first of them, and move nothing that nobody asked to be moved."""

import contextlib
import itertools

import jax
import jaxtyping
import numpy as np
import pytest

from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.objectives import BlankInfilling, CausalLM, Mixed, PrefixLM
from lmjax.objectives.lexicon import SHAPES_ONLY
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW, Muon
from lmjax.training.placement import abstract_example, to_devices
from lmjax.training.schedules import Cosine
from tests.compilations import counted_compilations

MODEL = TransformerConfig(
    vocab_size=97,
    hidden=16,
    num_layers=2,
    max_length=16,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(size=32),
    dropout=0.1,
)
MIXED = Mixed(objectives=(BlankInfilling(), PrefixLM()), weights=(1.0, 1.0))


def rows(objective, seed):
    """An example of random rows."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 97, (8, objective.row_length(16))).astype(np.int32)
    segments = np.ones_like(tokens)
    return objective.prepare(tokens, segments, np.arange(8).astype(np.uint64), SHAPES_ONLY, 16)


@contextlib.contextmanager
def without_type_checks():
    """Lets `jax.stages` put descriptions of arguments where the tests' checks want arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("sizes", "objective", "settings"),
    [
        (dict(data=2, fsdp=2, tensor=2), CausalLM(), dict(average_decay=0.9, microbatch=4)),
        (dict(fsdp=2), MIXED, dict(optimizer=Muon())),
    ],
    ids=["mesh", "mixture"],
)
def test_the_program_that_is_compiled_ahead_is_the_one_of_all_steps(sizes, objective, settings):
    """As `TrainingRun` compiles it while the text is read: then no step compiles anything.

    The state is one that was made, and one that was restored, which is put there array by array.
    """
    devices = int(np.prod(list(sizes.values())))
    with jax.set_mesh(Mesh(**sizes).build(jax.devices()[:devices])):
        parts = {"optimizer": AdamW(), "rate": Cosine(warmup=2).build(20)}
        learner = Learner(
            MODEL, objective=objective, layout=training_layout(), **(parts | settings)
        )
        state = learner.init(seed=0)
        restored = jax.tree.map(
            lambda a: a if a.dtype != np.float32 else jax.device_put(np.asarray(a), a.sharding),
            jax.tree.map(lambda a: a.copy(), state),
        )
        examples = [to_devices(rows(objective, n), learner.layout, 97) for n in range(3)]
        with counted_compilations() as before, without_type_checks():
            learner.compile_step(abstract_example(rows(objective, 0), learner.layout))
        assert before
        for begun in (state, restored):
            with counted_compilations() as found, jax.transfer_guard("disallow"):
                for example in itertools.chain(examples, examples):
                    begun, metrics = learner.compiled_step(begun, example)
                jax.device_get(metrics)
            assert found == []


def test_a_compilation_and_a_transfer_would_be_seen():
    """The two instruments of the test above."""
    double = jax.jit(lambda x: 2 * x + 0.25)
    with counted_compilations() as found:
        double(np.ones(3, np.float32))
        double(np.ones(5, np.float32))
    assert len(found) == 2
    with (
        jax.transfer_guard("disallow"),
        pytest.raises(Exception, match="Disallowed"),
    ):
        double(np.ones(3, np.float32))
