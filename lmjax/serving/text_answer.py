"""Answers as text, from the engine's thread to the one that writes to clients."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Sequence

from lmjax.generation.stream import TextStream
from lmjax.serving.request import Answer, FinishReason, ScoredToken


@dataclasses.dataclass(frozen=True)
class AnswerPiece:
    """The newest part of an answer.

    Attributes:
      index: of the answer, among those of one call.
      text: in whole characters; perhaps empty, where tokens make none yet.
      tokens: that were chosen since the last piece.
      prompt: tokens of the prompt with their probabilities, where they are asked for.
      cached: tokens of the prompt that known pages had; None: the prompt is not read yet.
      reason: why the answer ends; None: it goes on.
      error: with the reason "error".
    """

    index: int
    text: str = ""
    tokens: Sequence[ScoredToken] = ()
    prompt: Sequence[ScoredToken] = ()
    cached: int | None = None
    reason: FinishReason | None = None
    error: str = ""


class TextAnswer(Answer):
    """Hands an answer's pieces to an asyncio queue, and ends it at a stop string."""

    def __init__(self, index: int, text: TextStream, pieces: asyncio.Queue):
        """Takes the queue of the running event loop, which several answers may share."""
        self._index, self._text, self._pieces = index, text, pieces
        self._loop = asyncio.get_running_loop()

    def take(self, token: ScoredToken) -> bool:
        """See `Answer.take`."""
        self._put(AnswerPiece(self._index, self._text.add([token.token]), [token]))
        return not self._text.stopped

    def take_prompt(self, tokens: Sequence[ScoredToken], cached: int) -> None:
        """See `Answer.take_prompt`."""
        self._put(AnswerPiece(self._index, prompt=tokens, cached=cached))

    def finish(self, reason: FinishReason, error: str = "") -> None:
        """See `Answer.finish`."""
        self._put(AnswerPiece(self._index, self._text.rest(), reason=reason, error=error))

    def _put(self, piece: AnswerPiece) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody reads
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
