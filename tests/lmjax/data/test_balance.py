"""Balanced sampling over tags: shares against their definition, and what an epoch really reads."""

import collections
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.data import Conversations, Data, Domain, build_stores, prepare
from lmjax.data.balance import TagBalance, document_shares, read_taxonomy, repeats
from lmjax.data.groups import Groups
from lmjax.data.rows import RowFormat, WholeDocuments
from lmjax.data.tokenizers import Bytes, ByteTokenizer
from lmjax.jobs.tag_coverage import tables_of
from tests.lmjax.data.test_whole_documents import Store

TAXONOMY = {
    "code": {"python": ["loops", "classes"], "c": {}},
    "prose": {"news": [], "verse": ["odes"]},
}
LEAVES = (
    *[("code", "python", "loops"), ("code", "python", "classes"), ("code", "c")],
    *[("prose", "news"), ("prose", "verse", "odes")],
)
PATHS = st.lists(
    st.lists(st.sampled_from(LEAVES), min_size=1, max_size=3, unique=True), min_size=1, max_size=30
)


def below(paths, node):
    """Documents below a node; one with several tags in parts."""
    level = len(node)
    return sum(sum(p[:level] == node for p in own) / len(own) for own in paths)


def share(paths, node, exponent):
    """Share of a node, from the top down, by its definition."""
    if not node:
        return 1.0
    siblings = {p[: len(node)] for own in paths for p in own if p[: len(node) - 1] == node[:-1]}
    siblings = {sibling for sibling in siblings if len(sibling) == len(node)}
    total = sum(below(paths, sibling) ** exponent for sibling in siblings)
    return share(paths, node[:-1], exponent) * below(paths, node) ** exponent / total


@settings(max_examples=60, deadline=None)
@given(paths=PATHS, exponent=st.sampled_from([0.0, 0.5, 1.0]))
def test_shares_are_their_definition(paths, exponent):
    """1e-9: float64."""
    got = document_shares(paths, exponent)
    assert got.sum() == pytest.approx(1)
    expected = [
        sum(share(paths, path, exponent) / below(paths, path) for path in own) / len(own)
        for own in paths
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    if exponent == 1:
        np.testing.assert_allclose(got, 1 / len(paths), rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(paths=PATHS, most=st.integers(1, 6))
def test_repeats_are_the_shares_within_one(paths, most):
    shares = document_shares(paths, 0.0)
    found = repeats(shares, most, paths)
    wanted = np.minimum(shares / shares.min(), most)
    assert (found >= 1).all() and (found <= most).all()
    assert (np.abs(found - wanted) < 1 + 1e-6).all()
    for leaf in {own[0] for own in paths}:
        mine = [number for number, own in enumerate(paths) if own[0] == leaf]
        assert abs(found[mine].sum() - wanted[mine].sum()) <= 1 + 1e-6


def test_all_leaves_are_read_alike_where_the_exponent_is_0():
    """Two tags of one level, 30 documents and 10: those of the rare one are read three times."""
    paths = [(("a",),)] * 30 + [(("b",),)] * 10
    assert repeats(document_shares(paths, 0.0), 5, paths).tolist() == [1] * 30 + [3] * 10
    assert repeats(document_shares(paths, 0.0), 2, paths).tolist() == [1] * 30 + [2] * 10
    assert repeats(document_shares(paths, 1.0), 5, paths).tolist() == [1] * 40


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 4)), min_size=1, max_size=15),
    long=st.sampled_from(["cut", "drop"]),
    epoch=st.integers(0, 2),
)
def test_an_epoch_reads_each_document_as_often_as_planned(documents, long, epoch):
    """Counted token by token; a cut document's tokens at the joints are read once more."""
    lengths, times = map(list, zip(*documents, strict=True))
    store, room = Store(lengths), 12
    if long == "drop" and min(lengths) > room:
        return
    rows = WholeDocuments(store, room, long=long, repeats=np.array(times))
    numbers = np.arange(rows.count) + epoch * rows.count
    tokens, segments = rows.read(*rows.shuffle(numbers, seed=1, source=0))
    found = collections.Counter(tokens[segments > 0].tolist())
    for number, (length, count) in enumerate(documents):
        own = store.tokens[store.offsets[number] : store.offsets[number + 1]].tolist()
        if length > room:
            least = count if long == "cut" else 0
            assert all(least <= found[token] <= 2 * least for token in own)
        else:
            assert [found[token] for token in own] == [count] * length


def test_groups_are_read_as_often_as_planned():
    store = Store([3, 2, 4])
    store.labels = np.array([[0.0, 1], [0, 0], [0, 1]], np.float32)
    rows = Groups(store, 8, 1, repeats=np.array([1, 3, 2]))
    row, _ = rows.shuffle(np.arange(rows.count), seed=0, source=0)
    found = collections.Counter(rows.documents(row).tolist())
    assert found == {0: 1, 1: 3, 2: 2}


@pytest.fixture
def folder(tmp_path):
    """Conversations with tags, one with two and one with none, and a taxonomy."""
    tags = ["loops"] * 12 + ["news"] * 3 + [["classes", "odes"], None]
    records = [
        {"prompt": f"{n}?", "completion": "!" * (n + 1), "tags": tag} for n, tag in enumerate(tags)
    ]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "taxonomy.json").write_text(json.dumps(TAXONOMY))
    return tmp_path


def data_of(folder, **settings):
    source = Conversations(path=str(folder / "talks.jsonl"), metadata=("tags",))
    balance = TagBalance(taxonomy=str(folder / "taxonomy.json"), exponent=0.0)
    return Data(
        train=(Domain(name="talk", source=source, balance=balance),),
        tokenizer=Bytes(),
        held_out=0.0,
        length=64,
        rows="whole_documents",
        cache=str(folder / "cache"),
        **settings,
    )


def test_prepared_data_have_their_coverage(folder):
    prepared = prepare(data_of(folder), folder / "tokenizer")
    coverage = prepared.coverage["talk"]
    assert coverage.missing() == [("code", "c")] and coverage.depth == 3
    assert coverage.words.startswith("code 12, ")
    assert [table.title for table in tables_of(prepared)] == [
        f"Tags of talk, level {level}" for level in (1, 2, 3)
    ]
    first, *_, last = tables_of(prepared)
    names = [row[0] for row in first.rows]
    assert names == ["code, 12.5", "prose, 3.5", "(no tag), 1"]
    assert sum(row[1] for row in first.rows) == pytest.approx(1)
    assert sum(row[2] for row in first.rows) == pytest.approx(1)
    before, read = np.array([row[1:] for row in first.rows]).T
    assert read.max() - read.min() < before.max() - before.min()
    assert last.notes == ("1 of 6 have no document.",)
    counts = collections.Counter()
    reader = prepared.reader(prepared.train["talk"], RowFormat(65), "talk")
    for row in range(reader.count):
        document = reader._documents(np.array([row]), np.zeros(1, np.int64))[1]
        counts.update(document.tolist())
    assert [counts[n] for n in range(17)] == coverage.repeats.tolist()
    taxonomy = prepared.fingerprints["talk"]["taxonomy"]
    (folder / "taxonomy.json").write_text(json.dumps(TAXONOMY | {"more": {}}))
    assert (
        prepare(data_of(folder), folder / "tokenizer").fingerprints["talk"]["taxonomy"] != taxonomy
    )


@pytest.mark.parametrize(
    ("taxonomy", "message"),
    [
        ({"a": ["loops"], "b": ["loops", "news", "classes", "odes"]}, "a/loops and b/loops"),
        ({"a": ["news"]}, "document 0 has the tag 'loops', which is not in"),
        ({"a": 3}, "3 below a is neither"),
        ({"a": [3]}, "3 in the list of a is no name"),
        ([], "it is empty"),
    ],
)
def test_a_taxonomy_that_does_not_fit(folder, taxonomy, message):
    (folder / "taxonomy.json").write_text(json.dumps(taxonomy))
    with pytest.raises(UserError, match=message):
        prepare(data_of(folder), folder / "tokenizer").coverage  # noqa: B018


def test_settings_that_do_not_fit(folder):
    data = data_of(folder)
    [domain] = data.train
    with pytest.raises(UserError, match="cannot read the taxonomy"):
        read_taxonomy(str(folder / "none.json"))
    with pytest.raises(UserError, match=r"set source\.metadata=\('tags',\)"):
        Domain(name="a", source=Conversations(path="x"), balance=TagBalance())
    with pytest.raises(UserError, match=r"balance needs data\.rows=whole_documents"):
        Data(train=(domain,))
    for wrong in ({"exponent": 1.5}, {"most": 0}):
        with pytest.raises(UserError):
            TagBalance(**wrong)


def test_a_store_without_a_taxonomy_has_its_tags(folder):
    source = Conversations(path=str(folder / "talks.jsonl"), metadata=("tags",))
    store = build_stores(source, ByteTokenizer(), folder / "store")["all"]
    coverage = TagBalance(exponent=0.0, most=24).of_store(store)
    counts = {name: reads for name, _, reads in coverage.rows(1)}
    assert counts == {"loops": 12, "news": 12, "classes": 12, "odes": 12, "(no tag)": 12}
