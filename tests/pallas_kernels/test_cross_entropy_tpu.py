"""Kernels of the cross-entropy for TPU: many shapes, several blocks, races, and described chips."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import topologies
from pallas_kernels.cross_entropy import chunked, cross_entropy, tpu, tpu_blocks
from pallas_kernels.target import interpreted

RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@pytest.fixture
def small_blocks(monkeypatch):
    """LogitBlocks so small that little arrays have many."""
    monkeypatch.setattr(tpu_blocks, "LARGEST_TOKENS", 128)
    monkeypatch.setattr(tpu_blocks, "LARGEST_ROWS", 256)


def draw(tokens, rows, words, embed=16, dtype=np.float32):
    random = np.random.default_rng(tokens + rows)
    hidden = random.normal(size=(1, tokens, embed)).astype(dtype)
    head = random.normal(size=(rows, embed)).astype(dtype)
    targets = random.integers(-1, max(1, words), size=(1, tokens)).astype(np.int32)
    return hidden, head, targets, random.normal(size=(4, 1, tokens)).astype(np.float32)


def terms_and_gradients(function, hidden, head, targets, gradients, words, **options):
    def apply(hidden, head):
        return function(hidden, head, targets, words=words, **options)

    values, pull = jax.vjp(apply, hidden, head)
    return *values, *pull(tuple(gradients[: len(values)]))


def check(tokens, rows, words, kind="TPU v5 lite", interpret=True, **options):
    """The kernels against the plain form in float32 of the same sums, which has its own tests."""
    given = *draw(tokens, rows, words), jnp.asarray(words, jnp.int32)
    with interpreted(kind, interpret):
        run = functools.partial(terms_and_gradients, tpu.vocabulary_terms, **options)
        found = jax.jit(run)(*given)
    run = functools.partial(terms_and_gradients, chunked.vocabulary_terms, **options)
    expected = jax.jit(run)(*given)
    for one, other in zip(found, expected, strict=True):
        other = np.asarray(other, np.float64)
        # float32 sums of up to 900 terms in another order.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1, np.abs(other).max()))


@pytest.mark.slow
@settings(max_examples=6)
@given(
    tokens=st.integers(1, 400),
    rows=st.integers(1, 900),
    missing=st.integers(0, 300),
    softcap=st.sampled_from([None, 3.0]),
    extra=st.sampled_from([(False, False), (True, False), (True, True)]),
)
def test_any_sizes(tokens, rows, missing, softcap, extra):
    largest, mean = extra
    words = max(1, rows - missing)
    tpu_blocks_at = (tpu_blocks.LARGEST_TOKENS, tpu_blocks.LARGEST_ROWS)
    tpu_blocks.LARGEST_TOKENS, tpu_blocks.LARGEST_ROWS = 128, 256
    try:
        check(tokens, rows, words, scale=0.3, softcap=softcap, largest=largest, mean=mean)
    finally:
        tpu_blocks.LARGEST_TOKENS, tpu_blocks.LARGEST_ROWS = tpu_blocks_at


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5"])
@pytest.mark.parametrize("fused", [True, False])
def test_both_backward_passes_and_two_cores(small_blocks, monkeypatch, kind, fused):
    monkeypatch.setattr(tpu_blocks, "_worthwhile", lambda *_: fused)
    check(300, 700, 690, kind, scale=0.5, largest=True, mean=True)


@pytest.mark.parametrize("tokens", [100, 200, 300])  # one part of the tokens, two, three
def test_memory_that_is_read_was_written_before(small_blocks, tokens):
    """Under an interpreter with NaN for memory that was never written, and a detector of races."""
    check(tokens, 700, 690, interpret=RACES, scale=0.5)


def test_a_shard_without_words(small_blocks):
    given = *draw(50, 300, 300), jnp.asarray(-20, jnp.int32)
    with interpreted("TPU v5 lite"):
        run = functools.partial(terms_and_gradients, tpu.vocabulary_terms, scale=1.0, mean=True)
        log_part, label, mean, d_hidden, d_head = jax.jit(run)(*given)
    assert (np.asarray(log_part) < -1e29).all()  # nothing beside any other shard's
    for array in (label, d_hidden, d_head):
        np.testing.assert_array_equal(array, 0)
    assert np.isfinite(np.asarray(mean)).all()


def test_the_preferred_one_depends_on_device_and_request():
    hidden, head, targets, _ = map(jnp.asarray, draw(8, 128, 128))

    def primitives(hidden, **options):
        def run(hidden, head):
            return cross_entropy(hidden, head, targets, vocabulary=100, **options)

        return str(jax.make_jaxpr(run)(hidden, head))

    assert "pallas_call" not in primitives(hidden)
    with interpreted("TPU v5 lite"):
        assert "pallas_call" in primitives(hidden)
        assert "pallas_call" not in primitives(hidden, chunk=4)
        half = hidden.astype(jnp.bfloat16)
        assert "pallas_call" not in primitives(half)
        with pytest.raises(ValueError, match="dtypes bfloat16 and float32"):
            primitives(half, implementation="tpu")
        with pytest.raises(ValueError, match="chunk=4, it holds no logits"):
            primitives(hidden, implementation="tpu", chunk=4)
    with interpreted("TPU v2"), pytest.raises(ValueError, match="a TPU v2, it knows TPU v4"):
        primitives(hidden, implementation="tpu")


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"])
@pytest.mark.parametrize("embed", [128, 768, 2048, 4096, 8192])
def test_blocks_fit_the_vector_memory(kind, embed):
    found = tpu_blocks.blocks(kind, 8192, 50304, embed, 2)
    if found is None:
        assert (kind, embed) == ("TPU v4", 8192)
        return
    for tile in found[:4]:
        if tile is not None:
            assert all(size % 128 == 0 for size in tile)
            assert 2 * 2 * embed * sum(tile) <= found.vmem  # two of each block


@pytest.mark.slow
@pytest.mark.skipif(not topologies.has_tpu_compiler(), reason="needs libtpu: lmjax[tpu]")
@pytest.mark.parametrize(
    ("chip", "dtype", "embed"),
    [
        *(("v4", jnp.bfloat16, embed) for embed in (768, 2048, 3072, 4096)),
        *(("v4", jnp.float32, embed) for embed in (1024, 2048)),
        *(("v5e", jnp.bfloat16, embed) for embed in (4096, 8192)),
    ],
)
def test_wide_models_compile(chip, dtype, embed):
    """What the compiler keeps beside the blocks, spilled registers above all, finds room too."""
    device = topologies.tpu(chip)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = ((1, 4096, embed), dtype), ((32_000, embed), dtype), ((1, 4096), jnp.int32)
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]

    def loss(hidden, head, targets):
        options = dict(vocabulary=32_000, implementation="tpu")
        return jnp.sum(cross_entropy(hidden, head, targets, **options)[0])

    with jax.set_mesh(topologies.mesh([device])):
        jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arrays).compile()


def largest_array(program: str) -> int:
    """Most elements of an array in the text of a compiled program."""
    shapes = re.findall(r"\b(?:bf16|f32|s32|u32|pred)\[([\d,]+)\]", program)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.skipif(not topologies.has_tpu_compiler(), reason="needs libtpu: lmjax[tpu]")
@pytest.mark.parametrize("chip", topologies.TPUS)
def test_compiles_for_a_described_chip_without_logits(chip):
    devices = np.array(topologies.tpu(chip)).reshape(2, -1)
    mesh = Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    tokens, rows, embed = 512, 1024, 128  # of a device

    def array(dtype, spec, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def loss(hidden, head, targets):
        vocabulary = rows * devices.shape[1] - 5
        nll, log_z, largest = cross_entropy(
            hidden, head, targets, vocabulary=vocabulary, softcap=20.0, largest=True
        )
        return jnp.sum(nll) + 1e-4 * jnp.sum(log_z**2) + 1e-4 * jnp.sum(largest**2)

    with jax.set_mesh(mesh):
        program = (
            jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
            .lower(
                array(jnp.bfloat16, P("fsdp", None, None), 2, tokens, embed),
                array(jnp.bfloat16, P("tensor", None), rows * devices.shape[1], embed),
                array(jnp.int32, P("fsdp", None), 2, tokens),
            )
            .compile()
            .as_text()
        )
    assert program.count('custom_call_target="tpu_custom_call"') >= 2
    assert largest_array(program) < tokens * rows / 2
