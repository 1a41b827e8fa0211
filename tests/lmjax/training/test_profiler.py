"""Traces of steps: those that were asked for, and in them the parts of a step by name."""

import gzip
import json
import re

import jax
import jax.numpy as jnp
import pytest

from experiments.debug import experiment as debug
from lmjax.config import UserError
from lmjax.jobs.settings import Log
from lmjax.parallel import Mesh
from lmjax.runs.folder import RunFolder
from lmjax.training.profiler import Profiler


@jax.jit
def add_one(x):
    return x + 1


def traced_steps(folder):
    """Numbers of the steps that the newest trace shows."""
    with gzip.open(folder.path / folder.trace(), "rt") as file:
        events = json.load(file)
    events = events["traceEvents"] if isinstance(events, dict) else events
    named = (event.get("args", {}) for event in events if event.get("name") == "train")
    return {int(arguments["step_num"]) for arguments in named if "step_num" in arguments}


@pytest.mark.parametrize(
    "steps, expected", [(range(1, 8), {3, 4}), (range(4, 8), {4}), (range(1, 4), {3})]
)
def test_the_steps_that_are_asked_for_are_traced(tmp_path, steps, expected):
    """Also of a run that goes on in between, and of one that ends before the last of them."""
    folder = RunFolder(tmp_path)
    assert folder.trace() is None
    x = jnp.zeros(3)
    with Profiler(folder.profile, 3, 4) as profiler:
        advance = profiler.traced(lambda x, step: add_one(x))
        for step in steps:
            x = advance(x, step)
    assert x.tolist() == [len(steps)] * 3
    assert traced_steps(folder) == expected
    folder.remove()
    assert not tmp_path.exists()


@pytest.mark.parametrize("profile", [(0, 3), (4, 3)])
def test_steps_that_are_none(profile):
    with pytest.raises(UserError, match=r"profile=.*a first step"):
        Log(profile=profile)


def test_a_steps_parts_have_names():
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        learner = debug.learner()
        step = jax.make_jaxpr(learner.step)(learner.abstract(), debug.abstract_example())
    found = set(re.findall(r"\w+", " ".join(names(step.jaxpr))))
    wanted = {"CausalLM", "embedding", "blocks", "attention", "feed_forward", "head", "optimizer"}
    assert wanted <= found


def names(jaxpr):
    """The scopes of all operations, of inner functions too."""
    for equation in jaxpr.eqns:
        yield str(equation.source_info.name_stack)
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            yield from names(inner) if hasattr(inner, "eqns") else ()
