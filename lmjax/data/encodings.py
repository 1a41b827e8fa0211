"""Bytes of pages as text: the encoding by marks, by what the page declares, or by a guess.

The order is that of the HTML standard (13.2.3.2): a byte order mark, what the server said, what a
<meta> in the first bytes says. Declarations are often wrong: UTF-8 is tried before them, since
text of another encoding is hardly ever valid in it.
"""

from __future__ import annotations

import codecs
import re

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
DECLARED = re.compile(
    rb"""<(?:meta|\?xml)[^>]*?(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", re.I
)
HEAD = 4096  # bytes in which a page can declare its encoding (the standard says 1024)
# Names by which pages mean a larger set, as the Encoding standard has it.
MEANT = {
    "ascii": "cp1252",
    "us-ascii": "cp1252",
    "iso-8859-1": "cp1252",
    "latin1": "cp1252",
    "latin-1": "cp1252",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "x-gbk": "gb18030",
    "shift_jis": "cp932",
    "shift-jis": "cp932",
    "x-sjis": "cp932",
    "sjis": "cp932",
    "big5": "big5hkscs",
    "ks_c_5601-1987": "cp949",
    "euc-kr": "cp949",
    "iso-8859-9": "cp1254",
    "tis-620": "cp874",
    "windows-874": "cp874",
}


def decode_page(data: bytes, server: str | None = None) -> str:
    """The text of a page; bytes that mean nothing become U+FFFD.

    Args:
        data: of the page.
        server: name of the encoding in the header of the answer; None: it had none.
    """
    for mark, name in MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(name, "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    found = DECLARED.search(data[:HEAD])
    names = (server, found[1].decode("ascii", "replace") if found else None)
    for name in map(_known, names):
        # A page in UTF-8 with a few damaged bytes is better kept as that than guessed anew.
        if name is not None and _damage(text := data.decode(name, "replace")) < 0.01:
            return text
    return data.decode(_guess(data), "replace")


def _known(name: str | None) -> str | None:
    """The name of Python's codec; None where there is none."""
    if not name:
        return None
    name = name.strip().strip("\"'").lower()
    name = MEANT.get(name, name)
    try:
        info = codecs.lookup(name)
    except (LookupError, ValueError):
        return None
    return info.name if info._is_text_encoding else None


def _damage(text: str) -> float:
    """Share of characters that could not be read."""
    return text.count("\ufffd") / max(len(text), 1)


def _guess(data: bytes) -> str:
    """The encoding by its bytes: by the library's statistics where it is there, else Windows'."""
    try:
        from resiliparse.parse.encoding import detect_encoding
    except ImportError:
        return "cp1252"
    return _known(detect_encoding(data)) or "cp1252"
