"""Answers bound to a JSON schema, by llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from lmjax.config import UserError
from lmjax.data.tokenizers import Tokenizer
from lmjax.serving.request import TokenConstraint

LARGEST = 1 << 16  # bytes of a schema
# As Python writes JSON. White space of any length would let a small model write nothing else.
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarMaker:
    """Makes constraints for a tokenizer. Raises ImportError where llguidance is not installed."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """Reads the bytes of all tokens once."""
        import llguidance

        self._library, self._size = llguidance, vocab_size
        vocabulary = _Vocabulary(tokenizer, vocab_size)
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary))

    def of_schema(self, schema: Mapping[str, Any], stop_tokens: Sequence[int]) -> GrammarConstraint:
        """The constraint of an answer that is JSON by a schema.

        Args:
          schema: JSON schema.
          stop_tokens: that may end the answer once it is whole.

        Raises:
          UserError: the schema is none, or has what cannot be held.
        """
        text = json.dumps(schema)
        if len(text) > LARGEST:
            raise UserError(f"the schema has {len(text)} bytes, more than {LARGEST}")
        matcher_class = self._library.LLMatcher
        try:
            grammar = matcher_class.grammar_from_json_schema(text, overrides=WRITTEN)
            error = matcher_class.validate_grammar(grammar, self._tokenizer)
        except ValueError as wrong:
            error = str(wrong)
        if error:
            raise UserError(f"the JSON schema cannot be held to: {str(error).splitlines()[0]}")
        matcher = matcher_class(self._tokenizer, grammar)
        matcher.compute_bitmask()
        if matcher.is_error():  # as of {"$ref": "#"}, which only refers to itself
            raise UserError("the JSON schema cannot be held to: no text is in its form")
        return GrammarConstraint(matcher, self._size, stop_tokens)


class GrammarConstraint(TokenConstraint):
    """Holds an answer to a grammar."""

    def __init__(self, matcher: Any, vocab_size: int, stop_tokens: Sequence[int]):
        """Takes the matcher of one answer."""
        self._matcher, self._size, self._stops = matcher, vocab_size, list(stop_tokens)

    def allowed(self) -> Bool[np.ndarray, "vocab"]:
        """See `TokenConstraint.allowed`."""
        mask = np.zeros(self._size, bool)
        if not self._matcher.is_stopped():
            words = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            bits = np.unpackbits(words, bitorder="little")[: self._size]
            mask[: len(bits)] = bits
        mask[self._stops] = False  # the matcher may have set them, where nothing else can come
        mask[self._stops] = self._matcher.is_accepting() or not mask.any()
        return mask

    def advance(self, token: int) -> None:
        """See `TokenConstraint.advance`."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class _Vocabulary:
    """A tokenizer as llguidance reads it."""

    def __init__(self, tokenizer: Tokenizer, size: int):
        names = {token: name for name, token in tokenizer.special.items()}
        count = min(size, tokenizer.vocab_size)
        self.tokens = [
            names.get(token, f"<unused {token}>").encode()
            if token in names or token >= count
            else tokenizer.token_bytes(token) or f"<empty {token}>".encode()
            for token in range(size)
        ]
        self.special_token_ids = [
            token
            for token in range(size)
            if token in names or token >= count or not tokenizer.token_bytes(token)
        ]
        self.eos_token_id, self.bos_token_id = tokenizer.end, tokenizer.begin
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"))
