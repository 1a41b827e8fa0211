"""Every experiment's training step, traced on meshes that need no devices."""

import importlib
import math
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec

from lmjax.config import replace
from lmjax.jobs.text_job import TextJob
from lmjax.parallel import Mesh

FOLDER = Path(__file__).parents[1] / "experiments"
SEVERAL_RUNS = {"assistant", "domain"}  # experiments that are no single run
ALL_NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
NAMES = [name for name in ALL_NAMES if name not in SEVERAL_RUNS]
MESHES = {
    "one device": (Mesh(), 1),
    "fsdp=4 tensor=2": (Mesh(fsdp=4, tensor=2), 8),
}


def load(name):
    """The experiment; one that begins with another's run has the other's model."""
    experiment = importlib.import_module(f"experiments.{name}").experiment
    if experiment.model is None:
        base = Path(experiment.begin_with)
        assert str(base.parent) == "runs"
        return replace(experiment, model=load(base.name).model)
    return experiment


def traced(experiment, mesh, devices):
    """The state and metrics after a step, as shapes with shardings."""
    experiment = replace(experiment, mesh=mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract(devices)):
        learner = experiment.learner()
        state = learner.abstract()
        return state, *jax.eval_shape(learner.step, state, experiment.abstract_example())


def described(leaf):
    """Shape, type and place of an array; a traced scalar may come without a place."""
    spec = leaf.sharding.spec if leaf.ndim else PartitionSpec()
    return leaf.shape, leaf.dtype, spec


def test_there_are_experiments():
    assert {"quickstart", "debug", "shakespeare_char", "gpt2_124m", "llama_1b"} <= set(NAMES)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_docstring_says_command_and_hardware(name):
    words = importlib.import_module(f"experiments.{name}").__doc__
    assert f"python -m experiments.{name}" in words
    assert any(unit in words for unit in ("second", "minute", "hour", "day"))


@pytest.mark.parametrize("name", NAMES)
def test_has_the_settings_that_all_share(name):
    experiment = load(name)
    assert isinstance(experiment, TextJob)
    assert experiment.output == f"runs/{name}"
    assert (experiment.steps > 0, experiment.seed) == (True, 0)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", NAMES)
def test_step_traces(name, mesh):
    before, after, metrics = traced(load(name), *MESHES[mesh])
    # A step gives back what it was given, lying where it lay: it can be donated and repeated.
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert [*map(described, jax.tree.leaves(after))] == [*map(described, jax.tree.leaves(before))]
    assert all(metric.shape == () for metric in metrics.values())
    assert {"loss", "gradient_norm", "learning_rate", "tokens"} <= metrics.keys()


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_cut_over_the_mesh(name):
    state, _, _ = traced(load(name), *MESHES["fsdp=4 tensor=2"])
    whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    part = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state.params)
    )
    # An eighth, and what norms and biases add that every device holds.
    assert whole / 8 <= part < whole / 5
