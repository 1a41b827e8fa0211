"""Encodes each different word of a text once, where a tokenizer treats words by themselves.

Natural text repeats its words: of 20 MB in twelve languages and code a fifth is left.
"""

import concurrent.futures
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32

from lmjax.data.tokenizers.word_borders import Splitter

LONGEST = 60  # characters of a word that is kept
MOST = 1 << 20  # words that are kept
CHUNK = 1 << 20  # characters that are looked up while new words of those before are encoded
LARGEST = 0x110000  # ids below it are kept as characters: strings are joined faster than lists


class WordCache:
    """Cache of the tokens of words."""

    def __init__(self, split: Splitter, encode: Callable[[Sequence[str]], list[str]]):
        """`split` cuts a text into words that may be encoded by themselves; `encode` gives the
        tokens of each word as characters, and lets other threads run meanwhile."""
        self._split, self._encode = split, encode
        self._known = {"": ""}
        self._lock = threading.Lock()  # of what is known

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text."""
        return [tokens.tolist() for tokens in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[UInt32[np.ndarray, "tokens"]]:
        """The tokens of each text."""
        with self._lock:
            return self._encode_arrays(texts)

    def _encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        if len(self._known) > MOST:
            self._known = {"": ""}
        chunks = list(_chunks(texts))
        if len(chunks) == 1:
            words, new = self._cut(chunks[0])
            return self._joined(words, new, self._encode(new) if new else [])
        encoded: list[np.ndarray] = []
        with concurrent.futures.ThreadPoolExecutor(1) as beside:
            waiting: list[tuple[Any, ...]] = []
            for chunk in chunks:
                words, new = self._cut(chunk)
                waiting.append((words, new, beside.submit(self._encode, new)))
                if len(waiting) > 1:
                    encoded += self._take(*waiting.pop(0))
            for one in waiting:
                encoded += self._take(*one)
        return encoded

    def _cut(self, texts: Sequence[str]) -> tuple[list[list[str]], list[str]]:
        """The words of each text, and those that are new."""
        words = list(map(self._split, texts))
        return words, list(set(itertools.chain.from_iterable(words)).difference(self._known))

    def _take(self, words: list[list[str]], new: list[str], coming: Any) -> list[np.ndarray]:
        return self._joined(words, new, coming.result())

    def _joined(
        self, words: list[list[str]], new: list[str], encoded: list[str]
    ) -> list[np.ndarray]:
        """The tokens of texts by their words; those of the new ones are kept, unless long."""
        known = self._known
        known.update(zip(new, encoded))
        joined = ["".join(map(known.__getitem__, text)) for text in words]
        for word in new:
            if len(word) > LONGEST:
                del known[word]
        return [
            np.frombuffer(tokens.encode("utf-32-le", "surrogatepass"), "<u4") for tokens in joined
        ]


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    begin = size = 0
    for end, text in enumerate(texts, 1):
        size += len(text)
        if size >= CHUNK or end == len(texts):
            yield texts[begin:end]
            begin, size = end, 0
