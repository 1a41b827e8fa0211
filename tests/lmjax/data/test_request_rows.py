"""Rows of requests and replies: each conversation once an epoch, and both sides in their room."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.data.request_rows import RequestRows
from lmjax.data.rows import WholeDocuments
from lmjax.data.spans import KINDS
from tests.lmjax.data.test_whole_documents import SEPARATOR, Store

ROOM = 12
DOCUMENTS = st.lists(
    st.tuples(st.integers(1, 20), st.integers(0, 20), st.integers(0, 2)), min_size=1, max_size=12
)


def store_of(documents, separator=None):
    """A store of documents of (tokens of a request, of its reply, of a first reply before it)."""
    store = Store([max(1, sum(lengths)) for lengths in documents], separator)
    found = []
    for (request, reply, first), begin in zip(documents, store.offsets, strict=False):
        edge = begin + request + first
        found += [(begin + request // 2, begin + request // 2 + 1)] * bool(first and request > 1)
        found += [(edge, edge + reply)] * bool(reply)
    kinds = np.full(len(found), KINDS.index("assistant"))
    store.spans = np.stack([*np.array(found, np.int64).reshape(-1, 2).T, kinds])
    return store


@settings(max_examples=60)
@given(documents=DOCUMENTS, separated=st.booleans(), seed=st.integers(0, 3))
def test_each_conversation_once_with_room_for_both_sides(documents, separated, seed):
    """What is too long keeps the end of its request and the beginning of its reply."""
    store = store_of(documents, SEPARATOR if separated else None)
    rows = RequestRows(store, 2 * ROOM, ROOM)
    most = ROOM - separated
    number = np.arange(rows.count) + seed * rows.count
    row, variant = rows.shuffle(number, 5, 0)
    tokens, segments = rows.read(row, variant)
    spans = rows.spans(row, variant)
    found, requests, replies = [], np.zeros(rows.count, int), np.zeros(rows.count, int)
    for line in range(rows.count):
        marks = spans.of(line, "assistant")
        for segment in range(1, segments[line].max() + 1):
            here = np.flatnonzero(segments[line] == segment)
            if separated and len(here) == 1 and tokens[line, here[0]] == SEPARATOR:
                continue
            own = [first for first, end in marks if here[0] <= first <= here[-1]]
            edge = own[-1] if own else here[-1] + 1
            found.append((tokens[line, here].tolist(), int(edge - here[0])))
            requests[line] += edge - here[0] + 1
            replies[line] += here[-1] + 1 - edge
    assert (requests <= ROOM).all() and (replies <= ROOM).all()
    wanted = []
    for n, (request, reply, first) in enumerate(documents):
        begin, end = store.offsets[n : n + 2]
        before = request + first
        edge = begin + before if reply else end
        if not reply and first and request > 1:
            edge = begin + request // 2
        low, high = max(begin, edge - most + 1), min(end, edge + most)
        wanted.append((store.tokens[low:high].tolist(), int(edge - low)))
    separator = [([SEPARATOR], 1)] * separated  # a document of one such token looks the same
    assert sorted(x for x in wanted if x not in separator) == sorted(
        x for x in found if x not in separator
    )
    long = sum(max(edge + 1, len(ids) - edge) > most for ids, edge in whole(store, documents))
    assert (f"{long:,} of {len(documents):,} requests or replies" in rows.warning()) == (long > 0)


def whole(store, documents):
    """Tokens of each document and where in it its last reply begins."""
    for n, (request, reply, first) in enumerate(documents):
        begin, end = store.offsets[n : n + 2]
        edge = request + first if reply else end - begin
        if not reply and first and request > 1:
            edge = request // 2
        yield store.tokens[begin:end].tolist(), int(edge)


def test_long_ones_are_left_out():
    store = store_of([(3, 2, 0), (12, 1, 0), (1, 13, 0), (11, 12, 0)])
    rows = RequestRows(store, 2 * ROOM, ROOM, "drop")
    assert "2 of 4 requests or replies have no room in 12 tokens and are left out" in rows.warning()
    _, segments = rows.read(np.arange(rows.count), np.zeros(rows.count, np.int64))
    assert sorted((segments > 0).sum(axis=1)) == [5, 23]


def test_rows_are_fuller_than_of_whole_documents():
    """As many tokens on both sides: half of the rows, and no padding."""
    store = store_of([(5, 6, 0)] * 40)
    apart, together = RequestRows(store, 2 * ROOM, ROOM), WholeDocuments(store, ROOM)
    assert (apart.count, together.count) == (20, 40)
    np.testing.assert_allclose(apart.padding, 1 - 11 / 12)
