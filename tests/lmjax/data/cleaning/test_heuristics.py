"""The rules of Gopher, C4 and FineWeb on examples that are worked out by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.data.cleaning.bad_words import BadWords
from lmjax.data.cleaning.heuristics import (
    C4Lines,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
)
from lmjax.data.cleaning.repetition import (
    in_repeated_ngrams,
    most_frequent,
    ngram_numbers,
    repeated_items,
)
from lmjax.data.cleaning.step import Dropped, apply_steps
from lmjax.data.cleaning.units import split_words
from lmjax.data.documents import Document

PROSE = (
    "The river that runs through the old town is wide and slow. In spring it carries snow from "
    "the hills, and the people of the lower streets move what they have to the upper floors. "
    "Nobody complains, since the water brings good soil with it. By the end of May most of it is "
    "gone, the boats are painted, and children swim where carts stood a month before."
)
CHINESE = (
    "春天来了，河水慢慢上涨，城里的人把家具搬到楼上。没有人抱怨，因为河水带来了肥沃的泥土。"
    "到了五月底，大部分积水已经退去，船只重新上漆，孩子们在一个月前还停着马车的地方游泳。"
)


def verdict(step, text: str) -> str:
    """The reason for dropping a text, or empty."""
    result = step(Document(text, "page"))
    return result.reason if isinstance(result, Dropped) else ""


def filled(text: str, words: int = 100) -> str:
    """A text of at least that many words."""
    return " ".join([text] * (1 + words // max(1, len(text.split()))))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE, ""),
        (CHINESE, ""),
        ("The end of it.", "too few words"),
        (filled("the a to of b"), "words too short or too long on average"),
        (filled("the to internationalisation incomprehensibilities"), "words too short"),
        (filled("the tag #this of #that"), "too many '#'"),
        (filled("the story goes on... and"), "too many ellipses"),
        (filled("the 1234 to 5678 9012 of"), "too few words with a letter"),
        (filled("quick brown foxes jump over lazy dogs"), "too few stop words"),
        ("\n".join(["- one of the things to have"] * 20), "too many lines begin with a bullet"),
        ("\n".join(["some of the longest things to have and more…"] * 9), "ellips"),
    ],
)
def test_gopher_quality(text, reason):
    assert reason in verdict(GopherQuality(), text)
    assert bool(verdict(GopherQuality(), text)) == bool(reason)


def test_gopher_s_bounds_are_settings():
    count = len(PROSE.split())
    assert verdict(GopherQuality(least_words=count), PROSE) == ""
    assert verdict(GopherQuality(least_words=count + 1), PROSE) == "too few words"
    assert verdict(GopherQuality(most_words=count - 1), PROSE) == "too many words"
    german = "Das Haus steht am Fluss und ist sehr alt. " * 10
    assert verdict(GopherQuality(), german) == "too few stop words"
    assert verdict(GopherQuality(least_stop_words=0), german) == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE, ""),
        (CHINESE, ""),
        # 3 of 9 lines occurred before.
        ("\n".join([*"abcdef", *"abc"]), "too many repeated lines"),
        # 1 of 4 lines, but most of the characters.
        ("\n".join(["ab", "cd", PROSE, PROSE]), "too many characters in repeated lines"),
        # 1 of 3 paragraphs; of lines 1 of 6, with few characters.
        ("a b\nc d\n\na b\nc f\n\nx\n\nx", "repeated"),
        ("to be to be to be not", "too many characters in the most frequent 2-gram"),
    ],
)
def test_gopher_repetition(text, reason):
    assert reason in verdict(GopherRepetition(), text)
    assert bool(verdict(GopherRepetition(), text)) == bool(reason)


def test_repeated_n_grams_of_a_long_text():
    """30 words, then 6 of them again: the 5-grams of the second time are 17 percent."""
    words = [f"w{n:02}" for n in range(30)]
    text = " ".join([*words, *words[:6]])  # 36 words of 3 characters: 143 characters
    lenient = GopherRepetition(most_frequent=(1.0, 1.0, 1.0))
    share = 23 / 143  # six words and the five blanks between them
    assert share > 0.15
    assert verdict(lenient, text) == "too many characters in repeated 5-grams"
    assert verdict(replace(lenient, most_repeated=(share + 1e-9,)), text) == ""


words_strategy = st.lists(st.sampled_from(["a", "bb", "ccc", "d"]), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(words_strategy, st.integers(1, 6))
def test_shares_of_n_grams_are_those_of_brute_force(items, n):
    text = "  ".join(items)
    words = split_words(text)
    numbers = list(ngram_numbers(words.texts, n))
    grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
    if len(numbers) < n:  # nothing shorter occurs twice
        assert len(set(grams)) == len(grams)
        return
    same = [[a == b for b in grams] for a in grams]
    np.testing.assert_array_equal(numbers[-1][:, None] == numbers[-1][None, :], same)
    counts = Counter(grams)
    covered, seen = np.zeros(len(text), bool), set()
    for i, gram in enumerate(grams):
        if gram in seen:
            covered[words.starts[i] : words.ends[i + n - 1]] = True
        seen.add(gram)
    found = in_repeated_ngrams(words, numbers[-1], len(text))
    assert found == pytest.approx(covered.sum() / len(text))
    best = 0
    if counts and max(counts.values()) > 1:
        common = [g for g, count in counts.items() if count == max(counts.values())]
        best = max(counts[g] * (sum(map(len, g)) + 2 * (n - 1)) for g in common) / len(text)
    assert most_frequent(words, numbers[-1], len(text)) == pytest.approx(best)


def test_repeated_items():
    assert repeated_items(["ab", "c", "ab", "ab"]) == (0.5, 4 / 7)
    assert repeated_items([]) == (0.0, 0.0)


def test_c4_keeps_sentences_and_drops_what_is_none():
    page = "\n".join(
        [
            "Home | About | Contact",
            "This is the first sentence of it.",
            "Please enable JavaScript to see this page.",
            "It has a second one, which asks more?[12]",
            "Too short.",
            "We use cookies to make this site better.",
            'And "a third one, in marks of speech."',
            "It goes on and on and on...",
            "And a fourth one that is exclaimed![edit]",
        ]
    )
    kept = C4Lines()(Document(page, "page")).text.split("\n")
    assert kept == [
        "This is the first sentence of it.",
        "It has a second one, which asks more?",
        'And "a third one, in marks of speech."',
        "And a fourth one that is exclaimed!",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("function f() { return 1; }", "a curly bracket"),
        ("Lorem ipsum dolor sit amet, and so on.", "placeholder text"),
        ("One line that is a sentence.\nAnd another that is one.", "too few sentences"),
    ],
)
def test_c4_drops_pages(text, reason):
    assert verdict(C4Lines(), text) == reason


def test_fineweb():
    assert verdict(FineWebQuality(), PROSE) == ""
    assert verdict(FineWebQuality(), " \n") == "no text"
    menu = "\n".join(f"Item number {n} of a menu with long names" for n in range(10))
    assert verdict(FineWebQuality(), menu) == "too few lines end as a sentence does"
    assert verdict(FineWebQuality(), f"{menu}\n{PROSE}") == "too few lines end as a sentence does"
    assert verdict(FineWebQuality(), f"{PROSE}\n{PROSE}\n{PROSE}") == (
        "too many characters in repeated lines"
    )
    short = "\n".join(f"Line {n}." for n in range(8))
    assert verdict(FineWebQuality(), f"{short}\n{PROSE}") == "too many short lines"


def test_bad_words_stand_alone_or_inside_of_chinese():
    step = BadWords(words=("ass", "two words", "坏词"))
    assert verdict(step, "A class of grass.") == ""
    assert verdict(step, "An ASS, here.") == "a word of the list"
    assert verdict(step, "These two words.") == "a word of the list"
    assert verdict(step, "这里有坏词。") == "a word of the list"
    by_sentence = replace(step, unit="sentence")
    kept = by_sentence(Document("It is fine. An ass it is. So is this.", "page"))
    assert kept.text == "It is fine. So is this."
    by_line = replace(step, unit="line")
    assert by_line(Document("fine\nan ass\n\nfine", "page")).text == "fine\n\nfine"
    assert verdict(by_line, "an ass") == "nothing is left"
    with pytest.raises(UserError, match="words is empty"):
        BadWords(words=(" ",)).validate()


def test_steps_run_until_one_drops():
    steps = (FineWebQuality(), GopherQuality())
    assert apply_steps(steps, Document(PROSE, "page")).text == PROSE
    assert apply_steps(steps, Document("Short it is.", "page")).reason == "too many short lines"
