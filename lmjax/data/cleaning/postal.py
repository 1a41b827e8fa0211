"""Postal addresses, with their postal code or as they are written in China; and names of a list."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator

from lmjax.config import UserError
from lmjax.data.files import open_file, read_blocks

MOST_WORDS = 4  # of a name
BLANK = re.compile(r"\s")
WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|['\u2019-](?=[^\W\d_]))*")
HAN = re.compile("[\u3400-\u9fff]+(?:\u00b7[\u3400-\u9fff]+)*")
_HAN = "[\u4e00-\u9fff]"
_STREETS = (
    "Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Square|Sq|Terrace|"
    "Way|Highway|Hwy|Parkway|Pkwy|Close|Crescent|Gardens"
)
# Provinces of China, after which a city may have a name of any length.
_PROVINCES = (
    "河北|山西|辽宁|吉林|黑龙江|江苏|浙江|安徽|福建|江西|山东|河南|湖北|湖南|广东|海南|四川|贵州|云南|"
    "陕西|甘肃|青海|台湾"
)
_LONG_CITIES = (
    "石家庄|哈尔滨|齐齐哈尔|呼和浩特|乌鲁木齐|连云港|张家口|秦皇岛|景德镇|张家界|防城港|攀枝花"
)
ADDRESS = re.compile(
    "(?:"
    # Number, street and postal code of North America or the United Kingdom, on one line.
    rf"(?<![\w.-])\d{{1,5}}[A-Za-z]? (?:[A-Z][\w.'\u2019-]* ){{1,4}}(?:{_STREETS})\b\.?"
    r"[^\n]{0,60}?"
    r"\b(?:[A-Z]{2} \d{5}(?:-\d{4})?|[A-Z]{2} [A-Z]\d[A-Z] ?\d[A-Z]\d"
    r"|[A-Z]{1,2}\d[A-Z\d]? \d[A-Z]{2})\b"
    # Street, number, postal code and town of German-speaking countries.
    r"|\b[A-Z\xc4\xd6\xdc][\w.-]*(?:[ -][A-Z\xc4\xd6\xdc][\w.-]*)?"
    r"(?:stra\xdfe|strasse|str\.|weg|platz|allee|gasse|ring|damm|ufer|[ -]Stra\xdfe|[ -]Platz)"
    r" ?\d{1,4} ?[a-z]?,?\s+(?:[AD]-|CH-)?\d{4,5} [A-Z\xc4\xd6\xdc]\w+"
    # Number, street, postal code and town of France.
    r"|(?<![\w.-])\d{1,4}(?: bis| ter)?,? "
    r"(?:rue|avenue|boulevard|place|chemin|impasse|all\xe9e|quai) "
    r"[^\n,]{2,50},?\s+\d{5} [A-Z\xc9][\w-]+"
    # City, district, street and number of China.
    rf"|(?:(?:{_PROVINCES})省{_HAN}{{2,5}}市|(?:{_LONG_CITIES}|{_HAN}{{2}})市)"
    rf"(?:{_HAN}{{1,6}}[区县镇])?{_HAN}{{1,12}}(?:路|街|道|巷|胡同)\d{{1,5}}号"
    r"(?:[\dA-Z]{1,5}(?:栋|幢|号楼|楼|座|单元|室|层))*"
    ")"
)


# Each of these has a digit before a capital letter, or before the sign of a house number.
HINT = re.compile("\\d[A-Za-z]? [A-Z\xc4\xd6\xdc\xc9]|\\d号")
REACH = 160  # characters around a hint that are looked at


def replace_addresses(text: str, mark: str) -> str:
    """The text with a mark in place of each postal address."""
    pieces, at = [], 0
    for start, end in _windows(text):
        pieces += [text[at:start], ADDRESS.sub(lambda match: mark, text[start:end])]
        at = end
    return "".join([*pieces, text[at:]])


def _windows(text: str) -> Iterator[tuple[int, int]]:
    """Stretches of a text around hints of addresses; they begin behind a blank, where there is."""
    begin, end = -1, -1
    for hint in HINT.finditer(text):
        start = max(hint.start() - REACH, 0)
        blank = BLANK.search(text, start, hint.start()) if start else None
        start = start if blank is None else blank.end()
        if start > end:
            if begin >= 0:
                yield begin, end
            begin = start
        end = min(hint.end() + REACH, len(text))
    if begin >= 0:
        yield begin, end


class NameFinder:
    """Finds names of a list in texts: words by words, and within Chinese text anywhere."""

    def __init__(self, names: tuple[str, ...]) -> None:
        """The names, of one to four words."""
        self._words = {" ".join(WORD.findall(name)) for name in names if not HAN.search(name)}
        self._han = {name for name in names if HAN.search(name)}
        self._words.discard("")
        self._most = max((name.count(" ") + 1 for name in self._words), default=0)
        self._lengths = sorted({len(name) for name in self._han}, reverse=True)
        if self._most > MOST_WORDS:
            longest = max(self._words, key=lambda name: name.count(" "))
            raise UserError(f"names: {longest!r} has more than {MOST_WORDS} words")

    def replace(self, text: str, mark: str) -> str:
        """The text with a mark in place of each name; the longest that fits counts."""
        spans = [*self._of_words(text), *self._of_characters(text)] if self else []
        pieces, at = [], 0
        for start, end in sorted(spans):
            if start >= at:
                pieces += [text[at:start], mark]
                at = end
        return "".join([*pieces, text[at:]])

    def __bool__(self) -> bool:
        return bool(self._words or self._han)

    def _of_words(self, text: str) -> Iterator[tuple[int, int]]:
        if not self._words:
            return
        matches = list(WORD.finditer(text))
        number = 0
        while number < len(matches):
            for count in range(min(self._most, len(matches) - number), 0, -1):
                some = matches[number : number + count]
                gaps = (text[a.end() : b.start()] for a, b in itertools.pairwise(some))
                together = all(gap.isspace() or gap == ". " for gap in gaps)
                if together and " ".join(match.group() for match in some) in self._words:
                    yield some[0].start(), some[-1].end()
                    number += count - 1
                    break
            number += 1

    def _of_characters(self, text: str) -> Iterator[tuple[int, int]]:
        for match in HAN.finditer(text) if self._han else ():
            at = match.start()
            while at < match.end():
                fits = (n for n in self._lengths if text[at : at + n] in self._han)
                length = next(fits, 0)
                if length:
                    yield at, at + length
                at += length or 1


@functools.lru_cache(maxsize=8)
def name_finder(names: tuple[str, ...], path: str | None = None) -> NameFinder:
    """A finder of names, and of those of a file with one a line. UserError: it cannot be read."""
    if path is None:
        return NameFinder(names)
    with open_file(path) as file:
        text = b"".join(read_blocks(file, path)).decode("utf-8-sig", "replace")
    lines = tuple(filter(None, (line.partition("#")[0].strip() for line in text.split("\n"))))
    if not lines:
        raise UserError(f"names_list={path}: the list has no name")
    return NameFinder((*names, *lines))
