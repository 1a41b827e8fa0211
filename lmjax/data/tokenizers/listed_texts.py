"""Texts in memory that a tokenizer learns from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lmjax.data.tokenizers.base import Corpus


class ListedTexts(Corpus):
    """Texts of a list."""

    def __init__(self, texts: Sequence[str]) -> None:
        """The texts."""
        self._texts = texts

    def sample(self, size: int) -> Iterator[str]:
        """See `Corpus.sample`: texts at equal distances."""
        total = sum(len(text.encode("utf-8", "surrogatepass")) for text in self._texts)
        yield from self._texts[:: max(1, -(-total // max(size, 1)))]

    def everything(self) -> Iterator[str]:
        """See `Corpus.everything`."""
        yield from self._texts
