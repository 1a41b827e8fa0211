"""Sums as text: right, drawn as said, and held out by their numbers."""

import collections
import re

import pytest

from lmjax.config import UserError
from lmjax.data import SumTexts
from lmjax.data.documents import is_held_out


@pytest.mark.parametrize("units_first", [False, True])
def test_sums_are_right(units_first):
    source = SumTexts(digits=3, number=900, units_first=units_first)
    lengths = collections.Counter()
    for document in source.documents():
        first, second, answer = re.fullmatch(r"(\d+)\+(\d+)=(\d+)\n", document.text).groups()
        assert int(first) + int(second) == int(answer[::-1] if units_first else answer)
        assert len(first) == len(second)
        lengths[len(first)] += 1
    assert lengths == {1: 300, 2: 300, 3: 300}


def test_sums_are_the_same_again_and_others_by_another_seed():
    texts = [[d.text for d in SumTexts(seed=seed, number=50).documents()] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert SumTexts().fingerprint() != SumTexts(units_first=True).fingerprint()


def test_the_same_numbers_are_held_out_in_both_spellings():
    held = [
        [is_held_out(document, 0.3) for document in SumTexts(number=99, units_first=u).documents()]
        for u in (False, True)
    ]
    assert held[0] == held[1] and 10 < sum(held[0]) < 50


@pytest.mark.parametrize("name", ["digits", "number"])
def test_numbers_that_cannot_be_meant(name):
    with pytest.raises(UserError, match=f"{name}=0: must be at least 1"):
        SumTexts(**{name: 0})
