"""Requests to the engine, and what it tells of them as they are answered."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool

from lmjax.config import UserError
from lmjax.generation.prompts import PromptTooLong, check_prompts
from lmjax.generation.sampling import Sampling
from lmjax.models import TransformerConfig

FinishReason = Literal["stop", "length", "cancelled", "error"]
# Errors that are no fault of the model: a request may be sent again.
WAITED = "the request has waited for too long"
STOPS = "the server stops"


class TokenConstraint(abc.ABC):
    """Base of what limits an answer, such as a grammar; it is of one answer, and has a state."""

    @abc.abstractmethod
    def allowed(self) -> Bool[np.ndarray, "vocab"]:
        """Mask of the tokens that may come next; at least one."""

    @abc.abstractmethod
    def advance(self, token: int) -> None:
        """Takes note of the next token, one that is allowed."""


@dataclasses.dataclass(frozen=True)
class TokenRequest:
    """A prompt to be continued once.

    Attributes:
      tokens: of the prompt.
      sampling: how tokens are chosen; the answer draws with its seed.
      max_tokens: most tokens of the answer.
      stop_tokens: ids that end it, and are no part of it.
      model: name of the weights.
      presence_penalty: taken from the logits of tokens that the answer has.
      frequency_penalty: taken from them as often as it has them.
      logit_bias: added to the logits of some tokens.
      tops: most likely tokens that are told beside each.
      score_prompt: tell the log-probabilities of the prompt's tokens too.
      constraint: of the answer.
      client: whose turn in the queue it is.
      seconds: most time for the answer, from when it leaves the queue; None: any.
    """

    tokens: Sequence[int]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    max_tokens: int = 100
    stop_tokens: Sequence[int] = ()
    model: str = ""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    tops: int = 0
    score_prompt: bool = False
    constraint: TokenConstraint | None = None
    client: str = ""
    seconds: float | None = None

    @property
    def adjusted(self) -> bool:
        """Returns whether logits are changed before the choice."""
        penalties = self.presence_penalty or self.frequency_penalty
        repetition = self.sampling.repetition_penalty != 1
        return bool(penalties or repetition or self.logit_bias or self.constraint)

    @property
    def guessable(self) -> bool:
        """Returns whether its tokens can be guessed ahead: they follow from the logits alone."""
        return self.sampling.temperature == 0 and not self.adjusted and not self.tops


def check_request(
    request: TokenRequest, config: TransformerConfig, capacity: int, reads_prefix: bool
) -> None:
    """Raises UserError for a request that no engine of a model can answer.

    Args:
      request: to check.
      config: of the model.
      capacity: most tokens of a text that the cache and the model have room for.
      reads_prefix: whether the model reads prompts from both sides.
    """
    check_prompts(config, [request.tokens])
    if len(request.tokens) > capacity:
        raise PromptTooLong(
            f"the prompt has {len(request.tokens)} tokens; the server's cache and the model"
            f" have room for {capacity} of a text, prompt and answer together"
        )
    if reads_prefix and request.score_prompt:
        raise UserError(
            "logprobs of the prompt: the model reads it from both sides (PrefixLM), and gives"
            " its tokens no probabilities; set echo=false or leave logprobs out"
        )
    size = config.vocab_size
    if wrong := [token for token in request.logit_bias if not 0 <= token < size]:
        raise UserError(f"logit_bias: {wrong[0]} is no token: they are 0 to {size - 1}")


@dataclasses.dataclass(frozen=True)
class ScoredToken:
    """A token with its probability.

    Attributes:
      token: its id.
      log_probability: in the model's own distribution; None: of a text's first token there is none.
      tops: the most likely tokens with theirs.
    """

    token: int
    log_probability: float | None
    tops: tuple[tuple[int, float], ...] = ()


class Answer(abc.ABC):
    """Base of what takes the tokens of an answer, in the engine's thread; it must not wait."""

    @abc.abstractmethod
    def take(self, token: ScoredToken) -> bool:
        """Takes the next token; returns whether the answer goes on, as far as it knows."""

    @abc.abstractmethod
    def finish(self, reason: FinishReason, error: str = "") -> None:
        """Is told once, after the last token, why there are no more."""

    def take_prompt(self, tokens: Sequence[ScoredToken], cached: int) -> None:  # noqa: B027
        """Is told once that the prompt was read.

        Args:
          tokens: of the prompt, where the request asks for their probabilities; else none.
          cached: tokens that known pages had.
        """


class CollectedAnswer(Answer):
    """Keeps all that it is told.

    Attributes:
      tokens: of the answer.
      prompt: of the prompt, where they were asked for.
      cached: tokens of the prompt that known pages had.
      reason: why there are no more; None: it goes on.
      error: with the reason "error".
    """

    def __init__(self) -> None:
        self.tokens: list[ScoredToken] = []
        self.prompt: list[ScoredToken] = []
        self.cached = 0
        self.reason: FinishReason | None = None
        self.error = ""

    def take(self, token: ScoredToken) -> bool:
        """See `Answer.take`."""
        self.tokens.append(token)
        return True

    def take_prompt(self, tokens: Sequence[ScoredToken], cached: int) -> None:
        """See `Answer.take_prompt`."""
        self.prompt, self.cached = list(tokens), cached

    def finish(self, reason: FinishReason, error: str = "") -> None:
        """See `Answer.finish`."""
        self.reason, self.error = reason, error

    @property
    def ids(self) -> list[int]:
        """The answer's token ids."""
        return [token.token for token in self.tokens]
