"""The mask: its definition pair by pair, its tiles, and what of it stays static."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import Mask, Tile


def test_dense_is_the_definition(case):
    dense = np.asarray(case.jax_mask().dense(case.queries, case.keys))
    expected = case.visible_array()[:, None]
    np.testing.assert_array_equal(np.broadcast_to(dense, expected.shape), expected)


static_masks = st.builds(
    Mask,
    causal=st.booleans(),
    window=st.none() | st.integers(1, 9),
    offset=st.integers(0, 12),
)
spans = st.tuples(st.integers(0, 11), st.integers(1, 6)).map(lambda pair: (pair[0], sum(pair)))


@settings(max_examples=150)
@given(mask=static_masks, rows=spans, keys=spans)
def test_tile_classes_are_exact_for_static_masks(mask, rows, keys):
    distance = mask.offset + np.arange(*rows)[:, None] - np.arange(*keys)
    allowed = np.ones(distance.shape, bool)
    if mask.causal:
        allowed &= distance >= 0
    if mask.window is not None:
        allowed &= (distance if mask.causal else np.abs(distance)) < mask.window
    expected = Tile.FULL if allowed.all() else Tile.PARTIAL if allowed.any() else Tile.EMPTY
    assert mask.tile(rows, keys) is expected


@settings(max_examples=150)
@given(mask=static_masks, rows=spans, length=st.integers(1, 20))
def test_key_range_and_blind_rows(mask, rows, length):
    start, stop = rows
    distance = mask.offset + np.arange(start, stop)[:, None] - np.arange(length)
    allowed = (distance >= 0) | (not mask.causal)
    if mask.window is not None:
        allowed &= (distance if mask.causal else np.abs(distance)) < mask.window
    seen = np.flatnonzero(allowed.any(axis=0))
    first, end = mask.key_range(start, stop, length)
    assert (first, end) == (seen[0], seen[-1] + 1) if seen.size else first == end
    assert mask.may_have_fully_masked_rows(start, stop, length) == (not allowed.any(axis=1).all())


def test_arrays_leave_tiles_undecided():
    segments = jnp.ones((1, 8), jnp.int32)
    packed = Mask(causal=True, query_segments=segments, key_segments=segments)
    assert packed.tile((4, 8), (0, 4)) is Tile.PARTIAL
    assert packed.tile((0, 4), (4, 8)) is Tile.EMPTY
    assert packed.key_range(0, 4, 8) == (0, 4)
    ranked = Mask(causal=True, window=3, query_ranks=segments, key_ranks=segments)
    assert ranked.tile((0, 4), (4, 8)) is Tile.PARTIAL
    assert ranked.tile((4, 6), (4, 6)) is Tile.PARTIAL
    assert ranked.tile((0, 2), (4, 8)) is Tile.EMPTY
    assert ranked.key_range(0, 4, 8) == (0, 6)
    assert ranked.may_have_fully_masked_rows(0, 4, 8)
    moved = Mask(causal=True, offset=jnp.int32(4))
    assert moved.tile((0, 4), (4, 8)) is Tile.PARTIAL
    assert moved.may_have_fully_masked_rows(0, 4, 8)
    assert Mask(offset=jnp.int32(4)).tile((0, 4), (4, 8)) is Tile.FULL


def test_an_integer_offset_stays_static_through_jit():
    seen = {}

    @functools.partial(jax.jit, static_argnames="name")
    def look(mask, name):
        seen[name] = mask.offset
        return jnp.zeros(())

    mask = Mask(causal=True, offset=3)
    look(mask, name="integer")
    look(Mask(offset=jnp.int32(3)), name="array")
    assert seen["integer"] == 3 and isinstance(seen["integer"], int)
    assert isinstance(seen["array"], jax.core.Tracer)
    assert jax.tree.leaves(mask) == []


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="window=0, must be at least 1"):
        Mask(window=0)
    numbers = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="query_segments and key_segments are given together"):
        Mask(key_segments=numbers)
    with pytest.raises(ValueError, match="query_ranks and key_ranks are given together"):
        Mask(causal=True, query_ranks=numbers)
    with pytest.raises(ValueError, match="causal=True"):
        Mask(query_ranks=numbers, key_ranks=numbers)
