"""Requests to a model that is evaluated, and its answers to them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class ContinuationRequest:
    """Asks for the log-likelihood of a continuation.

    Attributes:
      context: what stands before it; empty: the continuation begins a text.
      continuation: what is scored; a space between the two belongs to it.
      special: names of special tokens in the context are these tokens, as in a rendered
        conversation. White space at the context's end is then the context's: the newline that opens
        a reply is no part of the answer.
    """

    context: str
    continuation: str
    special: bool = False


@dataclasses.dataclass(frozen=True)
class RollingRequest:
    """Asks for the log-likelihood of a whole text, however long, each token once.

    Attributes:
      text: the text.
      stride: tokens that are scored together in a text longer than the model reads, behind as many
        others as there is room for; None: as many as the model reads, behind one.
    """

    text: str
    stride: int | None = None


@dataclasses.dataclass(frozen=True)
class WrittenRequest:
    """Asks for a text that goes on from a prompt.

    Attributes:
      prompt: what stands before it.
      stop: the text ends before the first of these strings.
      max_tokens: most tokens of it.
      temperature: 0 takes the likeliest token always.
      top_p: share of the probability that tokens are drawn from.
      samples: number of texts.
      seed: what they are drawn from.
      special: as in `ContinuationRequest`.
    """

    prompt: str
    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    samples: int = 1
    seed: int = 0
    special: bool = False


ModelRequest = ContinuationRequest | RollingRequest | WrittenRequest


class Likelihood(NamedTuple):
    """Answer to a `ContinuationRequest` or a `RollingRequest`.

    Attributes:
      log_probability: natural logarithm of the probability of all tokens that are scored.
      is_greedy: each of them is the likeliest where it stands.
      tokens: number of the tokens that are scored.
      cut: tokens at the context's left that the model has no room for.
    """

    log_probability: float
    is_greedy: bool
    tokens: int
    cut: int = 0


class Written(NamedTuple):
    """Answer to a `WrittenRequest`.

    Attributes:
      texts: one a sample.
      cut: tokens at the prompt's left that the model has no room for.
    """

    texts: tuple[str, ...]
    cut: int = 0


ModelAnswer = Likelihood | Written


def request_key(request: ModelRequest) -> str:
    """20 hexadecimal digits that two requests share if, and only if, they ask for the same."""
    fields = json.dumps([type(request).__name__, dataclasses.asdict(request)], sort_keys=True)
    return hashlib.sha256(fields.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def answer_record(answer: ModelAnswer) -> dict[str, Any]:
    """An answer as JSON values."""
    return answer._asdict()


def read_answer(record: dict[str, Any]) -> ModelAnswer:
    """The answer that `answer_record` gave.

    Raises:
      KeyError, TypeError: it is of no answer.
    """
    if "texts" in record:
        return Written(tuple(record["texts"]), record["cut"])
    return Likelihood(**record)
