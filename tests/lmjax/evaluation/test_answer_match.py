"""Answers as numbers and as texts: cases that other rules are known to get wrong, by hand."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.evaluation.answer_match import (
    last_number,
    numbers_match,
    plain_text,
    text_f1,
    texts_match,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", 42),
        ("The answer is $\\boxed{42}$.", 42),
        ("42 left...", 42),
        ("42, e.g., or so.", 42),
        ("42.00", 42),
        ("４２", 42),
        ("答案是４２。", 42),
        ("答案是42元，对吗？", 42),
        ("３．５米", Fraction(7, 2)),
        ("#### 1,234", 1234),
        ("1 + 2 = <<1+2=3>>3\n#### 3", 3),
        ("$1,234,567.50", Fraction(2469135, 2)),
        ("-$5", -5),
        ("$-5$", -5),
        ("−7 degrees", -7),
        ("10-3=7", 7),
        ("from 3-5", 5),
        ("x is 12 - 5", 5),
        ("\\boxed{-\\frac{1}{2}}", Fraction(-1, 2)),
        ("\\boxed{\\dfrac{3}{4}}", Fraction(3, 4)),
        ("\\frac12", Fraction(1, 2)),
        ("\\boxed{1/2}", Fraction(1, 2)),
        ("\\boxed{12\\,345}", 12345),
        ("\\boxed{1{,}234}", 1234),
        ("\\boxed{42\\text{ m}^2}", 42),
        ("42 m² of it", 42),
        ("42 m2", 42),
        ("first \\boxed{1}, then \\boxed{\\text{so } {2}}. Not 3", 2),
        ("\\boxed{42", 42),
        (".5", Fraction(1, 2)),
        ("0.1", Fraction(1, 10)),
        ("1e-5", Fraction(1, 100000)),
        ("1,2,3", 3),
        ("50%", 50),
        ("50\\%.", 50),
        ("no number", None),
        ("GPT2", None),
        ("", None),
        ("\\frac{1}{0}", None),
        ("#### none, but 5 before", 5),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == number


@given(st.integers(-(10**12), 10**12), st.integers(0, 3), st.sampled_from("。.…!）)元%"))
@settings(max_examples=100)
def test_numbers_are_found_as_they_are_written(number, places, mark):
    value = Fraction(number, 10**places)
    written = f"{float(value):.{places}f}" if abs(number) < 10**9 else f"{number:,}"
    expected = value if abs(number) < 10**9 else number
    for text in (written, f"so it is {written}{mark}", f"4 and $\\boxed{{{written}}}$, not 5"):
        assert last_number(text) == expected


def test_numbers_match():
    assert numbers_match("It costs $42.00.", "40 + 2 = 42\n#### 42")
    assert not numbers_match("It costs 43", "#### 42")
    assert not numbers_match("no idea", "#### 42")
    with pytest.raises(UserError, match="no number"):
        numbers_match("42", "forty-two")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("２。", "2"),
        ("《红楼梦》！", "红楼梦"),
        ("The  Cat, sat!", "the cat sat"),  # articles stay, unlike in SQuAD's rule
        ("Straße", "strasse"),
        ("well-known", "well known"),
        ("—", ""),
    ],
)
def test_plain_texts(text, plain):
    assert plain_text(text) == plain


def test_texts_match_and_f1():
    assert texts_match("北京。", ["上海", "北京"]) and not texts_match("北京市", ["北京"])
    # 北 and 京 of five characters together.
    assert text_f1("北京市", ["北京"]) == pytest.approx(4 / 5)
    assert text_f1("in 1912年", ["1912年"]) == pytest.approx(4 / 5)
    assert text_f1("a cat", ["a dog", "the cat sat"]) == pytest.approx(2 / 4)
    assert text_f1("。", ["！"]) == 1 and text_f1("", ["a"]) == 0
    for measure in (texts_match, text_f1):
        with pytest.raises(UserError, match="one right answer or more"):
            measure("a", [])
