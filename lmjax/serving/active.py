"""A request that has a slot: its text so far, its pages, and what changes its logits."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np

from lmjax.serving.request import Answer, ScoredToken, TokenRequest
from lmjax.serving.weights import ServedWeights


@dataclasses.dataclass(eq=False)
class ActiveRequest:
    """State of a request from the queue to its end.

    Attributes:
      number: of the request.
      request: as it came.
      answer: takes its tokens.
      weights: those under its name when it begins, whatever is served so later.
      budget: most tokens of the answer.
      vocab: number of the model's tokens.
      tokens: of the prompt and the answer.
      cached: how many of the first tokens lie in the cache.
      pages: that hold them, and have room for more.
      keys: of its full pages.
      bias: added to its logits; None where nothing is.
      seen: tokens that it has; None where nothing depends on it.
      matched: tokens of the prompt that known pages had.
      scored: tokens of the prompt with their probabilities, where they are asked for.
      prompt_told: the answer was told that the prompt is read.
      came, began: when it came, and when it left the queue, by `time.monotonic`.
    """

    number: int
    request: TokenRequest
    answer: Answer
    weights: ServedWeights
    budget: int
    vocab: int
    tokens: list[int] = dataclasses.field(init=False)
    cached: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    keys: list[bytes] = dataclasses.field(default_factory=list)
    bias: np.ndarray | None = None
    seen: np.ndarray | None = None
    matched: int = 0
    scored: list[ScoredToken] = dataclasses.field(default_factory=list)
    prompt_told: bool = False
    came: float = dataclasses.field(default_factory=time.monotonic)
    began: float = 0.0

    def __post_init__(self) -> None:
        """Prepares what changes its logits."""
        request = self.request
        self.tokens = list(request.tokens)
        if request.adjusted:
            self.bias = np.zeros(self.vocab, np.float32)
            for token, value in request.logit_bias.items():
                self.bias[token] = value
            self.seen = np.zeros(self.vocab, bool)
            self.seen[self.tokens] = True

    @property
    def written(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.tokens)

    @property
    def reading(self) -> int:
        """Tokens that are not in the cache; while it is written, the newest alone."""
        return len(self.tokens) - self.cached

    def late(self, seconds: float) -> bool:
        """Returns whether it has had its time, which is at most so many seconds."""
        return time.monotonic() - self.began > min(self.request.seconds or math.inf, seconds)

    @property
    def scores_prompt(self) -> bool:
        """Returns whether its prompt's own tokens are still to get their probabilities."""
        return self.request.score_prompt and not self.prompt_told

    def append(self, token: int) -> None:
        """Adds a token to the answer."""
        request = self.request
        if self.bias is not None:
            if token not in self.tokens[len(request.tokens) :]:
                self.bias[token] -= request.presence_penalty
            self.bias[token] -= request.frequency_penalty
            self.seen[token] = True
        self.tokens.append(token)
        if request.constraint is not None:
            request.constraint.advance(token)

    def total_bias(self) -> np.ndarray:
        """Bias of the next token's logits."""
        constraint = self.request.constraint
        if constraint is None:
            return self.bias
        return np.where(constraint.allowed(), self.bias, -np.inf).astype(np.float32)

    def forget_pages(self) -> list[int]:
        """Its pages, which it has no more; its text is read again when it goes on."""
        pages, self.pages, self.cached = self.pages, [], 0
        return pages
