"""Attention where sequences are divided: rings and exchanges give what one device gives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from lmjax.config import UserError
from lmjax.models import AttentionConfig, FeedForwardConfig, Rotary, TransformerConfig
from lmjax.models.initializers import Normal
from lmjax.models.linear import Builder
from lmjax.models.ring_attention import _exchanges
from lmjax.objectives import CausalLM
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import abstract_example
from pallas_kernels.attention import BucketBias, LinearBias, Mask, attention

BATCH, LENGTH, HEADS, SIZE = 2, 32, 4, 8
MODES = ("ring", "all_to_all")
MESHES = {
    "4": Mesh(context=4, fsdp=1),
    "2-fsdp-tensor": Mesh(context=2, fsdp=2, tensor=2),
    "8": Mesh(context=8, fsdp=1),
}


def rows():
    """Segments of packed documents, with padding at the end of one row, and ranks of prefixes."""
    random = np.random.default_rng(0)
    segments = 1 + np.cumsum(random.random((BATCH, LENGTH)) < 0.1, axis=1).astype(np.int32)
    segments[1, -5:] = 0
    ranks = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH)).copy()
    ranks[:, :11] = 10
    return jnp.asarray(segments), jnp.asarray(ranks)


def masks():
    segments, ranks = rows()
    packed = {"query_segments": segments, "key_segments": segments}
    ranked = {"query_ranks": ranks, "key_ranks": ranks}
    return {
        "causal": Mask(causal=True),
        "packed": Mask(causal=True, **packed),
        "window": Mask(causal=True, window=5, **packed),
        "both sides": Mask(window=7, **packed),
        "all": Mask(),
        "prefix": Mask(causal=True, **packed, **ranked),
    }


BIASES = {
    "none": None,
    "linear": LinearBias(jnp.linspace(0.1, 0.5, HEADS)),
    "buckets": BucketBias(jax.random.normal(jax.random.key(9), (HEADS, 8)), 16, True),
}
CASES = [
    ("causal", "none", 4, "4"),
    ("packed", "linear", 2, "2-fsdp-tensor"),
    ("window", "none", 1, "4"),
    ("both sides", "none", 4, "4"),
    ("all", "none", 2, "2-fsdp-tensor"),
    ("prefix", "none", 2, "2-fsdp-tensor"),
    ("packed", "buckets", 4, "4"),
    ("packed", "none", 4, "8"),
]


def arrays(kv_heads):
    keys = jax.random.split(jax.random.key(0), 4)
    heads = HEADS, kv_heads, kv_heads, HEADS
    return [
        jax.random.normal(key, (BATCH, LENGTH, n, SIZE)) for key, n in zip(keys, heads, strict=True)
    ]


@functools.cache
def expected(mask, bias, kv_heads):
    """Output and gradients by the reference on one device."""
    *inputs, weight = arrays(kv_heads)
    mask, bias = masks()[mask], BIASES[bias]

    def total(q, k, v, bias):
        output = attention(q, k, v, mask, bias, implementation="reference")
        return jnp.sum(output * weight), output

    gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True))
    (_, output), found = gradients(*inputs, bias)
    return jax.tree.map(np.asarray, (output, found))


# Of these masks a ring is among the slow tests: packed documents and prefixes have their parts.
PARTS = ("causal", "window", "both sides")


@pytest.mark.parametrize(
    ("mask", "bias", "kv_heads", "mesh", "mode"),
    [
        pytest.param(
            *(*case, mode), marks=[pytest.mark.slow] * (mode == "ring" and case[0] in PARTS)
        )
        for case in CASES
        for mode in MODES
    ],
)
def test_divided_sequences_give_the_attention_of_whole_ones(mask, bias, kv_heads, mesh, mode):
    """Sums in another order: 2e-5 of float32 numbers around 1."""
    if mode == "all_to_all" and mesh == "8":
        pytest.skip("4 heads do not divide among 8 devices")
    with jax.set_mesh(MESHES[mesh].build(jax.devices()[: np.prod(list(sizes(mesh)))])):
        layout, config = training_layout(mode), AttentionConfig(num_heads=HEADS, head_dim=SIZE)
        layer = config.build(Builder(HEADS * SIZE, 1, Normal(), "float32", layout, nnx.Rngs(0)))
        *inputs, weight = (
            layout.reshard(a, "batch", "seq", heads, None)
            for a, heads in zip(arrays(kv_heads), ("heads", "kv_heads", "kv_heads", "heads"))
        )
        given = jax.tree.map(
            lambda a: layout.reshard(a, "batch", "seq") if a.ndim == 2 else a, masks()[mask]
        )

        @jax.jit
        def run(q, k, v, weight, mask, bias):
            def total(q, k, v, bias):
                output = layer.attend(q, k, v, mask, bias)
                return jnp.sum(output * jax.reshard(weight, jax.typeof(output).sharding)), output

            return jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)(q, k, v, bias)

        (_, output), found = run(*inputs, weight, given, BIASES[bias])
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    jax.tree.map(close, jax.tree.map(np.asarray, (output, found)), expected(mask, bias, kv_heads))


def sizes(mesh):
    return (getattr(MESHES[mesh], axis) for axis in ("context", "fsdp", "tensor"))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_a_zigzag_gives_each_device_one_half_from_each_end(size):
    even, odd = (dict(pairs) for pairs in _exchanges(size))
    assert sorted(even.values()) == sorted(odd.values()) == list(range(size))
    held = {device: [] for device in range(size)}
    for device in range(size):
        held[even[device]].append(2 * device)
        held[odd[device]].append(2 * device + 1)
    assert all(sorted(halves) == [at, 2 * size - 1 - at] for at, halves in held.items())


def test_no_device_gathers_keys():
    """The largest array of a ring's program has one part of the sequence; P: no gather is there."""
    with jax.set_mesh(MESHES["8"].build()):
        layout, config = training_layout("ring"), AttentionConfig(num_heads=HEADS, head_dim=SIZE)
        layer = config.build(Builder(HEADS * SIZE, 1, Normal(), "float32", layout, nnx.Rngs(0)))
        shape = 1, 512, HEADS, SIZE
        spec = jax.NamedSharding(jax.sharding.get_mesh(), P(None, "context"))
        q = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=spec)

        def total(q):
            return jnp.sum(layer.attend(q, q, q, Mask(causal=True)))

        text = jax.jit(jax.grad(total)).lower(q).compile().as_text()
    assert "all-gather" not in text
    assert "collective-permute" in text


def test_what_a_ring_cannot_do_is_said():
    with jax.set_mesh(MESHES["4"].build(jax.devices()[:4])):
        layout, config = training_layout("ring"), AttentionConfig(num_heads=HEADS, head_dim=SIZE)
        layer = config.build(Builder(HEADS * SIZE, 1, Normal(), "float32", layout, nnx.Rngs(0)))
        spec = jax.NamedSharding(jax.sharding.get_mesh(), P(None, "context"))
        q = jax.device_put(jnp.ones((1, 20, HEADS, SIZE)), spec)
        with pytest.raises(UserError, match="20 tokens do not divide into the 8 halves"):
            layer.attend(q, q, q, Mask(causal=True))
        with pytest.raises(UserError, match="an array over pairs"):
            layer.attend(q, q, q, Mask(causal=True), jnp.zeros((1, HEADS, 20, 20)))
        with pytest.raises(UserError, match="no dropout"):
            layer.attend(q, q, q, Mask(causal=True), None, (0.1, jax.random.key(0)))


@pytest.mark.slow
def test_memory_of_long_sequences_falls_with_the_number_of_devices():
    """A training step on one row of 131,072 tokens, compiled: temporary bytes of each device."""
    length, objective = 131_072, CausalLM()
    model = TransformerConfig(
        vocab_size=256,
        hidden=64,
        num_layers=2,
        max_length=None,
        attention=AttentionConfig(num_heads=2, head_dim=32, positions=Rotary()),
        feed_forward=FeedForwardConfig(size=128),
        positions=None,
        remat="full",
    )

    def temporary_bytes(devices):
        with jax.set_mesh(Mesh(context=devices, fsdp=1).build(jax.devices()[:devices])):
            layout = training_layout("ring")
            learner = Learner(model, objective, AdamW(), lambda step: 1e-3, layout)
            example = abstract_example(objective.shapes(1, length), layout)
            leaves, tree = jax.tree.flatten((learner.abstract(), example))
            run = jax.jit(lambda *leaves: jax.tree.leaves(learner.step(*tree.unflatten(leaves))))
            return run.lower(*leaves).compile().memory_analysis().temp_size_in_bytes

    # A quarter, and what does not depend on the sequence.
    assert temporary_bytes(8) < 0.35 * temporary_bytes(2)
