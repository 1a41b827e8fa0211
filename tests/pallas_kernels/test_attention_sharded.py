"""Attention inside `jax.shard_map` on 8 devices equals attention on one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import Dropout, Mask, attention
from pallas_kernels.attention.chunked import blockwise
from pallas_kernels.attention.streaming import streaming

LENGTH = 32
SEGMENTS = np.array([[1] * 20 + [2] * 9 + [0] * 3] * 2, np.int32)
# Beginnings of 7 and 5 tokens see themselves whole; the other row is the same backwards.
RANKS = np.array([0] * 7 + [*range(7, 20)] + [20] * 5 + [*range(25, 32)], np.int32)
RANKS = np.stack([RANKS, RANKS[::-1]])


def blocks(q, k, v, mask, bias, dropout=None):
    return blockwise(q, k, v, mask, bias, dropout, scale=0.3, rows=8)[0]


def stream(q, k, v, mask, bias, dropout=None):
    return streaming(q, k, v, mask, bias, dropout, scale=0.3, query_block=8, key_block=8)[0]


def formula(q, k, v, mask, bias, dropout=None):
    return attention(q, k, v, mask, bias, dropout=dropout, scale=0.3, implementation="reference")


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, real or simulated")
@pytest.mark.parametrize("ranks", [None, RANKS], ids=["places", "ranks"])
@pytest.mark.parametrize("function", [formula, blocks, stream])
def test_sharded_equals_whole(function, ranks):
    """Batch, heads and queries cut; keys, values and bias whole over `context`: gradients sum."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, d_output = (jax.random.normal(key, (2, LENGTH, 4, 8)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, LENGTH, 2, 8)) for key in keys[2:4])
    bias = jax.random.normal(keys[4], (1, 4, 1, LENGTH))

    def whole(q, k, v, bias, segments, ranks):
        mask = Mask(
            causal=True,
            window=17,
            query_segments=segments,
            key_segments=segments,
            query_ranks=ranks,
            key_ranks=ranks,
        )
        return formula(q, k, v, mask, bias)

    def local(q, k, v, bias, queries, keys):
        mask = Mask(
            causal=True,
            window=17,
            query_segments=queries[0],
            key_segments=keys[0],
            query_ranks=queries[1],
            key_ranks=keys[1],
            offset=jax.lax.axis_index("context") * q.shape[1],
        )
        return function(q, k, v, mask, bias)

    mesh = jax.make_mesh((2, 2, 2), ("data", "context", "tensor"))
    queries = P("data", "context", "tensor", None)
    whole_keys, heads = P("data", None, "tensor", None), P(None, "tensor", None, None)
    specs = (queries, whole_keys, whole_keys, heads, P("data", "context"), P("data", None))

    def sharded(*arrays):
        given = (*arrays[:4], arrays[4:], arrays[4:])
        put = [jax.tree.map(lambda a, s=s: jax.reshard(a, s), a) for a, s in zip(given, specs)]
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=queries)(*put)

    def results(function, d_output):
        output, pull = jax.vjp(lambda *arrays: function(*arrays, SEGMENTS, ranks), q, k, v, bias)
        return output, *pull(d_output(output))

    expected = jax.jit(lambda: results(whole, lambda output: d_output))()
    with jax.set_mesh(mesh):
        found = jax.jit(lambda: results(sharded, lambda _: jax.reshard(d_output, queries)))()
    for what, one, other in zip(("output", "q", "k", "v", "bias"), expected, found):
        # Sums of up to 64 float32 numbers of size 1 in another order.
        np.testing.assert_allclose(one, other, atol=5e-6, err_msg=what)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, real or simulated")
@pytest.mark.parametrize("function", [formula, blocks, stream])
def test_dropout_of_sharded_arrays_draws_what_one_device_draws(function):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, LENGTH, 4, 8)) for i in range(3))
    k, v = k[:, :, :2], v[:, :, :2]
    key = jax.random.key(3)

    def gradients(q, k, v, queries, keys, seeds):
        def loss(q):
            offset = 0
            if jax.sharding.get_abstract_mesh().manual_axes:
                offset = jax.lax.axis_index("context") * q.shape[1]
            mask = Mask(causal=True, query_segments=queries, key_segments=keys, offset=offset)
            return jnp.sum(jnp.sin(function(q, k, v, mask, None, Dropout(seeds, 0.3))))

        return jax.grad(loss)(q)

    shape, cut = (2, 4, LENGTH), P("data", "tensor", "context")
    expected = jax.jit(gradients)(q, k, v, SEGMENTS, SEGMENTS, jax.random.bits(key, shape))
    mesh = jax.make_mesh((2, 2, 2), ("data", "context", "tensor"))
    queries, keys = P("data", "context", "tensor", None), P("data", None, "tensor", None)
    specs = queries, keys, keys, P("data", "context"), P("data", None)
    with jax.set_mesh(mesh):
        arrays = [jax.reshard(a, s) for a, s in zip((q, k, v, SEGMENTS, SEGMENTS), specs)]
        seeds = jax.random.bits(key, shape, out_sharding=cut)
        found = jax.jit(jax.shard_map(gradients, out_specs=queries))(*arrays, seeds)
    np.testing.assert_allclose(found, expected, atol=2e-6)  # float32 sums of 32 in another order
