"""The forward kernel for TPUs compiles for chips that are only described, which libtpu can."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import topologies
from pallas_kernels.attention import BucketBias, Dropout, LinearBias, Mask, attention

needs_libtpu = pytest.mark.skipif(
    not topologies.has_tpu_compiler(),
    reason="compiling for TPUs needs the extra lmjax[tpu]",
)


def described(chip):
    """A mesh of four chips, which no machine needs to have."""
    devices = np.array(topologies.tpu(chip)[:4]).reshape(2, 2)
    return jax.sharding.Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)


def compiled(chip, make, q, k, v, **more):
    """`attention` on a described mesh, batch and heads cut, compiled; `make` gives its settings."""
    mesh = described(chip)
    specs = {name: P("data", None, "tensor", None) for name in "qkv"}
    specs |= {name: spec for name, (_, spec) in more.items()}
    shapes = {"q": q, "k": k, "v": v} | {name: shape for name, (shape, _) in more.items()}

    def local(arrays):
        q, k, v = (arrays[name] for name in "qkv")
        return attention(q, k, v, implementation="tpu", **make(arrays))

    with jax.set_mesh(mesh):
        arguments = {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, specs[name]))
            for name, a in shapes.items()
        }
        call = jax.shard_map(local, in_specs=(specs,), out_specs=specs["q"])
        return jax.jit(call).lower(arguments).compile()


def shapes(length, heads=4, kv_heads=4, head_dim=128, value_dim=None, dtype=jnp.bfloat16):
    """q, k and v of a batch of two."""
    return [
        jax.ShapeDtypeStruct((2, length, count, dim), dtype)
        for count, dim in (
            (heads, head_dim),
            (kv_heads, head_dim),
            (kv_heads, value_dim or head_dim),
        )
    ]


@needs_libtpu
@pytest.mark.parametrize(
    "chip",
    [pytest.param(c, marks=[pytest.mark.slow] * (c not in ("v4", "v6e"))) for c in topologies.TPUS],
)
def test_compiles(chip):
    program = compiled(chip, lambda _: {"mask": Mask(causal=True)}, *shapes(1024, 8, 4))
    assert "attention_forward" in program.as_text()


OPTIONS = {
    "documents": (
        lambda a: {"mask": Mask(causal=True, query_segments=a["s"], key_segments=a["s"])},
        {"s": (jax.ShapeDtypeStruct((2, 1000), jnp.int32), P("data", None))},
    ),
    "ranks": (
        lambda a: {"mask": Mask(causal=True, query_ranks=a["s"], key_ranks=a["s"], window=99)},
        {"s": (jax.ShapeDtypeStruct((2, 1000), jnp.int32), P("data", None))},
    ),
    "offset": (
        lambda a: {"mask": Mask(causal=True, window=300, offset=a["o"])},
        {"o": (jax.ShapeDtypeStruct((), jnp.int32), P())},
    ),
    "linear bias": (
        lambda a: {"mask": Mask(causal=True), "bias": LinearBias(a["slopes"])},
        {"slopes": (jax.ShapeDtypeStruct((4,), jnp.float32), P("tensor"))},
    ),
    "buckets, softcap": (
        lambda a: {"mask": Mask(), "bias": BucketBias(a["table"], 128, False), "softcap": 30.0},
        {"table": (jax.ShapeDtypeStruct((4, 32), jnp.float32), P("tensor", None))},
    ),
    "array": (
        lambda a: {"mask": Mask(), "bias": a["bias"]},
        {
            "bias": (
                jax.ShapeDtypeStruct((1, 4, 1000, 1000), jnp.bfloat16),
                P(None, "tensor", None, None),
            )
        },
    ),
    "array of keys": (
        lambda a: {"mask": Mask(causal=True), "bias": a["bias"]},
        {
            "bias": (
                jax.ShapeDtypeStruct((2, 1, 1, 1000), jnp.float32),
                P("data", None, None, None),
            )
        },
    ),
    "dropout": (
        lambda a: {"mask": Mask(causal=True), "dropout": Dropout(a["seeds"], 0.1)},
        {"seeds": (jax.ShapeDtypeStruct((2, 4, 1000), jnp.uint32), P("data", "tensor", None))},
    ),
}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v4", "v6e"])  # the oldest and the newest instructions
@pytest.mark.parametrize("name", OPTIONS)
def test_compiles_with_every_option(name, chip):
    make, more = OPTIONS[name]
    compiled(chip, make, *shapes(1000), **more)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "head"),
    [
        ("v4", {"head_dim": 64}),
        ("v6e", {"head_dim": 64}),
        ("v4", {"head_dim": 80}),
        ("v5e", {"head_dim": 96}),
        ("v4", {"head_dim": 256}),
        ("v6e", {"head_dim": 256}),
        ("v5e", {"head_dim": 512}),
        ("v5p", {"head_dim": 192, "value_dim": 128}),
        ("v4", {"head_dim": 128, "dtype": jnp.float32}),
        ("v6e", {"head_dim": 256, "dtype": jnp.float32}),
        ("v5e", {"head_dim": 128, "dtype": jnp.float16}),
    ],
    ids=str,
)
def test_compiles_for_every_head(chip, head):
    compiled(chip, lambda _: {"mask": Mask(causal=True)}, *shapes(4096, **head))


@needs_libtpu
@pytest.mark.slow
def test_memory_is_linear_in_length():
    """Of 32k to 128k tokens the program holds the arrays and copies of them."""

    def temporary(length):
        program = compiled("v5e", lambda _: {"mask": Mask(causal=True)}, *shapes(length, 2, 2))
        return program.memory_analysis().temp_size_in_bytes / length

    # A device has one row and one head: q, k, v and the output are 256 bytes a token each, and
    # copies in the kernel's layout. (Short ones may be kept in VMEM, which is not counted.)
    found = [temporary(length) for length in (32768, 131072)]
    assert all(bytes_a_token <= 8 * 256 for bytes_a_token in found), found
