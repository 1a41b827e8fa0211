"""SentencePiece's normalisation of characters as steps of the Hugging Face library.

A SentencePiece model holds a table of strings and what they become; the longest that fits is
replaced. The library's `Precompiled` reads the same table, but it takes a cluster of a letter and
its marks for one string, replaces the whole by what the shortest beginning becomes, and passes over
strings of more than five bytes. So its steps here are more: Unicode's NFKC, which the tables of
SentencePiece follow, composes what is longer than a character, and then `Precompiled` meets single
characters alone.
"""

import base64
import functools
import re
import struct
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Step = dict[str, Any]  # one normaliser, as tokenizer.json has it

# What is in a text for a while: pairs of noncharacters, which no text should have.
BREAK = "\ufdd0\ufdd1"
STAND_INS = [f"\ufdd0{chr(code)}" for code in range(0xFDD2, 0xFDEF)]
# What the library joins to the character before it: marks, what NFKC makes marks of, and others.
JOINED = r"[\p{M}\x{e33}\x{eb3}\x{200c}\x{200d}\x{ff9e}\x{ff9f}\x{1f3fb}-\x{1f3ff}]"
# Hangul's syllables without a last consonant, and last consonants.
OPEN, LAST = range(0xAC00, 0xD7A4, 28), range(0x11A8, 0x11C3)
BYTES = [bytes([byte]) for byte in range(256)]
OLD = unicodedata.ucd_3_2_0  # characters that every version of Unicode in use agrees about


class Inexpressible(Exception):
    """Raised where the library has no steps that do the same; the message says why."""


def normalizing_steps(charsmap: bytes, symbols: Iterable[str] = ()) -> list[Step]:
    """Normalisers that do what a model's table does.

    Args:
      charsmap: `precompiled_charsmap` of a SentencePiece model; empty: nothing changes.
      symbols: strings of a text that stay as they are, such as user-defined pieces.

    Raises:
      Inexpressible: the table is neither one of characters alone nor like NFKC.
    """
    if not charsmap:
        return []
    single, breaks, exceptions = _looked_through(charsmap)
    kept = {text: text for text in symbols if _by_character(single, text) != text}
    kept |= {source: single.get(source, source) for source in exceptions or ()}
    hidden = sorted(kept, key=len, reverse=True)
    if len(hidden) > len(STAND_INS):
        raise Inexpressible(f"its normalisation keeps {len(hidden)} strings as they are")
    precompiled = {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(charsmap).decode("ascii"),
    }
    return [
        *(replace(text, stand_in) for text, stand_in in zip(hidden, STAND_INS)),
        replace_each(breaks, BREAK),
        *([] if exceptions is None else [{"type": "NFKC"}]),
        precompiled,
        replace(BREAK, ""),
        *(replace(stand_in, kept[text]) for text, stand_in in zip(hidden, STAND_INS)),
    ]


@functools.lru_cache(maxsize=4)
def _looked_through(charsmap: bytes) -> tuple[dict[str, str], str, list[str] | None]:
    """The table's characters, where breaks go, and what NFKC must not change; None: do without it.

    Raises Inexpressible.
    """
    table = read_table(charsmap)
    single = {source: target for source, target in table.items() if len(source) == 1}
    several = [source for source in table if len(source) > 1]
    exceptions = _unlike_nfkc(table, single, several) if several else None
    return single, _breaks(table, several), exceptions


def replace(text: str, content: str) -> Step:
    """A normaliser that replaces a string."""
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def replace_each(pattern: str, content: str) -> Step:
    """A normaliser that replaces what a regular expression of Oniguruma finds."""
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _unlike_nfkc(table: dict[str, str], single: dict[str, str], several: list[str]) -> list[str]:
    """The characters that NFKC changes, and the table does not.

    Raises Inexpressible where NFKC is not what composes the table's longer strings.
    """
    if any(
        _by_character(single, unicodedata.normalize("NFKC", source)) != table[source]
        for source in several
        if all(OLD.category(character) != "Cn" for character in source)
    ):
        raise Inexpressible("its normalisation has rules of its own for several characters")
    return [
        character
        for character in map(chr, range(0x110000))
        if unicodedata.decomposition(character)
        and OLD.category(character) != "Cn"
        and _by_character(single, unicodedata.normalize("NFKC", character))
        != single.get(character, character)
    ]


def _by_character(single: dict[str, str], text: str) -> str:
    return "".join(single.get(character, character) for character in text)


def _breaks(table: dict[str, str], several: Sequence[str]) -> str:
    """A regular expression for the places before a mark that no string of the table goes across.

    A break keeps NFKC from composing or reordering there, and makes clusters of one character.
    """
    before = defaultdict(set)  # by character: what may stand before it in a string of the table
    for source in several:
        for length in range(1, len(source)):
            before[source[length]].add(source[:length])
    by_context = defaultdict(list)
    for character, beginnings in before.items():
        if unicodedata.category(character)[0] == "M" or character in "\uff9e\uff9f":
            by_context[frozenset(beginnings)].append(character)
    inside = "".join(
        rf"(?!(?<={_any_of(beginnings)}){any_of(*characters)})"
        for beginnings, characters in by_context.items()
    )
    # Not at the very beginning: the library loses count of what is put in front of everything.
    breaks = [r"(?<=\r)(?=\n)", rf"(?!\A)(?={JOINED}){inside}"]
    if chr(OPEN[0]) + chr(LAST[0]) not in table:
        last = {*map(chr, LAST)}
        last |= {source for source in table if len(source) == 1 and table[source][:1] in last}
        breaks.append(f"(?<={any_of(*map(chr, OPEN))})(?={any_of(*last)})")
    return "|".join(breaks)


def _any_of(strings: Iterable[str]) -> str:
    """A regular expression for some strings, with one class for those that differ at first only."""
    by_rest = defaultdict(list)
    for text in strings:
        by_rest[text[1:]].append(text[0])
    return "|".join(f"{any_of(*first)}{re.escape(rest)}" for rest, first in sorted(by_rest.items()))


def any_of(*characters: str) -> str:
    """A regular expression for one of some characters."""
    return f"[{_ranges(characters)}]"


def any_but(*characters: str) -> str:
    """A regular expression for one character that is none of these."""
    return f"[^{_ranges(characters)}]"


def _ranges(characters: Iterable[str]) -> str:
    codes = set(map(ord, characters))
    starts = sorted(code for code in codes if code - 1 not in codes)
    ends = sorted(code for code in codes if code + 1 not in codes)
    return "".join(
        rf"\x{{{start:x}}}" if start == end else rf"\x{{{start:x}}}-\x{{{end:x}}}"
        for start, end in zip(starts, ends)
    )


@functools.lru_cache(maxsize=1)
def read_table(charsmap: bytes) -> dict[str, str]:
    """The strings of a compiled table, and what they become.

    It is a trie as a double array of darts-clone, behind its size, and then the targets with a zero
    byte after each; a leaf of the trie has the place of its target. An empty table has no strings.
    """
    if not charsmap:
        return {}
    (size,) = struct.unpack_from("<I", charsmap)
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    targets = charsmap[4 + size :]
    offsets = (units >> 10) << ((units & (1 << 9)) >> 6)
    labels = units & ((1 << 31) | 0xFF)
    # A node's children lie where its offset and their labels, exclusive-or, point to.
    inner = np.nonzero((labels > 0) & (labels < 256))[0]
    inner = inner[np.argsort(inner ^ labels[inner], kind="stable")]
    parents = inner ^ labels[inner]
    table, found = {}, {}
    nodes, spelt = offsets[:1], [b""]
    while spelt:
        first = np.searchsorted(parents, nodes, "left")
        count = np.searchsorted(parents, nodes, "right") - first
        which = np.repeat(np.arange(len(nodes)), count)
        here = inner[np.arange(len(which)) + np.repeat(first - np.cumsum(count) + count, count)]
        nodes = here ^ offsets[here]
        spelt = [
            spelt[parent] + BYTES[byte]
            for parent, byte in zip(which.tolist(), labels[here].tolist())
        ]
        ends = np.nonzero(units[here] >> 8 & 1)[0]
        starts = units[nodes[ends]] & 0x7FFFFFFF
        for end, start in zip(ends.tolist(), starts.tolist()):
            if start not in found:
                found[start] = targets[start : targets.index(b"\0", start)].decode("utf-8")
            table[spelt[end].decode("utf-8")] = found[start]
    return table
