"""Pipelines on simulated devices: gradients of the sequential model, bubbles that touch nothing."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmjax.parallel import pipeline
from lmjax.parallel.passes import in_passes, in_slots
from lmjax.parallel.pipeline import Pieces, pipelined
from lmjax.parallel.schedules import schedule
from lmjax.parallel.tick_tables import GRADIENT, KEPT, MORE, OUTPUT, lower
from lmjax.scaling.program import CompiledProgram

WIDTH, WORDS, ROWS, LENGTH = 8, 11, 4, 6
NAMES = ["gpipe", "1f1b", "interleaved", "zb_h1", "zb_v"]


class Loss(NamedTuple):
    """Sums of a toy loss."""

    loss: jax.Array
    weight: jax.Array


def enter(shared, example):
    return shared["table"][example["tokens"]]


def part(params, shared, example, x, number):
    hidden = jnp.tanh(x @ params["up"] + shared["bias"] * (1 + number))
    return x + hidden @ params["down"] * example["scale"]


def leave(shared, example, y):
    logits = y @ shared["table"].T
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), example["targets"][..., None], -1)
    return Loss(-jnp.sum(chosen), jnp.sum(jnp.ones_like(chosen)))


def passes(params, shared, example, number):
    def run(weights, given, x):
        return part(*weights, given[0], x, given[1])

    x = enter(shared, example)
    return in_slots(in_passes(run, (params, shared), (example, number), x))


PIECES = Pieces(enter, part, leave, passes)


def problem(parts: int, microbatches: int):
    """Parameters of all parts in order, shared ones, and examples."""
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "up": jax.random.normal(keys[0], (parts, WIDTH, 2 * WIDTH)) / 3,
        "down": jax.random.normal(keys[1], (parts, 2 * WIDTH, WIDTH)) / 4,
    }
    shared = {
        "bias": jax.random.normal(keys[2], (2 * WIDTH,)) / 5,
        "table": jax.random.normal(keys[3], (WORDS, WIDTH)),
    }
    shape = microbatches, ROWS, LENGTH
    examples = {
        "tokens": jax.random.randint(keys[4], shape, 0, WORDS),
        "targets": jax.random.randint(keys[5], shape, 0, WORDS),
        "scale": jnp.linspace(0.5, 1.5, microbatches),
    }
    return params, shared, examples


def sequential(params, shared, examples):
    """Sums of all microbatches, one after another."""
    parts = params["up"].shape[0]

    def one(example):
        x = enter(shared, example)
        for number in range(parts):
            own = jax.tree.map(lambda a, at=number: a[at], params)
            x = part(own, shared, example, x, number)
        return leave(shared, example, x)

    return jax.tree.map(jnp.sum, jax.vmap(one)(examples))


def stacked(made, params):
    """Parameters by stage, then by chunk, as `pipelined` takes them."""
    order = np.argsort([made.holder[p] * 1000 + p for p in range(len(made.holder))])
    return jax.tree.map(lambda a: a[order].reshape(made.stages, made.chunks, *a.shape[1:]), params)


def prefix(specs, tree):
    """A spec for every leaf, from a tree of specs that ends before the leaves."""
    is_spec = lambda a: isinstance(a, P)  # noqa: E731
    return jax.tree.map(lambda s, t: jax.tree.map(lambda _: s, t), specs, tree, is_leaf=is_spec)


@pytest.fixture
def poisoned(monkeypatch):
    """Slots and messages hold NaN until something is put into them: bubbles must not read it."""
    start = pipeline._Stage.start

    def nan(a):
        return a * jnp.nan if jnp.issubdtype(a.dtype, jnp.floating) else a

    def poisoned_start(stage, tables):
        carry, sums = start(stage, tables), ("params", "shared", "sums")
        poison = {name: tree for name, tree in carry.items() if name not in sums}
        return carry | jax.tree.map(nan, poison)

    monkeypatch.setattr(pipeline._Stage, "start", poisoned_start)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, real or simulated")
@pytest.mark.parametrize(("stages", "microbatches", "data"), [(2, 4, 2), (4, 8, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_sequential_model(poisoned, name, stages, microbatches, data):
    """And the loop of the compiled program turns as often as the schedule has ticks."""
    made = schedule(name, stages, microbatches)
    params, shared, examples = problem(len(made.holder), microbatches)

    def total(*inputs):
        sums = sequential(*inputs)
        return sums.loss, sums

    gradients = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    expected, sums = gradients(params, shared, examples)
    mesh = jax.make_mesh((stages, data), ("stage", "data"), devices=jax.devices()[: stages * data])
    rows = {"tokens": P(None, "data"), "targets": P(None, "data"), "scale": P()}
    specs = P("stage"), P(), rows

    def body(params, shared, examples):
        params = jax.tree.map(lambda a: a[0], params)
        (d_params, d_shared), sums = pipelined(
            made, PIECES, params, shared, examples, ("stage", "data")
        )
        return (jax.tree.map(lambda a: a[None], d_params), d_shared), sums

    inputs = stacked(made, params), shared, examples

    def run(*inputs):
        inputs = jax.tree.map(jax.reshard, inputs, prefix(specs, inputs))
        return jax.shard_map(body, out_specs=((P("stage"), P()), P()))(*inputs)

    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(*inputs).compile()
        found, found_sums = compiled(*inputs)
    program = CompiledProgram(compiled.as_text())
    outer = [line for line in program.computations[program.entry] if line.operation == "while"]
    assert [program.trips(line) for line in outer] == [len(made.ticks)]
    found = jax.tree.map(np.asarray, found)
    wanted = stacked(made, expected[0]), expected[1]

    def check(a, b):  # float32 sums of some 100 numbers, the largest some 100, in another order
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6 * np.max(np.abs(b)))

    jax.tree.map(check, found, wanted)
    np.testing.assert_allclose(found_sums.loss, sums.loss, rtol=1e-6)
    np.testing.assert_allclose(found_sums.weight, sums.weight)


@pytest.mark.parametrize("name", NAMES)
def test_slots_are_bounded(name):
    """As many as a stage holds, and one a chunk for what has come and must wait.

    Where gradients of weights come later, inputs and gradients wait for one tick, or for one to
    each chunk, and what is kept is that of as many microbatches as are held.
    """
    made = schedule(name, 4, 8)
    slots = lower(made).slots
    assert slots[OUTPUT] <= max(made.live) + made.chunks
    assert slots[GRADIENT] <= max(made.live)
    assert slots[KEPT] == (max(made.live) if made.split else 0)
    assert slots[MORE] == max(made.waiting) <= max(made.live)
