"""Round trips: how much of a text its tokens hold, and which tokens are unknown."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from lmjax.data.tokenizers import Tokenizer

COMPARED = 1 << 18  # bytes of each split of a shard that are decoded again and compared
SHOWN = 24  # characters of an example
# Share of unknown tokens, or of bytes that do not come back, up to which the bits that a model
# spends on the tokens count as those of the text. Whoever wants the text back from the tokens has
# to write down where a byte differs and which one stands there: H(0.001) + 8 x 0.001, about 0.02
# bits per byte, less than what models are told apart by.
LITTLE = 1e-3


@dataclasses.dataclass(frozen=True)
class RoundTrip:
    """Losses of a store's text on the way to tokens and back.

    Attributes:
      tokens: those of the text, without what begins and ends documents or marks answers.
      unknown: how many of them are the token for what the tokenizer does not know.
      unknown_name: name of this token; empty where there is none.
      compared: UTF-8 bytes of text that were decoded again, from all over the source.
      lost: of these, at least so many do not come back; see `lost_bytes`.
      example: the first difference, in the text and as it comes back; empty where there is none.
    """

    tokens: int
    unknown: int
    unknown_name: str
    compared: int
    lost: int
    example: tuple[str, ...]

    @property
    def unknown_share(self) -> float:
        """Share of the text's tokens that are unknown."""
        return self.unknown / max(self.tokens, 1)

    @property
    def lost_share(self) -> float:
        """Share of the text's bytes that do not come back, at least."""
        return self.lost / max(self.compared, 1)

    def not_comparable(self) -> str:
        """Reason why bits per byte of the text would mean nothing; empty where they are right.

        Bits per byte compare models because every model has to spend bits on all of the text. What
        tokens do not hold is free, so the number is too low, and no model's of other tokens
        compares with it.
        """
        reasons = [words for share, words in self._losses() if share > LITTLE]
        return f"not comparable: {' and '.join(reasons)}" if reasons else ""

    def note(self) -> str:
        """Note on what the tokens lose, however little; empty where nothing is known to be lost."""
        return " and ".join(words for share, words in self._losses() if share)

    def _losses(self) -> Iterator[tuple[float, str]]:
        """Each kind of loss: its share, and what to say of it."""
        unknown = f"{percent(self.unknown_share)} of the tokens are unknown ({self.unknown_name})"
        yield self.unknown_share, unknown
        lost = f"at least {percent(self.lost_share)} of the bytes do not come back from the tokens"
        if self.example:
            lost += " ({!r} as {!r})".format(*self.example)
        yield self.lost_share, lost


class Comparison:
    """Decodes tokens and compares them with the text that they were made from."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.compared = self.lost = 0
        self.example: tuple[str, ...] = ()

    @property
    def goes_on(self) -> bool:
        """Returns whether more shall be compared."""
        return self.compared < COMPARED

    def add(self, texts: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
        """Compares the pieces of a document with their tokens."""
        for text, ids in zip(texts, tokens, strict=True):
            data, decoded = text.encode("utf-8"), self._tokenizer.decode(ids)
            self.compared += len(data)
            if decoded != text:
                self.lost += lost_bytes(data, decoded.encode("utf-8"))
                self.example = self.example or _difference(text, decoded)

    def counts(self) -> dict[str, int | tuple[str, ...]]:
        """Counts for `RoundTrip`."""
        return {"compared": self.compared, "lost": self.lost, "example": self.example}


def lost_bytes(text: bytes, decoded: bytes) -> int:
    """Fewest bytes to remove, insert or replace that make one text the other.

    By how often each byte stands in them: a lower bound of the Levenshtein distance, which itself
    takes a time that grows with the product of the lengths. At least 1 where they differ.
    """
    if text == decoded:
        return 0
    before, after = (
        np.bincount(np.frombuffer(data, np.uint8), minlength=256) for data in (text, decoded)
    )
    missing, surplus = (int(np.maximum(n, 0).sum()) for n in (before - after, after - before))
    return max(missing, surplus, 1)


def unknown_name(tokenizer: Tokenizer) -> str:
    """Name of the token for what the tokenizer does not know; empty where there is none."""
    names = (name for name, token in tokenizer.special.items() if token == tokenizer.unknown)
    return "" if tokenizer.unknown is None else next(names, f"id {tokenizer.unknown}")


def percent(share: float) -> str:
    """A share in words, with three digits."""
    return f"{100 * share:.3g} percent"


def _difference(text: str, decoded: str) -> tuple[str, str]:
    """First difference of two texts, with some characters before it."""
    differing = (n for n, (one, other) in enumerate(zip(text, decoded)) if one != other)
    first = max(0, next(differing, min(len(text), len(decoded))) - SHOWN // 3)
    return text[first : first + SHOWN], decoded[first : first + SHOWN]
