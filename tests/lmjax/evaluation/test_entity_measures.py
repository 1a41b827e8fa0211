"""Entities of labels, beside those that the labels were made of, and cases worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.evaluation.entity_measures import (
    Entity,
    are_entities,
    count_entities,
    entities_of,
)

PARTS = st.lists(
    st.tuples(st.sampled_from(["", "LOC", "PER"]), st.integers(1, 3), st.integers(0, 2)),
    max_size=6,
)


@given(parts=PARTS, scheme=st.sampled_from(["BIO", "BIOES"]))
def test_labels_give_back_the_entities_that_they_were_made_of(parts, scheme):
    labels, wanted = [], set()
    for kind, size, gap in parts:
        first = len(labels)
        wanted.add(Entity(kind, first, first + size))
        tags = ["B"] + ["I"] * (size - 1)
        if scheme == "BIOES":
            tags[-1] = "E" if size > 1 else "S"
        labels += [f"{tag}-{kind}" if kind else tag for tag in tags] + ["O"] * gap
    assert entities_of(labels) == wanted


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ("I-A I-A O I-A", [("A", 0, 2), ("A", 3, 4)]),
        ("B-A I-B I-B", [("A", 0, 1), ("B", 1, 3)]),
        ("B-A B-A I-A", [("A", 0, 1), ("A", 1, 3)]),
        ("B-A E-A I-A", [("A", 0, 2), ("A", 2, 3)]),
        ("S-A I-A", [("A", 0, 1), ("A", 1, 2)]),
        ("O O", []),
        ("", []),
    ],
)
def test_labels_that_break_the_scheme_have_the_entities_of_conlleval(labels, found):
    assert entities_of(labels.split()) == {Entity(*one) for one in found}


def test_an_entity_is_right_with_its_kind_and_both_borders():
    wanted = [["B-A", "I-A", "O", "B-B"], ["B-A"]]
    found = [["B-A", "O", "O", "B-B"], ["B-B"]]
    counts = count_entities(wanted, found)
    assert counts == (1, 3, 3)
    assert counts.precision == counts.recall == pytest.approx(1 / 3)
    assert counts.f1 == pytest.approx(1 / 3)
    assert count_entities([["O"]], [["O"]]).f1 == 0


def test_names_that_mark_entities():
    assert are_entities(("O", "B-LOC", "I-LOC")) and are_entities(("B", "I", "O"))
    assert not are_entities(("NOUN", "O")) and not are_entities(("B-LOC", "I-LOC"))
    assert not are_entities(("O",))
