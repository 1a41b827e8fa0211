"""Facts about the tokenizer that objectives need, looked up once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Int

from lmjax.config import UserError
from lmjax.data.tokenizers import Tokenizer

SENTENCE_ENDS = (".", "?", "!", ";", ":", "。", "？", "！", "；", "：", "…", "\n")


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """Ids of special tokens by name, and what kinds of text the others stand for.

    It is made once a run and travels to the processes that prepare batches.

    Attributes:
      special: ids by name of the tokens that stand for no text.
      begin: id that opens a document, or None.
      end: id that closes a document; equal to `begin` where one separator stands before each.
      words: the ids that stand for text.
      ends_sentence: by id, whether a sentence ends with the token.
      begins_word: by id, whether a word begins with the token, unless white space stands before.
      ends_word: by id, whether the next token begins a word in any case.
      is_space: by id, whether the token is white space, which belongs to the word behind it.
    """

    special: Mapping[str, int]
    begin: int | None
    end: int
    words: Int[np.ndarray, "words"]
    ends_sentence: Bool[np.ndarray, "vocab"]
    begins_word: Bool[np.ndarray, "vocab"]
    ends_word: Bool[np.ndarray, "vocab"]
    is_space: Bool[np.ndarray, "vocab"]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenTable:
        """Lexicon of a tokenizer."""
        hidden = set(tokenizer.special.values())
        texts = [
            "" if token in hidden else tokenizer.token_bytes(token).decode("utf-8", "ignore")
            for token in range(tokenizer.vocab_size)
        ]
        is_word = np.array([token not in hidden for token in range(tokenizer.vocab_size)])
        spaces = [(text[:1].isspace(), text[-1:].isspace(), text.isspace()) for text in texts]
        before, after, is_space = np.array(spaces, bool).reshape(-1, 3).T
        return cls(
            special=dict(tokenizer.special),
            begin=tokenizer.begin,
            end=tokenizer.end,
            words=np.flatnonzero(is_word),
            ends_sentence=np.array([text.rstrip(" ").endswith(SENTENCE_ENDS) for text in texts]),
            begins_word=before | ~is_word,
            ends_word=(after & ~is_space) | ~is_word,
            is_space=is_space,
        )

    def token(self, name: str) -> int:
        """The id of a special token.

        Raises:
          UserError: the tokenizer has none of that name.
        """
        if name not in self.special:
            known = ", ".join(sorted(self.special)[:12])
            raise UserError(
                f"the objective needs the token {name!r}, which the tokenizer lacks (its special "
                f"tokens: {known or 'none'}). Add it behind the vocabulary with data.tokenizer="
                f"""'WithTokens(tokenizer=..., tokens=("{name}", ...))', or name in the """
                "objective the token that shall stand for it"
            )
        return self.special[name]

    def begins(self, tokens: Int[np.ndarray, "text"]) -> Bool[np.ndarray, "text"]:
        """Mask of the tokens that begin a word, the white space before it included."""
        begins = np.ones(len(tokens), bool)
        before = tokens[:-1]
        goes_on = ~self.begins_word[tokens[1:]] | self.is_space[before]
        begins[1:] = ~goes_on | self.ends_word[before] | self.is_mark(before)
        return begins

    def is_mark(self, tokens: Int[np.ndarray, "..."]) -> Bool[np.ndarray, "..."]:
        """Mask of the tokens that begin or end a document, which are never hidden."""
        return (tokens == self.end) | (tokens == (self.end if self.begin is None else self.begin))


class AnyToken(dict):
    """Takes every name for that of token 0: a lexicon to find out shapes with."""

    def __missing__(self, name: str) -> int:
        return 0

    def __contains__(self, name: object) -> bool:
        return True


NO_WORDS = np.zeros(1, bool)
SHAPES_ONLY = TokenTable(
    AnyToken(), None, 0, np.zeros(1, np.int64), NO_WORDS, NO_WORDS, NO_WORDS, NO_WORDS
)  # for rows of nothing but padding
