"""Every axis of the mesh alone, in pairs and triples, with all ZeRO stages and schedules.

Every other mesh with `tensor` divides the sequence over it between the layers.

Slow tests train one model on each mesh, in turn a GPT, a LLaMA, a GLM and a Mixtral; python -m
pytest -m "slow or every" tests/lmjax/training/test_combinations.py trains all four on each.
"""

import itertools

import pytest

from lmjax.parallel.schedules import Name
from lmjax.training.pipelining import Pipeline
from tests.lmjax.training.combinations import LAYERS, PERIOD, check

CASES = ("gpt", "llama", "glm", "mixtral")
SPREAD = ("data", "fsdp", "context", "tensor")
SCHEDULES = Name.__args__
CHUNKS = {"interleaved": 2, "zb_v": 2}


def cut(*axes, first=4):
    """A mesh of eight devices, or of as many as two axes of 2 have."""
    return dict(zip(axes, {1: (8,), 2: (first, 2), 3: (2, 2, 2)}[len(axes)], strict=True))


def meshes():
    """Sizes of axes, with a schedule of theirs where there are stages, and else a ZeRO stage."""
    schedules, zeros = itertools.cycle(SCHEDULES), itertools.cycle((3, 2, 1))
    some = [axes for n in (1, 2, 3) for axes in itertools.combinations(SPREAD, n)]
    for axes in [*some, *(("expert", *axes) for axes in [(), *some] if len(axes) < 3)]:
        yield cut(*axes), dict(zero=next(zeros) if "fsdp" in axes else 3)
    yield from (({"stage": 2}, dict(schedule=name)) for name in SCHEDULES)
    yield from (({"stage": 4}, dict(schedule=name)) for name in SCHEDULES if name not in CHUNKS)
    with_experts = [("expert", *axes) for axes in [(), *some] if len(axes) < 2]
    for axes in [*(axes for axes in some if len(axes) < 3), *with_experts]:
        yield cut("stage", *axes, first=2), dict(schedule=next(schedules))


def is_possible(case, sizes, settings):
    """Returns whether a model has experts to divide, and whole periods of windows on each part."""
    parts = sizes.get("stage", 1) * CHUNKS.get(settings.get("schedule"), 1)
    divides = LAYERS % (parts * PERIOD.get(case, 1)) == 0
    return divides and (case == "mixtral" or "expert" not in sizes)


def with_sequences():
    """`meshes`, every other one of those with `tensor` with its sequences divided over it."""
    turns = itertools.cycle((True, False))
    for sizes, settings in meshes():
        divided = "tensor" in sizes and next(turns)
        yield sizes, settings | (dict(sequence_parallel=True) if divided else {})


def combinations():
    """All meshes with all models that they divide; the first in turn are the slow tests."""
    turns = itertools.cycle(CASES)
    for sizes, settings in with_sequences():
        able = [case for case in CASES if is_possible(case, sizes, settings)]
        chosen = next(case for case in turns if case in able)
        for case in able:
            mark = pytest.mark.slow if case == chosen else pytest.mark.every
            axes = "-".join(f"{axis}{size}" for axis, size in sizes.items())
            label = "-".join([case, axes, *(f"{name}{value}" for name, value in settings.items())])
            yield pytest.param(case, sizes, settings, marks=mark, id=label)


@pytest.mark.parametrize(("case", "sizes", "settings"), list(combinations()))
def test_a_mesh_gives_the_losses_and_gradients_of_one_device(case, sizes, settings):
    """To 1e-5 of each loss over ten steps, and of the largest gradient."""
    settings = dict(settings)
    if name := settings.pop("schedule", None):
        settings["pipeline"] = Pipeline(schedule=name)
    check(case, sizes, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["parallel", "parallel norms"])
def test_parallel_blocks_divide_the_sequence(case):
    """Attention and feed-forward, whose outputs are summed together over `tensor`."""
    check(case, {"fsdp": 2, "tensor": 2}, sequence_parallel=True)
