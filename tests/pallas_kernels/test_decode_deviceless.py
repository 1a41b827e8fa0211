"""Decode attention compiles for TPUs that are not there: every chip, every form of cache."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import topologies
from pallas_kernels.attention import BucketBias, LinearBias
from pallas_kernels.decode_attention import CacheRows, PagedCache, decode_attention

pytestmark = pytest.mark.skipif(
    not topologies.has_tpu_compiler(), reason="needs libtpu: pip install 'lmjax[tpu]'"
)

BATCH, TOKENS = 2, 1024
CASES = {
    "pages of 16": {"page": 16},
    "pages of 64, several tokens": {"page": 64, "new": 8, "window": 512},
    "rows of layers": {"layers": 3},
    "rings and a softcap": {"window": 1000, "softcap": 30.0},
    "int8 pages": {"page": 128, "dtype": jnp.int8},
    "int8 rows": {"layers": 2, "dtype": jnp.int8, "new": 2},
    "one key head of 64": {"kv_heads": 1, "head_dim": 64, "heads": 71},
    "odd head size": {"kv_heads": 4, "head_dim": 80, "heads": 12},
    "linear bias": {"bias": "linear"},
    "bias of buckets": {"bias": "buckets", "new": 2},
    "float32": {"dtype": jnp.float32, "page": 16, "sinks": True},
    "a number of pages that is prime": {"page": 16, "tokens": 16 * 13},
}

FEW = ("pages of 16", "int8 pages", "rings and a softcap", "float32")  # on chips between others


def compiled(shape, name: str):
    """The program of a case; `shape` makes a described array."""
    case = {"heads": 32, "kv_heads": 8, "head_dim": 128, "new": 1, "dtype": jnp.bfloat16}
    case |= {"tokens": TOKENS, "page": None, "layers": None, "window": None, "softcap": None}
    case |= {"bias": None, "sinks": False, **CASES[name]}
    size, dtype = case["kv_heads"] * case["head_dim"], case["dtype"]
    exact = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16
    if case["page"]:
        pages = case["tokens"] // case["page"]
        front, per_row = (BATCH * pages,), case["page"]
        extra = {"page_table": shape((BATCH, pages), jnp.int32)}
    else:
        layers = () if case["layers"] is None else (case["layers"],)
        front, per_row = (*layers, BATCH), case["tokens"]
        extra = {"layer": shape((), jnp.int32)} if layers else {}
    tokens = shape((*front, per_row, size), dtype)
    if dtype == jnp.int8:
        scales = shape((*front, case["kv_heads"], per_row), jnp.float32)
        extra |= {"key_scales": scales, "value_scales": scales}
    cache = {"keys": tokens, "values": tokens, "lengths": shape((BATCH,), jnp.int32), **extra}
    q = shape((BATCH, case["new"], case["heads"], case["head_dim"]), exact)
    table = shape((case["heads"], 32), jnp.float32)

    def call(q, cache, table):
        bias = None
        if case["bias"]:
            buckets = case["bias"] == "buckets"
            bias = BucketBias(table, 128, True) if buckets else LinearBias(table[:, 0])
        return decode_attention(
            q,
            (PagedCache if case["page"] else CacheRows)(**cache),
            bias=bias,
            window=case["window"],
            softcap=case["softcap"],
            sinks=table[:, 0] if case["sinks"] else None,
            implementation="tpu",
        )

    return jax.jit(call).lower(q, cache, table).compile()


@pytest.mark.slow
@pytest.mark.parametrize("chip", topologies.TPUS)
def test_compiles_and_copies_no_cache(chip):
    """Temporary memory is far below the cache's: the kernel reads it in place."""
    device = topologies.tpu(chip)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    with jax.set_mesh(topologies.mesh([device])):
        for name in CASES if chip in ("v4", "v6e") else FEW:
            program = compiled(shape, name)
            assert "tpu_custom_call" in program.as_text(), name
            memory = program.memory_analysis()
            size = CASES[name].get("kv_heads", 8) * CASES[name].get("head_dim", 128)
            if size % 128:  # what a program is given in such sizes XLA lays out with the slots last
                continue
            assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 2, name


def test_compiles_under_shard_map():
    """Rows and heads cut over four chips, and nothing is sent between them."""
    devices = topologies.tpu("v5e")[:4]
    mesh = jax.sharding.Mesh(
        [devices[:2], devices[2:]],
        ("data", "tensor"),
        axis_types=(jax.sharding.AxisType.Explicit,) * 2,
    )

    def shape(size, dtype, *spec):
        return jax.ShapeDtypeStruct(size, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))

    tokens = shape((4, 512, 1024), jnp.bfloat16, "data", None, "tensor")
    lengths = shape((4,), jnp.int32, "data")
    q = shape((4, 1, 32, 128), jnp.bfloat16, "data", None, "tensor", None)

    def kernel(q, tokens, lengths):
        return decode_attention(q, CacheRows(tokens, tokens, lengths), implementation="tpu")

    with jax.set_mesh(mesh):
        run = jax.shard_map(kernel, out_specs=jax.P("data", None, "tensor", None))
        text = jax.jit(run).lower(q, tokens, lengths).compile().as_text()
    assert "tpu_custom_call" in text
    assert not any(name in text for name in ("all-gather", "all-reduce", "collective-permute"))
