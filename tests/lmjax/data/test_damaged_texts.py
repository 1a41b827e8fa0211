"""Comparisons of passages with damaged copies of themselves."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.data import TextFiles, build_stores
from lmjax.data.damaged_texts import WORD, DamagedTexts, damage
from lmjax.data.tokenizers import ByteTokenizer


@given(st.text(), st.floats(0.01, 1))
def test_a_damaged_text_has_the_same_letters(text, share):
    damaged = damage(text, share)
    assert collections.Counter(damaged) == collections.Counter(text)
    assert damage(text, share) == damaged


@given(st.text(st.characters(max_codepoint=0x2E7F)), st.floats(0.01, 1))
def test_a_damaged_text_has_the_same_words_and_gaps(text, share):
    """Of Chinese signs beside letters two words may become one."""
    damaged = damage(text, share)
    words, others = WORD.findall(text), WORD.findall(damaged)
    assert WORD.split(damaged) == WORD.split(text)
    assert collections.Counter(words) == collections.Counter(others)
    moved = sum(one != other for one, other in zip(words, others, strict=True))
    assert moved <= max(2, round(share * len(words)))


def test_different_words_change_places():
    words = [f"w{n}" for n in range(40)]
    others = damage(" ".join(words), 0.2).split()
    assert sum(one != other for one, other in zip(words, others, strict=True)) == 8


def test_passages_are_pairs_of_one_length(tmp_path):
    lines = [" ".join(f"{n}-{m}" for m in range(30)) for n in range(20)]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*lines, "a a a a a", "too short"]))
    texts = TextFiles(path=str(path), split="line")
    source = DamagedTexts(source=texts, words=12)
    documents = list(source.documents())
    assert len(documents) == 20 * 3 * 2  # 12, 12 and 6 words of each line
    for number, document in enumerate(documents):
        assert document.labels == (number % 2, number % 2, 0)
        assert document.group == lines[number // 6]
    [store] = build_stores(source, ByteTokenizer(), tmp_path / "store").values()
    sizes = np.diff(store.offsets).reshape(-1, 2)
    np.testing.assert_array_equal(sizes[:, 0], sizes[:, 1])


def test_what_it_is_known_by(tmp_path):
    paths = [tmp_path / name for name in ("one.txt", "two.txt", "three.txt")]
    for path, text in zip(paths, ("a b c d e", "a b c d e", "a b c d f"), strict=True):
        path.write_text(text)
    one, two, three = (DamagedTexts(source=TextFiles(path=str(path))) for path in paths)
    other = DamagedTexts(source=one.source, share=0.5)
    marks = [source.fingerprint() for source in (one, two, three, other)]
    assert marks[0] == marks[1] and len(set(marks)) == 3


@pytest.mark.parametrize(
    ("message", "settings"),
    [("words=3: a passage has at least 4", {"words": 3}), ("share=0.0: must be", {"share": 0.0})],
)
def test_mistakes(message, settings):
    with pytest.raises(UserError, match=message):
        DamagedTexts(source=TextFiles(path="a"), **settings)
