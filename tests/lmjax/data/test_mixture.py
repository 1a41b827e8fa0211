"""Rows and mixtures against a plain reading of the same store, token by token."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.data.mixture import Mixture, _Stage, shares
from lmjax.data.rows import EvaluationRows, Ring
from lmjax.data.sources import JsonLines
from lmjax.data.tokenize import build_stores
from lmjax.data.tokenizers import ByteTokenizer


def make_store(folder, lengths, first=0):
    """A store of documents of the given lengths, every one of them different."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"text": "".join(chr(33 + (first + n + i) % 90) for i in range(length))})
        for n, length in enumerate(lengths)
    ]
    (folder / "a.jsonl").write_text("\n".join(lines))
    source = JsonLines(path=str(folder / "a.jsonl"))
    return build_stores(source, ByteTokenizer(), folder / "store")["all"]


def document_of(store):
    """The number of each token's document."""
    offsets = store.offsets
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@settings(max_examples=60)
@given(
    lengths=LENGTHS,
    row_length=st.integers(2, 40),
    overlap=st.just(1) | st.integers(1, 39),
    start=st.floats(0, 0.999),
)
def test_rows_are_the_tokens_of_the_ring(tmp_path_factory, lengths, row_length, overlap, start):
    store = make_store(tmp_path_factory.mktemp("rows"), lengths)
    overlap = min(overlap, row_length - 1)
    rows = Ring(store, row_length, overlap)
    size = store.manifest.tokens
    start = int(start * size)
    tokens, segments = rows.read(np.arange(rows.count), start)
    assert tokens.shape == segments.shape == (rows.count, row_length)
    assert tokens.dtype == segments.dtype == np.int32
    document = document_of(store)
    targets = []
    for row in range(rows.count):
        place, segment = start + row * (row_length - overlap), 1
        for column in range(row_length):
            if place > start + size:
                assert tokens[row, column] == segments[row, column] == 0
                continue
            if column and (
                document[place % size] != document[(place - 1) % size] or place % size == 0
            ):
                segment += 1
            assert tokens[row, column] == store.tokens[place % size]
            assert segments[row, column] == segment
            if column:
                targets.append(place % size)
            place += 1
    assert set(targets) == set(range(size))
    if overlap == 1:
        assert len(targets) == size  # each token is a target exactly once


@settings(max_examples=40)
@given(lengths=LENGTHS, row_length=st.integers(2, 40))
def test_evaluation_rows_predict_every_token_once(tmp_path_factory, lengths, row_length):
    store = make_store(tmp_path_factory.mktemp("evaluation"), lengths)
    rows = EvaluationRows(Ring(store, row_length))
    tokens, segments = rows.read(0, len(rows) + 2)
    targets = tokens[:, 1:][segments[:, 1:] > 0]
    # In order; the end of the last document is the separator with which the store begins.
    assert targets.tolist() == [*store.tokens[1:], store.tokens[0]]
    assert (segments[:, 0] == 1).tolist() == [True] * len(rows) + [False] * 2
    assert (segments[-2:] == 0).all()
    again = [rows.read(first, 1)[0] for first in range(len(rows))]
    assert np.array_equal(np.concatenate(again), tokens[: len(rows)])


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return {
        "large": make_store(folder / "large", [40] * 30),
        "small": make_store(folder / "small", [7] * 11, first=50),
        "tiny": make_store(folder / "tiny", [5], first=30),
    }


def rings(stores, row_length=9):
    """Readers of the stores by name."""
    return {name: Ring(store, row_length) for name, store in stores.items()}


WEIGHTS = {"large": 0.7, "small": 0.2, "tiny": 0.1}


def test_shares():
    assert shares(WEIGHTS) == {"large": 7, "small": 2, "tiny": 1}
    assert shares({"one": 3.0}) == {"one": 1}
    counts = shares({"a": 1.0, "b": 1.0, "c": 1.0})
    assert sorted(counts.values()) == [333, 333, 334]
    with pytest.raises(UserError, match="the weight of b is 0"):
        shares({"a": 1.0, "b": 0.0})
    with pytest.raises(UserError, match=r"it must be at least 0\.001 of it"):
        shares({"a": 1.0, "b": 1e-5})


@settings(max_examples=60)
@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=5), first=st.integers(0, 10**12))
def test_shares_are_kept_and_sources_walked_without_gaps(weights, first):
    mixture = one_stage(weights)
    row = np.arange(first, first + 2 * mixture.period)
    source, number = mixture.locate(row)
    for which, share in enumerate(mixture.counts):
        assert abs(share / mixture.period - weights[which] / sum(weights)) <= 0.001
        assert (source == which).sum() == 2 * share  # in any stretch as long as two periods
        walked = number[source == which]
        assert np.array_equal(walked, np.arange(walked[0], walked[0] + 2 * share))
        # Evenly spread: nowhere more than one row away from the exact share, or two at an edge.
        inside = np.cumsum(source == which)
        exact = np.arange(1, len(row) + 1) * share / mixture.period
        assert abs(inside - exact).max() <= 1 + len(weights) / 2


def one_stage(weights):
    counts = shares({str(n): weight for n, weight in enumerate(weights)})
    return _Stage(0, [*counts.values()], np.zeros(len(weights), np.int64))


def test_each_source_begins_at_its_first_row():
    source, number = one_stage([0.7, 0.2, 0.1]).locate(np.arange(10))
    assert [number[source == which].tolist() for which in range(3)] == [[*range(7)], [0, 1], [0]]


@settings(max_examples=40)
@given(data=st.data())
def test_stages_have_their_shares_and_leave_no_gaps(stores, data):
    """Counted row by row: nothing of a source is left out or read twice where the shares change."""
    names = [*stores]
    edges = sorted(data.draw(st.sets(st.integers(1, 400), max_size=3)))
    weight = st.sampled_from([0.0, 1.0, 2.0, 7.0])
    drawn = st.lists(weight, min_size=len(names), max_size=len(names)).filter(any)
    stages = [dict(zip(names, data.draw(drawn))) for _ in range(1 + len(edges))]
    mixture = Mixture(rings(stores), stages[0], tuple(zip(edges, stages[1:])))
    row = data.draw(st.permutations(range(500)))
    source, number = np.empty((2, 500), np.int64)
    source[row], number[row] = mixture.locate(np.array(row))
    for which, name in enumerate(names):
        walked = number[source == which]
        assert np.array_equal(walked, np.arange(len(walked)))
        assert mixture.epochs(500)[name] == len(walked) / Ring(stores[name], 9).count
    for weights, begin, end in zip(stages, [0, *edges], [*edges, 500], strict=True):
        for which, name in enumerate(names):
            share = weights[name] / sum(weights.values())
            rows = (source[begin:end] == which).sum()
            assert abs(rows - share * (end - begin)) <= 1 + len(names) / 2
            assert share > 0 or rows == 0


def test_an_epoch_of_each_source_has_every_token_as_target_once(stores):
    mixture = Mixture(rings(stores), WEIGHTS)
    epochs = {name: Ring(store, 9).count for name, store in stores.items()}
    # Enough rows for the second epoch of the large source to end; the others had more.
    last = 2 * epochs["large"] * 10 // 7 + 10
    tokens, segments = mixture.read(np.arange(last), seed=5)
    source, number = mixture.locate(np.arange(last))
    for which, (name, store) in enumerate(stores.items()):
        orders = []
        for epoch in range(2):
            here = (source == which) & (number // epochs[name] == epoch)
            assert here.sum() == epochs[name]
            targets = tokens[here, 1:][segments[here, 1:] > 0]
            assert sorted(targets) == sorted(store.tokens)
            orders.append(targets.tolist())
        assert name == "tiny" or orders[0] != orders[1]  # shuffled anew


def test_rows_do_not_depend_on_their_neighbours(stores):
    mixture = Mixture(rings(stores), WEIGHTS)
    tokens, segments = mixture.read(np.arange(100, 160), seed=5)
    order = np.random.default_rng(0).permutation(60)
    shuffled, shuffled_segments = mixture.read(100 + order, seed=5)
    assert np.array_equal(shuffled, tokens[order])
    assert np.array_equal(shuffled_segments, segments[order])
    assert not np.array_equal(mixture.read(np.arange(100, 160), seed=6)[0], tokens)


def test_an_epoch_of_overlapping_rows_is_the_ring_cut_so_in_another_order(stores):
    store = stores["large"]
    mixture = Mixture({"one": Ring(store, 9, 4)}, {"one": 1.0})
    count, size = -(-store.manifest.tokens // 5), store.manifest.tokens
    rows, _ = mixture.read(np.arange(count), seed=5)
    ring = np.concatenate([store.tokens, store.tokens, np.zeros(9, np.int32)])

    def cut(start):
        from_start = np.append(ring[start : start + size + 1], np.zeros(9, np.int32))
        return sorted(from_start[5 * row :][:9].tolist() for row in range(count))

    assert any(sorted(rows.tolist()) == cut(start) for start in range(size))
    assert mixture.epochs(count) == {"one": 1.0}


def test_epochs(stores):
    mixture = Mixture(rings(stores), WEIGHTS)
    rows = {name: Ring(store, 9).count for name, store in stores.items()}
    assert mixture.epochs(0) == {"large": 0, "small": 0, "tiny": 0}
    assert mixture.epochs(100) == {
        "large": 70 / rows["large"],
        "small": 20 / rows["small"],
        "tiny": 10 / rows["tiny"],
    }


def test_rows_too_short(stores):
    with pytest.raises(UserError, match="at least 2"):
        Mixture(rings(stores, 1), WEIGHTS)
