"""Words, sentences, lines and paragraphs, in scripts with and without spaces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.data.cleaning.units import (
    ends_terminally,
    split_lines,
    split_paragraphs,
    split_sentences,
    split_words,
)


@pytest.mark.parametrize(
    ("text", "words", "spaceless"),
    [
        ("Two words.", ["Two", "words."], False),
        ("今天天气很好。", list("今天天气很好"), True),
        ("iPhone 15 手机 价格", ["iPhone", "15", *"手机价格"], True),
        ("日本国憲法、第九条", list("日本国憲法第九条"), True),
        ("ภาษาไทย", list("ภาษาไทย"), True),
        ("한국어 문장입니다.", ["한국어", "문장입니다."], False),
        ("", [], False),
    ],
)
def test_words(text, words, spaceless):
    found = split_words(text)
    assert found.texts == words
    assert found.spaceless == spaceless


@given(st.text())
def test_words_are_where_they_are_said_to_be(text):
    found = split_words(text)
    spans = zip(found.starts.tolist(), found.ends.tolist(), strict=True)
    assert [text[start:end] for start, end in spans] == found.texts
    assert all(word and not word.isspace() for word in found.texts)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said "Go." Then left.', ['He said "Go."', "Then left."]),
        ("Version 3.11 is out. Try it", ["Version 3.11 is out.", "Try it"]),
        ("今天很好。明天呢？“好！”他说。", ["今天很好。", "明天呢？", "“好！”", "他说。"]),
        ("यह एक वाक्य है। दूसरा।", ["यह एक वाक्य है।", "दूसरा।"]),
        ("", []),
    ],
)
def test_sentences(text, sentences):
    assert split_sentences(text) == sentences


@given(st.text())
def test_sentences_lose_nothing_but_blanks(text):
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


def test_lines_and_paragraphs():
    text = " a \n\n\n b\nc \n \t\nd"
    assert split_lines(text) == ["a", "b", "c", "d"]
    assert split_paragraphs(text) == ["a", "b\nc", "d"]


@pytest.mark.parametrize(
    ("line", "ends"),
    [
        ("Yes.", True),
        ('"Yes."', True),
        ("(Yes.)", True),
        ("好。", True),
        ("好。”", True),
        ("Really?", True),
        ('he said "', True),
        ("Menu", False),
        ("a, b,", False),
        ("", False),
    ],
)
def test_terminal_marks(line, ends):
    assert ends_terminally(line) == ends
