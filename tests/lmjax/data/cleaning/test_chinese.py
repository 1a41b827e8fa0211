"""Rules for Chinese text and words of lists by language, on examples worked out by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.data.cleaning.bad_words import BadWordLists
from lmjax.data.cleaning.chinese import ChineseQuality, repeated_characters
from lmjax.data.cleaning.step import Dropped
from lmjax.data.documents import Document

LISTS = Path(__file__).parents[5] / "shared" / "data" / "badwords"
SENTENCE = "春天来了，河水慢慢上涨，城里的人把家具搬到楼上。"  # 24 characters, 3 of them marks
WORDS = (
    "金木水火土天地人日月星山川河海江湖风雨雷电春夏秋冬东南西北中上下左右前后里外大小多少高低长短"
)


def verdict(step, text: str) -> str:
    result = step(Document(text, "page"))
    return result.reason if isinstance(result, Dropped) else ""


def story(lines: int = 12) -> str:
    """Lines of 25 characters, none like another."""
    return "\n".join(
        WORDS[n : n + 11] + "，" + WORDS[2 * n : 2 * n + 12] + "。" for n in range(lines)
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (story(), ""),
        (SENTENCE * 8, "too few characters"),  # 192
        ("\n".join("春夏秋冬，好。" for _ in range(40)), "lines too short on average"),  # 7 of each
        ("plain English words, and more of them. " * 10, "too few Chinese characters"),
        (story().replace("，", "的").replace("。", "了"), "too little punctuation"),
        ("春，夏。秋！冬？" * 30, "too much punctuation"),
        (SENTENCE * 9, "too many repeated 13-grams of characters"),
        ("", "too few characters"),
    ],
)
def test_chinese_quality(text, reason):
    assert verdict(ChineseQuality(), text) == reason


def test_the_bounds_are_those_of_the_paper():
    step = ChineseQuality(least_marks=0, most_repeated=1)
    assert verdict(step, "春" * 200) == "" and verdict(step, "春" * 199) == "too few characters"
    assert verdict(step, " \n".join(["春" * 10] * 20)) == ""  # blanks count for nothing
    assert verdict(step, "春" * 60 + "a" * 140) == ""
    assert verdict(step, "春" * 59 + "a" * 141) == "too few Chinese characters"
    with pytest.raises(UserError, match="ngram=0"):
        replace(step, ngram=0).validate()


@given(st.text("天地人ab", max_size=40), st.integers(1, 6))
def test_repeated_characters_are_those_of_brute_force(text, length):
    grams = Counter(text[n : n + length] for n in range(len(text) - length + 1))
    total = sum(grams.values())
    expected = (total - len(grams)) / total if total else 0
    assert repeated_characters(text, length) == pytest.approx(expected)


@pytest.fixture
def lists(tmp_path):
    (tmp_path / "en.txt").write_text("damn\nbloody hell\n")
    (tmp_path / "zh.txt").write_text("\ufeff坏词\n", "utf-8")
    return BadWordLists(path=f"{tmp_path}/{{}}.txt", languages=("en", "zh"))


def test_lists_are_those_of_the_language(lists):
    assert verdict(lists, "The committee said that the damn bridge would not be rebuilt.") != ""
    assert verdict(lists, "The committee of Amsterdamn decided on the bridge.") == ""
    assert verdict(lists, "委员会决定不重建这座坏词桥。") == "a word of the list"
    # German, which has no list; and the metadata, which say another language than the text has.
    german = "Der Ausschuss beschloss, dass die damn Brücke nicht gebaut wird."
    assert verdict(lists, german) == ""
    document = Document(german, "d", metadata={"language": "en"})
    assert lists(document).reason == "a word of the list"


@pytest.mark.parametrize(
    ("unit", "kept"),
    [
        ("sentence", "一切都好。再见。\n还好。\n\n完了。"),
        ("line", "还好。\n\n完了。"),
        ("paragraph", "完了。"),
    ],
)
def test_units_of_chinese_text(lists, unit, kept):
    text = "一切都好。这是坏词！再见。\n还好。\n\n完了。"
    assert replace(lists, unit=unit)(Document(text, "d")).text == kept


def test_words_for_each_line(lists):
    """ChineseWebText's rule: more than half a word of the list for each line."""
    step = replace(lists, most_per_line=0.5)
    assert verdict(step, "这里有坏词。\n这里没有。") == ""
    assert verdict(step, "这里有坏词，坏词。\n这里没有。") == "too many words of the list"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "words.txt"}, "with {} for the code"),
        ({"languages": ()}, "and the codes"),
        ({"most_per_line": 0.5, "unit": "line"}, "for unit=document alone"),
    ],
)
def test_lists_that_cannot_be_meant(lists, changes, message):
    with pytest.raises(UserError, match=message):
        replace(lists, **changes).validate()


def test_a_list_that_is_missing_or_empty(lists, tmp_path):
    missing = replace(lists, languages=("zh", "ru"))
    with pytest.raises(UserError, match=r"ru\.txt"):
        missing(Document("Комитет решил не строить мост до весны.", "d"))
    (tmp_path / "de.txt").write_text("\n")
    with pytest.raises(UserError, match="has no word"):
        replace(lists, languages=("de",))(Document("x", "d", metadata={"language": "de"}))


@pytest.mark.skipif(not LISTS.is_dir(), reason="the lists are not there")
def test_c4_s_lists_in_their_languages():
    step = BadWordLists(path=f"{LISTS}/{{}}.txt", languages=("en", "zh", "de", "fr", "es"))
    for code in ("en", "zh"):
        word = (LISTS / f"{code}.txt").read_text("utf-8").split("\n")[4]
        found = step(Document(f"a {word} b", "d", metadata={"language": code}))
        assert found.reason == "a word of the list"
    assert verdict(step, SENTENCE * 9) == ""
