"""Rows of whole documents against plain packing, document by document, and against the store."""

import collections
import functools
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.data.loader import Loader
from lmjax.data.mixture import Mixture
from lmjax.data.packing import best_fit
from lmjax.data.plan import make_plan
from lmjax.data.rows import Ring
from lmjax.data.store import TokenStore
from lmjax.data.whole_documents import WholeDocuments
from lmjax.objectives import BlankInfilling, DocumentBlank, Mixed, TokenBlanks, TokenTable
from tests.lmjax.data.test_spans import EOP, MASK, TOKENIZER, prompts

SEPARATOR = 7


class Store(TokenStore):
    """Documents of the given lengths in memory; no two tokens are alike but the separators."""

    def __init__(self, lengths, separator=None):
        self.offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
        self.tokens = np.arange(100, 100 + self.offsets[-1]).astype(np.uint32)
        if separator is not None:
            self.tokens[self.offsets[:-1][np.diff(self.offsets) > 0]] = separator
        self.spans = np.zeros((3, 0), np.int64)
        self.folder = "the store"
        self.manifest = types.SimpleNamespace(
            tokens=int(self.offsets[-1]), documents=len(lengths), separator=separator
        )


def reader(lengths, row_length, separator=None, **settings):
    """Rows of whole documents of a store in memory."""
    return WholeDocuments(Store(lengths, separator), row_length, **settings)


def one_by_one(lengths, room):
    """Best fit decreasing as in a textbook: the room left in each row."""
    left = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in range(len(left)) if left[row] >= length]
        if fitting:
            left[min(fitting, key=lambda row: left[row])] -= length
        else:
            left.append(room - length)
    return sorted(left)


def fewest(lengths, room):
    """The number of rows of the best possible packing, by trying all sets of documents."""

    @functools.cache
    def best(packed):
        """(rows, tokens in the last one) when a set of documents has been packed: the least."""
        if not packed:
            return 1, 0
        found = []
        for number, length in enumerate(lengths):
            if packed >> number & 1:
                rows, used = best(packed ^ 1 << number)
                found.append((rows, used + length) if used + length <= room else (rows + 1, length))
        return min(found)

    return best((1 << len(lengths)) - 1)[0]


@settings(max_examples=200)
@given(room=st.integers(1, 40), data=st.data())
def test_the_plan_is_that_of_best_fit_document_by_document(room, data):
    lengths = data.draw(st.lists(st.integers(1, room), max_size=60))
    plan = best_fit(np.bincount(lengths, minlength=room + 1))
    left, documents = [], collections.Counter()
    first = 0
    for group, end in enumerate(plan.ends):
        pairs = slice(*plan.pairs[group : group + 2])
        used = int((plan.kind[pairs] * plan.each[pairs]).sum())
        left += [room - used] * int(end - first)
        for length, each, before in zip(plan.kind[pairs], plan.each[pairs], plan.before[pairs]):
            assert before == documents[int(length)]
            documents[int(length)] += int(each * (end - first))
        first = end
    assert sorted(left) == one_by_one(lengths, room)
    assert documents == collections.Counter(lengths) and plan.rows == len(left)


@settings(max_examples=60)
@given(room=st.integers(2, 30), data=st.data())
def test_padding_is_near_the_least_possible(room, data):
    """At most 11/9 of the fewest rows, and 4 more; any two rows hold more than one has room for."""
    lengths = data.draw(st.lists(st.integers(1, room), min_size=1, max_size=9))
    rows = best_fit(np.bincount(lengths, minlength=room + 1)).rows
    assert fewest(lengths, room) <= rows <= 11 / 9 * fewest(lengths, room) + 4
    assert rows == 1 or rows < 2 * sum(lengths) / room + 1


def epoch(rows, number=0, seed=3, source=0):
    """Tokens and segments of an epoch in the order of training."""
    numbers = np.arange(number * rows.count, (number + 1) * rows.count)
    return rows.read(*rows.shuffle(numbers, seed, source))


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=60)


@settings(max_examples=150)
@given(lengths=LENGTHS, room=st.integers(31, 60), more=st.integers(0, 5), separated=st.booleans())
def test_every_document_is_whole_exactly_once_an_epoch(lengths, room, more, separated):
    rows = reader(lengths, room + more, SEPARATOR if separated else None, room=room)
    store = rows.store
    orders = []
    for number in range(2):
        tokens, segments = epoch(rows, number)
        assert tokens.shape == (rows.count, room + more) and tokens.dtype == np.int32
        found = []
        for row in range(rows.count):
            used = int((segments[row] > 0).sum())
            assert used <= room and (segments[row, used:] == 0).all()
            assert (tokens[row, used:] == 0).all()
            texts = [
                tokens[row][segments[row] == n].tolist() for n in range(1, segments[row].max() + 1)
            ]
            in_order = [token for text in texts for token in text]
            assert in_order == tokens[row, :used].tolist()
            if separated:
                assert texts.pop() == [SEPARATOR]
            found += texts
        documents = [
            store.tokens[first:end].tolist() for first, end in zip(store.offsets, store.offsets[1:])
        ]
        assert sorted(found) == sorted(documents)
        orders.append(found)
    extra = rows.count if separated else 0
    assert rows.padding == pytest.approx(1 - (sum(lengths) + extra) / tokens.size)
    if len(set(map(str, documents))) > 8:
        assert orders[0] != orders[1]


@settings(max_examples=150)
@given(
    lengths=st.lists(st.integers(0, 100), min_size=1, max_size=30),
    row_length=st.integers(3, 30),
    separated=st.booleans(),
)
def test_documents_without_room_are_cut_and_every_token_is_a_target_once(
    lengths, row_length, separated
):
    """But the first of each document, and every end of one where a separator ends it."""
    if not sum(lengths):
        return
    rows = reader(lengths, row_length, SEPARATOR if separated else None)
    tokens, segments = epoch(rows)
    assert (segments.max(axis=1) > 0).all()
    is_target = (segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])
    targets = tokens[:, 1:][is_target]
    firsts = set(rows.store.offsets[:-1].tolist())
    expected = [100 + n for n in range(sum(lengths)) if n not in firsts]
    assert sorted(targets) == expected
    # Each step from one token to the next is one of the same document.
    before = tokens[:, :-1][is_target]
    assert ((targets == before + 1) | (before == SEPARATOR)).all()
    if separated:
        ends = tokens[:, 1:][(segments[:, 1:] != segments[:, :-1]) & (segments[:, 1:] > 0)]
        assert (ends == SEPARATOR).all() and len(ends) == sum(length > 0 for length in lengths)
    long = [n for n in lengths if n > row_length - separated]
    assert bool(long) == bool(rows.warning())
    if long:
        assert f"{len(long)} of {len(lengths)} documents" in rows.warning()
        assert rows.warning().endswith("are cut")


def test_documents_without_room_are_dropped_and_counted():
    rows = reader([5, 30, 3, 31, 4], 8, long="drop")
    tokens, segments = epoch(rows)
    assert sorted(tokens[segments > 0]) == [*range(100, 105), *range(135, 138), *range(169, 173)]
    assert rows.count == 2 and rows.padding == 1 - 12 / 16
    assert rows.note() == "2 rows of whole documents, with 25.0% padding"
    assert rows.warning() == (
        "2 of 5 documents, with 83.6% of the tokens, have no room in a row of 8 tokens and are "
        "left out (long_documents=drop)"
    )
    with pytest.raises(UserError, match=r"no document of the store fits .* for 8 tokens"):
        reader([9, 10], 8, long="drop")
    with pytest.raises(UserError, match="they need at least 2"):
        reader([9, 10], 8, room=1)
    assert reader([5, 3], 8).warning() == "" and reader([5, 3], 8).padding == 0


def keep(tokens, segments, seeds):
    return {"tokens": tokens, "segments": segments, "seeds": seeds}


@settings(max_examples=40)
@given(one=LENGTHS, two=LENGTHS, step=st.integers(0, 200), order=st.randoms())
def test_hosts_order_and_a_resume_in_the_middle_make_no_difference(one, two, step, order):
    def mixture():
        readers = {"one": reader(one, 20), "two": reader(two, 20, SEPARATOR)}
        return Mixture(readers, {"one": 0.7, "two": 0.3})

    whole = Loader(make_plan(3, 8), mixture(), keep)
    steps = [*range(step, step + 6)]
    batches = {number: whole.batch(number) for number in steps}
    hosts = [Loader(make_plan(3, 8), mixture(), keep, host, 4) for host in range(4)]
    order.shuffle(steps)
    for number in steps:
        parts = [host.batch(number) for host in hosts]
        for name, expected in batches[number].items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), expected)
    with Loader(make_plan(3, 8), mixture(), keep).iterate(step + 3) as resumed:
        for _ in range(3):
            number, batch = next(resumed)
            np.testing.assert_array_equal(batch["tokens"], batches[number]["tokens"])
    other = Loader(make_plan(4, 8), mixture(), keep)
    if len(one) > 20:
        assert any((other.batch(n)["tokens"] != b["tokens"]).any() for n, b in batches.items())


def test_an_epoch_of_a_mixture_has_every_document_once(tmp_path):
    """Over several hosts and through the plan of a run, of stores that lie on the disk."""
    store = prompts(tmp_path / "store", [(n % 9 + 1, n % 7, n % 3) for n in range(100)])
    mixture = Mixture({"one": WholeDocuments(store, 32)}, {"one": 1.0})
    count = mixture._sources[0].count
    assert mixture.epochs(count) == {"one": 1.0}
    for workers in (0, 2):
        found, left = [], count
        loader = Loader(make_plan(3, 4), mixture, keep, workers=workers)
        with loader.iterate() as batches:
            while left > 0:
                _, batch = next(batches)
                for tokens, segments in zip(batch["tokens"][:left], batch["segments"][:left]):
                    found += [
                        tokens[segments == number].tolist() for number in range(1, segments.max())
                    ]
                left -= 4
        edges = zip(store.offsets, store.offsets[1:])
        assert sorted(found) == sorted(store.tokens[a:b].tolist() for a, b in edges)


@settings(max_examples=40)
@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 30), st.integers(0, 4)), min_size=1, max_size=12
    ),
    row_length=st.integers(8, 40),
)
def test_spans_stand_where_their_tokens_do(tmp_path_factory, lengths, row_length):
    """Of documents that are cut, too."""
    store = prompts(tmp_path_factory.mktemp("whole"), lengths)
    rows = WholeDocuments(store, row_length)
    place = rows.shuffle(np.arange(2 * rows.count), 5, 0)
    (tokens, segments), spans = rows.read(*place), rows.spans(*place)
    for row in range(2 * rows.count):
        inside = np.zeros(row_length, bool)
        found = spans.of(row, "answer")
        for first, end in found:
            inside[first:end] = True
            if first and segments[row, first - 1] == segments[row, min(first, row_length - 1)]:
                assert tokens[row, first - 1] == MASK
            if end < row_length:
                assert tokens[row, end] == EOP
        np.testing.assert_array_equal(tokens[row] == ord("a"), inside)
        assert (np.diff(found[:, 0]) > 0).all()


@pytest.mark.parametrize("kind", ["alone", "mixed"])
def test_no_answer_is_lost_at_the_edge_of_a_row(tmp_path, kind):
    """Every answer of an epoch is predicted whole; of a ring some are cut, or lose their prompt."""
    lengths = [(n % 9 + 1, n % 5 + 1, n % 3) for n in range(300)]
    store = prompts(tmp_path / "store", lengths)
    short = BlankInfilling(answers="[MASK]", sop="<user>", eop="<|endofpiece|>")
    objective = replace(short, blanks=DocumentBlank(mask="<bot>"))
    if kind == "mixed":
        assert short.row_room(64) < objective.row_room(64)
        objective = Mixed(
            objectives=(objective, replace(short, blanks=TokenBlanks(mask="<bot>"))),
            weights=(0.5, 0.5),
        )
    length = 64
    readers = {
        "whole": WholeDocuments(store, objective.row_length(length), objective.row_room(length)),
        "ring": Ring(store, objective.row_length(length), objective.row_overlap(length)),
    }
    whole = {}
    for name, rows in readers.items():
        place = rows.shuffle(np.arange(rows.count), 5, 0)
        seeds = np.arange(rows.count).astype(np.uint64)
        lexicon = TokenTable.of(TOKENIZER)
        example = objective.prepare(*rows.read(*place), seeds, lexicon, length, rows.spans(*place))
        inputs, targets = example.inputs, example.targets
        whole[name] = collections.Counter()
        for row in range(rows.count):
            for number in range(1, inputs.segments[row].max() + 1):
                here = inputs.segments[row] == number
                predicted = targets.tokens[row][here & (targets.weights[row] > 0)].tolist()
                prompt = int((inputs.tokens[row][here] == ord("p")).sum())
                if predicted[-1] == EOP:
                    whole[name][prompt, len(predicted) - 1] += 1
    expected = collections.Counter((prompt, answer) for prompt, answer, _ in lengths)
    assert whole["whole"] == expected
    lost = expected - whole["ring"]
    assert lost.total() > 10
