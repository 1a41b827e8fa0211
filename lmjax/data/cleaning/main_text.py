"""The main text of web pages: without navigation, scripts and notices."""

from __future__ import annotations

import re
from typing import Any, Literal

from lmjax.config import UserError, config
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.documents import Document
from lmjax.data.file_source import EXTRA

MARKUP = re.compile(r"<(?:!doctype|html|head|body|div|p|table|article)\b", re.IGNORECASE)
BEGINNING = 4096  # characters in which a page has the first of its elements
BLANK_LINES = re.compile(r"\n{3,}")


@config
class MainText(Step):
    """Takes the main text out of an HTML page, by resiliparse (Bevendorff et al. 2018).

    Lines, lists and the indentation of code stay. Pages of documentation, whose main text fills
    them, lose less with `content="all"`. A text without markup stays as it is.
    """

    # the main text, or all of it but navigation, header, footer, sidebars and forms
    content: Literal["main", "all"] = "main"
    least: int = 1  # characters of a page's text

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`."""
        if not MARKUP.search(document.text[:BEGINNING]):
            return document
        text = _extracted(_library(), document.text, self.content)
        if len(text) < self.least:
            return Dropped("no text in the page", len(text))
        return document._replace(text=text)


def _library() -> Any:
    """The function that makes text of a page. UserError: it is not installed."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError:
        raise UserError(f"the step MainText needs resiliparse: {EXTRA}") from None
    return extract_plain_text


def _extracted(extract: Any, page: str, content: str) -> str:
    """Text of a page, without more than one blank line between two others."""
    # A zero would end the page for the parser, which is written in C.
    page = page.replace("\0", "\ufffd")
    if content == "main":
        text = extract(page, main_content=True, alt_texts=False)
    else:
        left_out = ("nav", "header", "footer", "aside", "form")
        text = extract(page, main_content=False, alt_texts=False, skip_elements=left_out)
    lines = (line.rstrip() for line in text.split("\n"))
    return BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n")
