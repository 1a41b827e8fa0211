"""Special tokens for a tokenizer that lacks them, behind its vocabulary."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from lmjax.config import UserError, config
from lmjax.data.tokenizers.base import Corpus, Tokenizer, TokenizerConfig, load_tokenizer
from lmjax.data.tokenizers.subwords import TrainedBPE

INNER_FOLDER = "inner"


@config
class WithTokens(TokenizerConfig):
    """Another tokenizer and special tokens behind its vocabulary, such as GLM's [MASK].

    The model's vocab_size has to hold them too.
    """

    tokenizer: TokenizerConfig = TrainedBPE()  # whose ids all stay
    tokens: tuple[str, ...]  # names of the new ones, in the order of their ids

    def validate(self) -> None:
        if not self.tokens or len(set(self.tokens)) < len(self.tokens) or "" in self.tokens:
            raise UserError(f"tokens={self.tokens}: one name or more, each of them once")

    def build(self, corpus: Corpus) -> Tokenizer:
        """See `TokenizerConfig.build`."""
        inner = self.tokenizer.build(corpus)
        if known := [name for name in self.tokens if name in inner.special]:
            raise UserError(f"tokens: the tokenizer has {', '.join(known)} already; leave it out")
        return ExtendedTokenizer(inner, self.tokens)

    def origin(self) -> str | None:
        inner = self.tokenizer.origin()
        return None if inner is None else "\n".join([inner, *self.tokens])


class ExtendedTokenizer(Tokenizer):
    """A tokenizer with more special tokens; no text is encoded as one of them."""

    kind = "extended"

    def __init__(self, inner: Tokenizer, names: Sequence[str]):
        """`names` of the new tokens, in the order of their ids."""
        self.inner, self.names = inner, tuple(names)
        self.begin, self.end, self.unknown = inner.begin, inner.end, inner.unknown
        self.vocab_size = inner.vocab_size + len(self.names)
        new = {name: inner.vocab_size + number for number, name in enumerate(self.names)}
        self.special: Mapping[str, int] = {**inner.special, **new}

    @property
    def opening(self) -> tuple[int, ...]:
        return self.inner.opening

    @property
    def closing(self) -> tuple[int, ...]:
        return self.inner.closing

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        self.inner.threads = self.threads
        return self.inner.encode_batch(texts)

    def encode_arrays(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "tokens"]]:
        """See `Tokenizer.encode_arrays`."""
        self.inner.threads = self.threads
        return self.inner.encode_arrays(texts)

    def token_bytes(self, token: int) -> bytes:
        return self.inner.token_bytes(token) if token < self.inner.vocab_size else b""

    def decode(self, tokens: Sequence[int]) -> str:
        return self.inner.decode([token for token in tokens if token < self.inner.vocab_size])

    def settings(self) -> dict[str, Any]:
        inner = self.inner.fingerprint
        return {"kind": self.kind, "names": list(self.names), "inner": inner}

    def save(self, folder: str | pathlib.Path) -> None:
        """See `Tokenizer.save`; the inner tokenizer has a folder inside."""
        self.inner.save(pathlib.Path(folder) / INNER_FOLDER)
        super().save(folder)

    @classmethod
    def from_saved(cls, settings: dict[str, Any], folder: pathlib.Path) -> "ExtendedTokenizer":
        return cls(load_tokenizer(folder / INNER_FOLDER), settings["names"])
