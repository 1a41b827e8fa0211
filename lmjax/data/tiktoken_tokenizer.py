"""Qwen's tokenizer: a table of ranks for the tiktoken library."""

import base64
import os
import pathlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from lmjax.config import UserError
from lmjax.data.folder_settings import added_tokens, check_places, library
from lmjax.data.special_tokens import ExtendedTokenizer
from lmjax.data.tokenizers import SEPARATOR, Tokenizer

RANKS_FILE = "qwen.tiktoken"
QWEN_SPECIAL = (SEPARATOR, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
# How Qwen cuts a text before it merges bytes: contractions, words, single digits, signs, spaces.
QWEN_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# tiktoken's regular expressions run out of stack, and the program ends, where spaces do not.
LONG_SPACE = re.compile(r"(\s{50000})")


class TiktokenTokenizer(Tokenizer):
    """Qwen's tokenizer: byte-pair encoding by a table of ranks, for the `tiktoken` library.

    Like Qwen's own it brings a text into Unicode's form NFC first; that text comes back exactly.
    """

    kind = "tiktoken"

    def __init__(self, data: bytes):
        """`data` is the file: on each line a token's bytes in base64 and its rank.

        Raises:
          ValueError: it is damaged.
        """
        ranks = {}
        for line in data.splitlines():
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("the ranks do not count from 0 without a gap")
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise ValueError(f"there is no token for the byte {missing[0]}")
        self._data = data
        self._table = sorted(ranks, key=ranks.__getitem__)
        self.special = {name: len(ranks) + number for number, name in enumerate(QWEN_SPECIAL)}
        self.vocab_size = len(ranks) + len(self.special)
        self.begin = self.end = self.special[SEPARATOR]
        self._encoding = library("tiktoken").Encoding(
            "qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=self.special
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        threads = self.threads if self.threads > 0 else os.cpu_count() or 1
        parts: list[str] = []
        counts = []
        for text in texts:
            cut = LONG_SPACE.split(unicodedata.normalize("NFC", text))
            parts += cut
            counts.append(len(cut))
        rest = iter(self._encoding.encode_ordinary_batch(parts, num_threads=threads))
        return [[token for _ in range(count) for token in next(rest)] for count in counts]

    def token_bytes(self, token: int) -> bytes:
        return self._table[token] if 0 <= token < len(self._table) else b""

    def files(self) -> dict[str, bytes]:
        return {RANKS_FILE: self._data}

    @classmethod
    def from_saved(cls, settings: dict[str, Any], folder: pathlib.Path) -> "TiktokenTokenizer":
        return cls((folder / RANKS_FILE).read_bytes())


def read_ranks(path: pathlib.Path) -> Tokenizer:
    """The tokenizer of a table of ranks, with what the folder adds. UserError for another than
    Qwen's."""
    if not path.name.startswith("qwen"):
        raise UserError(
            f"{path}: how a text is cut stands in no such file and is known for qwen.tiktoken alone"
        )
    tokenizer = TiktokenTokenizer(path.read_bytes())
    size, added = tokenizer.vocab_size, added_tokens(path.parent)
    new = {name: entry for name, entry in added.items() if entry.token >= size}
    check_places(path, size, new)
    if ordinary := [name for name, entry in new.items() if not entry.special]:
        raise UserError(f"{path}: the added token {ordinary[0]!r} is text, not special")
    return ExtendedTokenizer(tokenizer, list(new)) if new else tokenizer
