"""A smaller model that guesses the next tokens (Leviathan et al. 2023, arXiv:2211.17192)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmjax.config import UserError
from lmjax.models import EncoderDecoderConfig
from lmjax.serving.active import ActiveRequest
from lmjax.serving.choice import greedy_tokens
from lmjax.serving.runner import PageRunner
from lmjax.serving.settings import EngineSettings
from lmjax.serving.weights import ServedWeights


class DraftModel:
    """Guesses tokens, with pages of its own under the numbers of the requests' pages.

    So a page that is known to the one is known to the other. Where it has not read a token, as
    those of answers that are drawn, its guesses are worse, and nothing else is.
    """

    def __init__(self, weights: ServedWeights, served: ServedWeights, settings: EngineSettings):
        """Takes the weights of the smaller model, and those of the one that it guesses for.

        Raises:
          UserError: it does not fit to the other.
        """
        config, model = weights.forward.config, served.forward.config
        if isinstance(config, EncoderDecoderConfig) or not config.attention.causal:
            raise UserError("draft: it continues no text")
        if weights.reads_prefix != served.reads_prefix:
            raise UserError("draft: one of the two models reads prompts from both sides (PrefixLM)")
        if config.vocab_size != model.vocab_size:
            raise UserError(
                f"draft: it has {config.vocab_size} tokens, and the model {model.vocab_size}"
            )
        if config.attention.position_rule.by_length or (
            config.max_length is not None
            and (model.max_length is None or config.max_length < model.max_length)
        ):
            raise UserError(
                f"draft: its context of {config.max_length} tokens is shorter than the model's, or"
                " its positions depend on the length of the text"
            )
        self._weights = weights
        self._prefix = weights.reads_prefix
        self._runner = PageRunner(config, weights.forward.layout, settings, self._prefix)

    def read(self, active: Sequence[ActiveRequest], tokens: Sequence[Sequence[int]]) -> None:
        """Reads what the model reads too, of requests that do not change."""
        self._runner.extend(active, tokens, weights=self._weights, prefix=self._prefix)

    def guess(self, active: Sequence[ActiveRequest], counts: Sequence[int]) -> list[list[int]]:
        """The likeliest tokens after the texts of requests.

        The last two tokens of a text are read anew: of a guess that was right to its end, the last
        token is not there yet.

        Args:
          active: the requests.
          counts: of tokens that are guessed; the pages have room for them.
        """
        if not active:
            return []
        ends = [one.tokens[one.cached - 1 :] for one in active]
        logits = self._runner.extend(active, ends, 2, weights=self._weights, shift=-1)
        guesses: list[list[int]] = [[] for _ in active]
        for step in range(1, max(counts) + 1):
            tokens = np.asarray(greedy_tokens(logits[:, None])[0])[:, 0].tolist()
            for guess, token, count in zip(guesses, tokens, counts):
                guess += [token] * (step <= count)
            new = [
                guess[step - 1 :] if step < count else [] for guess, count in zip(guesses, counts)
            ]
            if any(new):
                logits = self._runner.extend(active, new, weights=self._weights, shift=step)
        return guesses
