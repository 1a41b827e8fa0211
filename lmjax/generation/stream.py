"""Tokens to text as they come, on the host: whole characters, and nothing from a stop string on.

It knows tokens and a tokenizer alone: neither the loop of steps nor what is compiled.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence

from lmjax.config import UserError
from lmjax.data.tokenizers import Tokenizer


class TextStream:
    """Turns tokens into text as they come, and stops before a stop string.

    Joined, the pieces do not depend on how the tokens were handed in. Text is held back while it
    may be half a character or the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), at_start: bool = False):
        """At the start of a text a tokenizer may put a space before it, which is left out."""
        if "" in stop:
            raise UserError("stop: an empty string stands everywhere; leave it out")
        self.stopped = False
        self._tokenizer, self._stop, self._at_start = tokenizer, tuple(stop), at_start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is certain after these tokens; "" once stopped."""
        for token in tokens:
            data = self._tokenizer.token_bytes(token)
            if self._at_start and data:
                self._at_start = False
                if data[:1] == b" " and self._tokenizer.decode([token])[:1] != " ":
                    data = data[1:]
            self._held += self._decoder.decode(data)
        return self._release()

    def rest(self) -> str:
        """The text that was held back, when no more tokens come."""
        self._held += self._decoder.decode(b"", final=True)
        text = self._release()
        if self.stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _release(self) -> str:
        """Takes from the held text what no stop string can claim any more."""
        if self.stopped:
            self._held = ""
            return ""
        ends = [(begin + len(s), begin) for s in self._stop if (begin := self._held.find(s)) >= 0]
        if ends:  # the one that is complete first, however the text came
            self.stopped = True
            text, self._held = self._held[: min(ends)[1]], ""
            return text
        # No more of a stop string than there is text: it may be of any length.
        held = self._held
        longest = max(
            (
                n
                for s in self._stop
                for n in range(min(len(s), len(held) + 1))
                if held.endswith(s[:n])
            ),
            default=0,
        )
        cut = len(self._held) - longest
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def pieces(parts: Iterable[Sequence[Sequence[int]]], text: TextStream) -> Iterator[str]:
    """Yields the text of one row as it becomes certain, and asks for no tokens after a stop string.

    Args:
      parts: new tokens of each row, as `Generator.stream` yields them; of one row.
      text: the row's text.
    """
    for part in parts:
        if new := text.add(part[0]):
            yield new
        if text.stopped:
            return
    if rest := text.rest():
        yield rest


def whole_texts(
    parts: Iterable[Sequence[Sequence[int]]], streams: Sequence[TextStream]
) -> list[str]:
    """The text of each row; asks for no tokens once all have come to a stop string."""
    texts = [""] * len(streams)
    for part in parts:
        for row, (stream, tokens) in enumerate(zip(streams, part)):
            texts[row] += stream.add(tokens)
        if all(stream.stopped for stream in streams):
            break
    return [text + stream.rest() for text, stream in zip(texts, streams)]
