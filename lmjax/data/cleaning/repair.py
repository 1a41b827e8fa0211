"""Repair of text: mojibake, control characters, forms of Unicode, line breaks."""

from __future__ import annotations

import re
import unicodedata
from typing import Any, Literal

from lmjax.config import UserError, config
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.documents import Document
from lmjax.data.file_source import EXTRA

LINE_BREAK = re.compile("\r\n?|\u2028|\u2029|\x85")
# Control characters but tab and line feed, what orders bytes, and codes that are no characters.
# The joiners stay: Persian and Indian scripts and emoji are written with them.
UNWANTED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\u200b\u2060\ufeff\ufff9-\ufffc\ufffe\uffff]"
)
# Traces of UTF-8 that was read as an encoding of one byte a character: most lines have none, and
# need not be looked at closely.
TRACE = re.compile("[\xc2-\xf4][\x80-\xbf\u0152-\u0178\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]")


@config
class RepairText(Step):
    """Repairs mojibake, and takes away control characters and unusual line breaks.

    Mojibake is repaired by ftfy with its rules for quotes and widths off, which would change
    correct Chinese text.
    """

    mojibake: bool = True  # repair text that was read in a wrong encoding
    form: Literal["", "NFC", "NFKC"] = "NFC"  # of Unicode; empty: as it is
    # share of characters that could not be read (U+FFFD) from which on a text is dropped
    most_damage: float = 0.01

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`."""
        text = document.text
        if self.mojibake and TRACE.search(text):
            library, lines = _library(), text.split("\n")
            text = "\n".join(_fixed(library, one) if TRACE.search(one) else one for one in lines)
        text = UNWANTED.sub("", LINE_BREAK.sub("\n", text))
        if self.form and not unicodedata.is_normalized(self.form, text):
            text = unicodedata.normalize(self.form, text)
        damage = text.count("\ufffd") / max(len(text), 1)
        if damage > self.most_damage:
            return Dropped("too many characters cannot be read", damage)
        if not text.strip():
            return Dropped("no text")
        return document if text == document.text else document._replace(text=text)


def _library() -> Any:
    """The library ftfy. UserError: it is not installed."""
    try:
        import ftfy
    except ImportError:
        raise UserError(
            f"RepairText needs ftfy for mojibake: {EXTRA}, or set mojibake=false"
        ) from None
    return ftfy


def _fixed(library: Any, text: str) -> str:
    """A line without mojibake; nothing else is changed."""
    return library.fix_text(
        text,
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        fix_surrogates=False,
        remove_control_chars=False,
        normalization=None,
    )
