"""Steps on pages: the main text, repair, and rules on addresses."""

import pytest

from lmjax.config import UserError
from lmjax.data.cleaning.addresses import AddressRules
from lmjax.data.cleaning.main_text import MainText
from lmjax.data.cleaning.repair import RepairText
from lmjax.data.cleaning.step import Dropped
from lmjax.data.documents import Document

PARAGRAPHS = [
    "The harbour was quiet when the boats came in, and nobody spoke of the storm that had passed.",
    "In the morning the fishermen counted their nets; two were missing, and one was torn.",
    "They mended what could be mended, and sold the rest to the man from the next village.",
]
CODE = "def f(x):\n    if x:\n        return 1"
PAGE = f"""<!DOCTYPE html><html><head><title>Harbour</title><script>var x = "secret";</script>
<style>p {{ color: red }}</style></head><body>
<nav><ul>{"".join(f"<li><a href='/{n}'>Section {n}</a></li>" for n in range(12))}</ul></nav>
<main><article><h1>The harbour</h1>{"".join(f"<p>{one}</p>" for one in PARAGRAPHS)}
<pre>{CODE}</pre><img src=x alt="a picture"></article></main>
<footer><a href="/privacy">Privacy policy</a> All rights reserved</footer></body></html>"""


def text_of(step, text, **metadata):
    result = step(Document(text, "d", metadata=metadata or None))
    return result if isinstance(result, Dropped) else result.text


@pytest.mark.parametrize("content", ["main", "all"])
def test_the_main_text_of_a_page(content):
    pytest.importorskip("resiliparse")
    text = text_of(MainText(content=content), PAGE)
    assert all(one in text for one in PARAGRAPHS) and CODE in text
    for other in ("Section 3", "secret", "color", "Privacy", "a picture"):
        assert other not in text


def test_texts_without_markup_stay_and_pages_without_text_go():
    pytest.importorskip("resiliparse")
    text = "if a < b and c > d: return"
    assert text_of(MainText(), text) == text
    empty = "<html><head><title>x</title></head><body><script>f()</script></body></html>"
    assert text_of(MainText(), empty) == Dropped("no text in the page", 0)
    # A zero does not end the page.
    page = PAGE.replace("In the morning", "In \0the morning")
    assert PARAGRAPHS[2] in text_of(MainText(), page)


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("The caf\u00c3\u00a9 isn\u00e2\u20ac\u2122t open", "The caf\u00e9 isn\u2019t open"),
        (
            "\u00d0\u00bf\u00d1\u20ac\u00d0\u00b8\u00d0\u00b2\u00d0\u00b5\u00d1\u201a",
            "\u043f\u0440\u0438\u0432\u0435\u0442",
        ),
        # Correct text of other scripts, with wide marks, stays as it is.
        ("\u4e2d\u6587\uff0c\u201c\u597d\u201d\uff1b\uff11\uff12\u3002", None),
        ("\u201cna\u00efve\u201d \u2026 \u00a9 \ufb01", None),
        ("a\r\nb\u2028c\rd\x0b\x00e\u200bf\ufeff", "a\nb\nc\ndef"),
        ("cafe\u0301", "caf\u00e9"),
        # Joiners belong to Persian words and to emoji.
        ("\u0645\u06cc\u200c\u0631\u0648\u0645 \U0001f468\u200d\U0001f469", None),
    ],
)
def test_repair(broken, whole):
    pytest.importorskip("ftfy")
    assert text_of(RepairText(), broken) == (broken if whole is None else whole)


def test_texts_that_cannot_be_repaired():
    step = RepairText(mojibake=False)
    assert text_of(step, "\ufffd" * 2 + "a" * 98).reason == "too many characters cannot be read"
    assert text_of(step, "\ufffd" + "a" * 99) == "\ufffd" + "a" * 99
    assert text_of(step, "\x00 \n") == Dropped("no text")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://example.com/a", None),
        ("https://blog.bad.example/a", "a blocked domain"),
        ("https://bad.example.org/a", None),
        ("https://listed.example/", "a blocked domain"),
        ("http://93.184.216.34/a", "the host is a number"),
        ("http://[2001:db8::1]/a", "the host is a number"),
        ("http://a.example/casino-poker", "too many words of the list in the address"),
        ("http://a.example/casino", None),
        ("http://a.example/xxcasinoxx-pokers", None),
        ("http://freepills4u.example/", "a strong word in the address"),
        ("http://[bad/", "the address is none"),
        ("", None),
    ],
)
def test_rules_on_addresses(tmp_path, url, reason):
    path = tmp_path / "list.txt"
    path.write_text("# bad ones\nlisted.example  # since May\n\n")
    step = AddressRules(
        blocked=("bad.example",),
        blocked_list=str(path),
        words=("casino", "poker"),
        strong_words=("pills",),
    )
    result = text_of(step, "text", url=url)
    assert result == "text" if reason is None else result.reason == reason


def test_words_of_addresses_are_in_lower_case():
    with pytest.raises(UserError, match="lower case"):
        AddressRules(words=("Casino",))
    assert text_of(AddressRules(), "text") == "text"


@pytest.mark.parametrize(
    "page",
    [
        "<html><body><p>some text<div></p></span><table><li>" * 50,
        "<html><body>some text" + "<div class='nav'>" * 500,
        "<html><body><a href='<p>some text</p>some text",
        "<html><!-- <body><p>some text",
        "<html>\ud800<body><nav><p>some text",
    ],
)
def test_broken_markup_is_no_error(page):
    pytest.importorskip("resiliparse")
    assert isinstance(text_of(MainText(), page), str | Dropped)
