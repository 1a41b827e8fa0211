"""Tokenizers of the tiktoken library: Qwen's, Meta's Llama 3 and 4, Mistral's tekken.json."""

import base64
import binascii
import json
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmjax.config import UserError
from lmjax.data.tokenizers.base import Ends, Tokenizer
from lmjax.data.tokenizers.classes import tokenizer_class
from lmjax.data.tokenizers.folder_ends import Frame, folder_ends
from lmjax.data.tokenizers.folder_settings import added_tokens, check_positions, library
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer
from lmjax.data.tokenizers.tiktoken_programs import (
    LLAMA3,
    LLAMA4,
    PROGRAMS,
    QWEN,
    RANKS,
    TEKKEN,
    TiktokenProgram,
)

# tiktoken's regular expressions run out of stack, and the program ends, where spaces do not.
LONG_SPACE = re.compile(r"(\s{50000})")
META_MOST = 400_000  # characters that Meta's program encodes at once
META_RUN = re.compile(r"\s{25000}(?=\s)|\S{25000}(?=\S)")  # which it cuts behind
REMEDY = "take the tokenizer.json of the model's folder on the hub, which says it"


class TiktokenTokenizer(Tokenizer):
    """Byte-pair encoding by a table of ranks, for the `tiktoken` library.

    Like Qwen's own program it brings a text into Unicode's form NFC first; that text comes back
    exactly. The others' texts come back as they are.
    """

    kind = "tiktoken"

    def __init__(self, data: bytes, program: TiktokenProgram = QWEN, ends: Ends | None = None):
        """
        Args:
          data: the table's file: on each line a token's bytes in base64 and its rank, or a
            tekken.json.
          program: what it is for.
          ends: what stands around a text; None: what the program puts there.

        Raises:
          ValueError: it is damaged.
        """
        if program.name == TEKKEN.name:
            program, ranks = _tekken(data, program)
        else:
            ranks = _ranks(data)
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("the ranks do not count from 0 without a gap")
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise ValueError(f"there is no token for the byte {missing[0]}")
        self._data, self.program = data, program
        self._pieces = sorted(ranks, key=ranks.__getitem__)
        self._first = len(program.special) if program.first else 0  # id of the first piece
        first_special = 0 if program.first else len(ranks)
        self.special = {name: first_special + number for number, name in enumerate(program.special)}
        self._renamed: dict[str, str] = {}
        self.vocab_size = len(ranks) + len(self.special)
        begin, end = self.special.get(program.begin), self.special[program.end]
        self._usual = Ends(() if begin is None else (begin,), (end,), end)
        self.set_ends(self._usual if ends is None else ends)
        self._encoding = library("tiktoken").Encoding(
            program.name, pat_str=program.pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def set_ends(self, ends: Ends) -> None:
        """Takes what stands around a text from another than the program."""
        self._ends = ends
        self.begin, self.end = ends.begin, ends.end

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives special tokens other names, by their own."""
        self._renamed = dict(names)
        self.special = {names.get(name, name): token for name, token in self.special.items()}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        threads = self.threads if self.threads > 0 else os.cpu_count() or 1
        cut = _as_meta if self.program.name in (LLAMA3.name, LLAMA4.name) else LONG_SPACE.split
        parts: list[str] = []
        counts = []
        for text in texts:
            before = len(parts)
            parts += cut(unicodedata.normalize("NFC", text) if self.program.nfc else text)
            counts.append(len(parts) - before)
        rest = iter(self._encoding.encode_ordinary_batch(parts, num_threads=threads))
        encoded = [[token for _ in range(count) for token in next(rest)] for count in counts]
        if not self._first:
            return encoded
        return [[self._first + token for token in tokens] for tokens in encoded]

    def token_bytes(self, token: int) -> bytes:
        index = token - self._first
        return self._pieces[index] if 0 <= index < len(self._pieces) else b""

    @property
    def opening(self) -> tuple[int, ...]:
        return self._ends.opening

    @property
    def closing(self) -> tuple[int, ...]:
        return self._ends.closing

    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"kind": self.kind}
        if self._renamed:
            settings["renamed"] = self._renamed
        if self.program.name == QWEN.name and self._ends == _separated(self.end):
            return settings
        settings["program"] = self.program.name
        return settings if self._ends == self._usual else settings | {"ends": list(self._ends)}

    def files(self) -> dict[str, bytes]:
        return {self.program.file: self._data}

    @classmethod
    def from_saved(cls, settings: dict[str, Any], folder: pathlib.Path) -> "TiktokenTokenizer":
        if "program" not in settings:  # of a run from before Qwen's own program was followed
            tokenizer = cls((folder / QWEN.file).read_bytes())
            tokenizer.set_ends(_separated(tokenizer.end))
            tokenizer.rename(settings.get("renamed", {}))
            return tokenizer
        program = PROGRAMS[settings["program"]]
        opening, closing, end = settings.get("ends", (None, None, None))
        ends = None if end is None else Ends(tuple(opening), tuple(closing), end)
        tokenizer = cls((folder / program.file).read_bytes(), program, ends)
        tokenizer.rename(settings.get("renamed", {}))
        return tokenizer


def _separated(token: int) -> Ends:
    """One token before each document, which ends the one before."""
    return Ends((token,), (), token)


def _ranks(data: bytes) -> dict[bytes, int]:
    ranks = {}
    for line in filter(bytes.strip, data.splitlines()):
        piece, rank = line.split()
        ranks[base64.b64decode(piece, validate=True)] = int(rank)
    return ranks


def _tekken(data: bytes, program: TiktokenProgram) -> tuple[TiktokenProgram, dict[bytes, int]]:
    """A tekken.json's own pattern and special tokens, and its table as far as it is used."""
    content = json.loads(data)
    config = content["config"]
    count = config["default_num_special_tokens"]
    named = content.get("special_tokens")
    special = program.special if named is None else tuple(token["token_str"] for token in named)
    if named is not None and [token["rank"] for token in named] != list(range(len(named))):
        raise ValueError("the ids of its special tokens do not count from 0")
    special += tuple(f"<SPECIAL_{number}>" for number in range(len(special), count))
    size = config["default_vocab_size"] - count
    ranks = {base64.b64decode(piece["token_bytes"]): piece["rank"] for piece in content["vocab"]}
    used = {piece: rank for piece, rank in ranks.items() if rank < size}
    return program._replace(pattern=config["pattern"], special=special), used


def _as_meta(text: str) -> Iterator[str]:
    """A text in the parts that Meta's program encodes."""
    for begin in range(0, len(text), META_MOST):
        part, start = text[begin : begin + META_MOST], 0
        for run in META_RUN.finditer(part):
            yield part[start : run.end()]
            start = run.end()
        yield part[start:]


def is_table(data: bytes) -> bool:
    """Returns whether a file is a table of ranks, whatever it is called."""
    try:
        piece, rank = data[:200].split(b"\n", 1)[0].split()
        return rank.isdigit() and bool(base64.b64decode(piece, validate=True))
    except (ValueError, binascii.Error):
        return False


def read_ranks(path: pathlib.Path) -> Tokenizer:
    """The tokenizer of a table of ranks, with what the folder adds.

    Which program a table is for is known by the number of its tokens, and of `qwen.tiktoken` by its
    name if the folder names no other class.

    Raises:
      UserError: a table of another program, which no file of its folder tells how to cut a text.
    """
    data = path.read_bytes()
    count = sum(map(bool, map(bytes.strip, data.splitlines())))
    program = RANKS.get(count)
    kind = tokenizer_class(path.parent)
    if program is None and path.name == QWEN.file and count < min(RANKS):
        program = QWEN  # a part of its table
    if program is QWEN and kind not in (None, "QWenTokenizer", "QwenTokenizer", "Qwen2Tokenizer"):
        program = None
    if program is None:
        raise UserError(
            f"{path}: how a text is cut does not stand in a table of ranks, and the program of one"
            f" with {count} tokens is not known (known are Qwen's, Llama 3's and Llama 4's):"
            f" {REMEDY}"
        )
    return _extended(path, TiktokenTokenizer(data, program))


def read_tekken(path: pathlib.Path) -> Tokenizer:
    """Mistral's tekken.json, which says itself how a text is cut."""
    return _extended(path, TiktokenTokenizer(path.read_bytes(), TEKKEN))


def _extended(path: pathlib.Path, tokenizer: TiktokenTokenizer) -> Tokenizer:
    """With the folder's names for special tokens, what it puts behind the vocabulary and around a
    text."""
    size, added = tokenizer.vocab_size, added_tokens(path.parent)
    said = {entry.token: name for name, entry in added.items() if name not in tokenizer.special}
    tokenizer.rename({n: said[token] for n, token in tokenizer.special.items() if token in said})
    names = {token: name for name, token in tokenizer.special.items()}
    own = {"bos": names.get(tokenizer.begin), "eos": names[tokenizer.end]}
    frame = Frame(tokenizer.opening, ())
    _, ends = folder_ends(path.parent, None, tokenizer.special.get, frame, own)
    tokenizer.set_ends(ends)
    new = {name: entry for name, entry in added.items() if entry.token >= size}
    check_positions(path, size, new)
    if ordinary := [name for name, entry in new.items() if not entry.special]:
        raise UserError(f"{path}: the added token {ordinary[0]!r} is text, not special")
    return ExtendedTokenizer(tokenizer, list(new)) if new else tokenizer
