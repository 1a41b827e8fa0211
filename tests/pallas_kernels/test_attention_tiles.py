"""Tiles: none with an allowed pair is left out, and of the masks in use no empty one is kept."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import Mask, Tile, tiles, visited

LENGTH = 96


def by_hand(mask: Mask, queries: int, keys: int, query_block: int, key_block: int) -> np.ndarray:
    """The class of each tile from the dense mask."""
    allowed = np.asarray(mask.dense(queries, keys))[:, 0]
    found = []
    for row in allowed:
        for start in range(0, queries, query_block):
            for first in range(0, keys, key_block):
                part = row[start : start + query_block, first : first + key_block]
                whole = part.all() and part.shape[1] == key_block
                found.append(Tile.FULL if whole else Tile.PARTIAL if part.any() else Tile.EMPTY)
    shape = len(allowed), -(-queries // query_block), -(-keys // key_block)
    return np.array(found).reshape(shape)


@st.composite
def documents(draw, length: int = LENGTH):
    """Segments packed one after another, with padding at the end or not, and their beginnings."""
    sizes = draw(st.lists(st.integers(1, 50), min_size=1, max_size=12))
    segments, starts = np.zeros(length, np.int32), np.zeros(length, np.int32)
    at = 0
    for number, size in enumerate(sizes, start=1):
        segments[at : at + size], starts[at : at + size] = number, at
        at += size
    return segments[None], starts[None]


@st.composite
def masks(draw):
    """Masks of every kind for `LENGTH` queries and keys."""
    segments, starts = draw(documents())
    position = np.arange(LENGTH, dtype=np.int32)[None]
    prefix = draw(st.integers(1, 40))
    ranks = {
        "none": None,
        "prefix": np.where(position - starts < prefix, starts, position),
        "permutation": np.random.default_rng(draw(st.integers(0, 9))).permutation(position[0])[
            None
        ],
    }[draw(st.sampled_from(["none", "prefix", "permutation"]))]
    causal = ranks is not None or draw(st.booleans())
    packed = draw(st.booleans())
    return Mask(
        causal=causal,
        window=draw(st.none() | st.integers(1, 60)),
        query_segments=segments if packed else None,
        key_segments=segments if packed else None,
        query_ranks=ranks,
        key_ranks=ranks,
        offset=0 if ranks is not None or packed else draw(st.integers(-50, 50)),
    )


@settings(max_examples=150, deadline=None)
@given(mask=masks(), query_block=st.integers(1, 40), key_block=st.integers(1, 40))
def test_no_pair_is_lost_and_full_tiles_are_full(mask, query_block, key_block):
    found = tiles(mask, LENGTH, LENGTH, query_block, key_block)
    expected = by_hand(mask, LENGTH, LENGTH, query_block, key_block)
    assert isinstance(found, np.ndarray) and found.dtype == np.int8
    found = np.broadcast_to(found, expected.shape)
    assert not (found == Tile.EMPTY)[expected != Tile.EMPTY].any()
    assert (expected[found == Tile.FULL] == Tile.FULL).all()
    assert (found[expected == Tile.FULL] == Tile.FULL).all()


def packed(size_of_prefix: int = 0) -> Mask:
    """Rows of documents of many lengths; of each a beginning may see itself whole."""
    random = np.random.default_rng(0)
    segments, ranks = np.zeros((3, 2048), np.int32), np.zeros((3, 2048), np.int32)
    for row in range(3):
        at = number = 0
        while at < 2048 - 100:
            size, number = int(random.integers(20, 600)), number + 1
            inside = slice(at, min(at + size, 2048 - 30 * row))
            position = np.arange(inside.start, inside.stop)
            segments[row, inside] = number
            ranks[row, inside] = np.maximum(position, at + size_of_prefix)
            at = inside.stop
    arrays = {"query_segments": segments, "key_segments": segments}
    if size_of_prefix:
        arrays |= {"query_ranks": ranks, "key_ranks": ranks}
    return Mask(causal=True, **arrays)


IN_USE = {
    "full": Mask(),
    "causal": Mask(causal=True),
    "window": Mask(causal=True, window=300),
    "two_sided_window": Mask(window=300),
    "offset": Mask(causal=True, offset=77),
    "packed": packed(),
    "packed_window": dataclasses.replace(packed(), window=200),
    "packed_prefixes": packed(100),
    "packed_both_ways": dataclasses.replace(packed(), causal=False),
    "permutation": Mask(
        causal=True,
        query_ranks=(ranks := np.random.default_rng(1).permutation(2048)[None].astype(np.int32)),
        key_ranks=ranks,
    ),
}


@pytest.mark.parametrize("blocks", [(128, 128), (256, 128), (128, 512)], ids=str)
@pytest.mark.parametrize("name", IN_USE)
def test_tiles_visited_are_those_that_are_not_empty(name, blocks):
    expected = by_hand(IN_USE[name], 2048, 2048, *blocks)
    found = tiles(IN_USE[name], 2048, 2048, *blocks)
    np.testing.assert_array_equal(found, expected)
    assert visited(IN_USE[name], 2048, 2048, *blocks) == (expected != Tile.EMPTY).sum()


def test_traced_arrays_and_offsets_give_the_same():
    mask = packed(100)
    traced = jax.jit(lambda mask: tiles(mask, 2048, 2048, 256, 128))
    np.testing.assert_array_equal(traced(mask), tiles(mask, 2048, 2048, 256, 128))
    moved = Mask(causal=True, window=300, offset=jnp.int32(-64))
    static = dataclasses.replace(moved, offset=-64)
    np.testing.assert_array_equal(traced(moved), tiles(static, 2048, 2048, 256, 128))


def test_what_does_not_fill_a_block():
    """Of a last block with fewer keys no tile is full; one with fewer queries may be."""
    found = tiles(Mask(), 70, 70, 32, 32)
    np.testing.assert_array_equal(found[0], [[2, 2, 1]] * 3)
