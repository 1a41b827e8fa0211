"""Texts with labels: lines and tables, classes and numbers, pairs, and what is wrong in them."""

import csv
import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.data import LabelledTable, LabelledTexts, build_stores
from lmjax.data.spans import KINDS
from lmjax.data.tokenizers import ByteTokenizer

END = 256


def source_of(folder, *records, kind=LabelledTexts, **fields):
    path = folder / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return kind(path=str(path), **fields)


def found(source):
    """Text and class of every document."""
    return [(d.text, d.labels[1]) for d in source.documents()]


def of(*labels):
    return [{"text": f"t{n}", "label": label} for n, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "names", "classes"),
    [
        (("pos", "neg", "pos"), ("neg", "pos"), [1, 0, 1]),
        ((10, 9, -1), ("-1", "9", "10"), [2, 1, 0]),
        ((True, False), ("false", "true"), [1, 0]),
        (("2", 2, 2.0), ("2",), [0, 0, 0]),
    ],
    ids=["names", "numbers", "truths", "one name"],
)
def test_labels_are_learnt_in_sorted_order(labels, names, classes, tmp_path):
    source = source_of(tmp_path, *of(*labels))
    assert source.names() == names
    assert [number for _, number in found(source)] == classes


def test_given_labels_count_and_name(tmp_path):
    """A number counts the names from 0, unless the names are numbers themselves."""
    counted = source_of(tmp_path, *of("pos", 0, 1, "neg"), labels=("neg", "pos"))
    assert [number for _, number in found(counted)] == [1, 0, 1, 0]
    stars = source_of(tmp_path, *of(1, "5", 3), labels=tuple("12345"))
    assert [number for _, number in found(stars)] == [0, 4, 2]


def test_numbers(tmp_path):
    source = source_of(tmp_path, *of(0.25, 3, "-1e-1"), kind=LabelledTexts)
    source = LabelledTexts(path=source.path, kind="number")
    assert [d.labels for d in source.documents()] == [(0, 0.25), (0, 3), (0, -0.1)]
    assert source.names() == ()


def test_pairs_have_the_closing_between_them(tmp_path):
    records = [{"a": "x", "b": "yz", "label": "same"}, {"a": "x", "b": "p", "label": "other"}]
    source = source_of(tmp_path, *records, text="a", second="b")
    [store] = build_stores(source, ByteTokenizer(), tmp_path / "store").values()
    both = [*b"x", END, *b"yz"], [*b"x", END, *b"p"]
    rest = [END] if ByteTokenizer().closing else []
    assert store.tokens.tolist() == [
        token for pair in both for token in [*ByteTokenizer().opening, *pair, *rest]
    ]
    np.testing.assert_array_equal(store.labels, [[0, 1], [0, 0]])
    begin = len(ByteTokenizer().opening)
    assert store.spans[2].tolist() == [KINDS.index("second")] * 2
    assert store.spans[0, 0] == begin + 2
    assert store.spans[1, 0] == store.offsets[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_has_the_classes_of_all_files(workers, tmp_path):
    """Compressed or not; learnt names are those of all files, whatever process reads one."""
    for name, label in (("a.jsonl", "z"), ("b.jsonl.gz", "y")):
        opened = gzip.open if name.endswith("gz") else open
        with opened(tmp_path / name, "wt") as file:
            file.write(json.dumps({"text": name, "label": label}))
    source = LabelledTexts(path=str(tmp_path / "*.jsonl*"))
    stores = build_stores(source, ByteTokenizer(), tmp_path / "store", workers=workers)
    np.testing.assert_array_equal(stores["all"].labels, [[0, 1], [0, 0]])


def test_what_is_wrong_in_a_line_is_told_with_its_number(tmp_path):
    labels = tuple("abcdefghijklmnop")
    for record, message in (
        ({"text": "t", "label": "q"}, r"field 'label' is 'q'; the labels are 'a', .* and 4 more"),
        ({"text": "t", "label": 16}, "is 16; there are 16 labels, counted from 0"),
        ({"text": "t"}, "no field 'label'; the fields are 'text'"),
        ({"label": "a"}, "no field 'text'"),
        ({"text": "t", "label": 0.5}, "a name or a whole number"),
        ({"text": "t", "label": None}, "a name or a whole number"),
    ):
        good = {"text": "t", "label": "b"}
        source = source_of(tmp_path, good, record, labels=labels)
        with pytest.raises(UserError, match=rf"texts.jsonl, line 2: .*{message}"):
            list(source.documents())
        skipping = source_of(tmp_path, good, record, good, labels=labels, on_error="skip")
        skipped = []
        [part] = skipping.parts()
        assert [d.labels for d in skipping.read(part, skipped.append)] == [(0, 1)] * 2
        assert len(skipped) == 1
    source = source_of(tmp_path, *of("x", True), kind=LabelledTexts)
    with pytest.raises(UserError, match="line 1: field 'label' is 'x', not a number"):
        list(LabelledTexts(path=source.path, kind="number").documents())


def test_settings_that_cannot_be_meant():
    for fields, message in (
        ({"text": "label"}, "give different names"),
        ({"second": "text"}, "give different names"),
        ({"labels": ("a", "a")}, "give each name once"),
        ({"labels": ("a",), "kind": "number"}, "no names of classes"),
    ):
        with pytest.raises(UserError, match=message):
            LabelledTexts(path="x", **fields)


# ---- tables --------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)


@given(rows=st.lists(st.tuples(TEXT, st.sampled_from("abc")), min_size=1, max_size=5))
@settings(deadline=None, max_examples=50)
def test_a_table_holds_what_was_written(rows, tmp_path_factory):
    """As Python's own writer quotes it, line ends and quotes included."""
    path = tmp_path_factory.mktemp("table") / "table.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    source = LabelledTable(path=str(path), labels=tuple("abc"))
    assert found(source) == [(text, "abc".index(label)) for text, label in rows]


def test_tabs_without_names_of_columns(tmp_path):
    path = tmp_path / "scores.tsv"
    path.write_text('a "quote\t0.25\n\nb\t1\n', encoding="utf-8-sig")
    fields = {"path": str(path), "delimiter": "tab", "kind": "number"}
    assert found(LabelledTable(columns=("text", "label"), **fields)) == [
        ('a "quote', 0.25),
        ("b", 1),
    ]
    with pytest.raises(UserError, match=r"no field 'text'; the fields are 'a \"quote', '0.25'"):
        list(LabelledTable(**fields).documents())


def test_lines_of_a_table_that_are_left_out(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('text,label\n"two\nlines",a\nx\ny,b\n')
    with pytest.raises(UserError, match=r"table\.csv, line 4: there are 1 fields for 2 columns"):
        list(LabelledTable(path=str(path)).documents())
    assert found(LabelledTable(path=str(path), on_error="skip")) == [("two\nlines", 0), ("y", 1)]
    path.write_bytes(b"text,label\n\xff,a\n")
    with pytest.raises(UserError, match=r"table\.csv is not UTF-8 at byte 11"):
        list(LabelledTable(path=str(path)).documents())
