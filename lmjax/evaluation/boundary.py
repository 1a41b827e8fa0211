"""Tokens of a context and of its continuation, which are encoded as one text and then cut.

The cut is that of EleutherAI's lm-evaluation-harness: white space at the end of the context belongs
to the continuation, since tokens of words begin with theirs; the continuation's tokens are those of
the whole text behind as many as the context has alone. Where the context alone has other tokens
than within the whole, a token may hold the last of the context and the first of the continuation.
It is scored: what is scored covers all of the continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lmjax.config import UserError
from lmjax.data.tokenizers import TextPiece, Tokenizer, cut_at_names
from lmjax.evaluation.requests import ContinuationRequest


class TokenPair(NamedTuple):
    """Tokens of a context, at least one, and of its continuation, at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


def token_pairs(
    tokenizer: Tokenizer, requests: Sequence[ContinuationRequest], beginning: Sequence[int]
) -> list[TokenPair]:
    """Tokens of requests.

    Args:
      tokenizer: of the model.
      requests: contexts with their continuations.
      beginning: tokens that stand before a text with no context; see `beginning_of`.

    Raises:
      UserError: a continuation makes no token.
    """
    texts = [_moved(request) for request in requests]
    opening = tuple(tokenizer.opening)
    contexts = dict.fromkeys((context, r.special) for (context, _), r in zip(texts, requests))
    alone = dict(zip(contexts, _encoded(tokenizer, list(contexts)), strict=True))
    encoded = _encoded_wholes(tokenizer, texts, requests)
    found = []
    for (context, after), request, whole in zip(texts, requests, encoded, strict=True):
        before = alone[context, request.special]
        size = cut_of(tokenizer, before, whole, after)
        if size >= len(whole):
            raise UserError(
                f"the tokenizer makes no token of the continuation {request.continuation[:60]!r}"
                f" behind {request.context[-40:]!r}: nothing is left to score"
            )
        head, tail = tuple(whole[:size]), tuple(whole[size:])
        if not (request.special and head[: len(opening)] == opening):
            head = opening + head
        if not head:
            head = tuple(beginning)
            if len(tail) > 1 and tail[:1] == head:  # the text has it itself
                tail = tail[1:]
        found.append(TokenPair(head, tail))
    return found


def cut_of(tokenizer: Tokenizer, alone: Sequence[int], whole: Sequence[int], after: str) -> int:
    """Number of tokens of a whole text that are its context's.

    Args:
      tokenizer: of the model.
      alone: tokens of the context by itself.
      whole: tokens of the context with its continuation.
      after: the continuation.
    """
    if list(whole[: len(alone)]) == list(alone):
        return len(alone)
    wanted = after.encode("utf-8", "replace")
    tail = b""
    for size in range(len(whole) - 1, -1, -1):
        tail = tokenizer.token_bytes(whole[size]) + tail
        if len(tail) >= len(wanted):
            if tail.endswith(wanted):
                return size
            break
    # Texts that the tokenizer changes: as far as both go together.
    same = next((n for n, pair in enumerate(zip(alone, whole)) if pair[0] != pair[1]), len(whole))
    return max(0, min(same, len(whole) - 1))


def beginning_of(tokenizer: Tokenizer, begin: int | None = None) -> tuple[int, ...]:
    """Tokens that stand before a text that has nothing before it.

    Args:
      tokenizer: of the model.
      begin: token that begins a text where the tokenizer puts none before it; None: the one that
        ends the text before.
    """
    return tuple(tokenizer.opening) or (tokenizer.end if begin is None else begin,)


def text_tokens(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    """Tokens of a prompt with what is put before every text, once."""
    opening = list(tokenizer.opening)
    tokens = tokenizer.encode_special(text) if special else tokenizer.encode(text)
    return tokens if special and tokens[: len(opening)] == opening else opening + tokens


def _moved(request: ContinuationRequest) -> tuple[str, str]:
    """Context and continuation, with white space between them in the latter."""
    context, continuation = request.context, request.continuation
    if request.special:
        return context, continuation
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _encoded_wholes(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], requests: Sequence[ContinuationRequest]
) -> list[list[int]]:
    """Tokens of contexts with their continuations; in the latter names are text."""
    pairs = list(zip(texts, requests, strict=True))
    plain = iter(tokenizer.encode_batch(["".join(text) for text, r in pairs if not r.special]))

    def marked(context: str, after: str) -> list[int]:
        pieces = cut_at_names(context, tokenizer.special)
        if pieces and not pieces[-1].special:
            after = pieces.pop().text + after
        return tokenizer.encode_pieces([*pieces, TextPiece(after, special=False)])

    return [marked(*text) if r.special else next(plain) for text, r in pairs]


def _encoded(tokenizer: Tokenizer, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
    """Tokens of texts, each with whether names in it are special tokens."""
    plain = iter(tokenizer.encode_batch([text for text, special in texts if not special]))
    return [tokenizer.encode_special(text) if special else next(plain) for text, special in texts]
