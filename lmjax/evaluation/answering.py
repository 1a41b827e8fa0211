"""Answers of a model to requests of all kinds."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from lmjax.config import UserError
from lmjax.evaluation.blank_scorers import scorer_of
from lmjax.evaluation.boundary import beginning_of, text_tokens
from lmjax.evaluation.likelihood import check_known_tokens
from lmjax.evaluation.requests import (
    ContinuationRequest,
    ModelAnswer,
    ModelRequest,
    RollingRequest,
    Written,
    WrittenRequest,
)
from lmjax.evaluation.scoring_plan import cut_in_batches
from lmjax.generation.fill import AutoregressiveInfiller, Infiller, MaskedTokenInfiller
from lmjax.generation.sampling import Sampling
from lmjax.generation.text import TextGenerator

NoteAnswer = Callable[[int, ModelAnswer], None]  # number of the request, its answer


class Answering:
    """Answers requests with a model. A mesh must be set, that of the model."""

    def __init__(
        self,
        text: TextGenerator,
        batch_size: int = 32,
        begin: int | None = None,
    ):
        """
        Args:
          text: the model and its tokenizer.
          batch_size: most rows that are run at once.
          begin: see `beginning_of`.
        """
        self.text, self.batch_size = text, batch_size
        self.scorer = scorer_of(text, batch_size, begin)
        self.beginning = beginning_of(text.tokenizer, begin)

    def answers(
        self, requests: Sequence[ModelRequest], note: NoteAnswer | None = None
    ) -> list[ModelAnswer]:
        """Answers in the order of the requests.

        Args:
          requests: of any kind.
          note: is told each answer as soon as it is there, in the order of the work.

        Raises:
          UserError: a request that the model cannot answer; it gives no numbers.
        """
        found: list[ModelAnswer | None] = [None] * len(requests)
        kinds = {
            ContinuationRequest: self.scorer.continuations,
            RollingRequest: self.scorer.rolling,
            WrittenRequest: self._written,
        }
        for kind, answer in kinds.items():
            numbers = [n for n, request in enumerate(requests) if isinstance(request, kind)]

            def keep(order: int, given: ModelAnswer, numbers=numbers) -> None:
                number = numbers[order]
                found[number] = given
                if note is not None:
                    note(number, given)

            if numbers:
                answer([requests[n] for n in numbers], keep)
        return found

    def _written(self, requests: Sequence[WrittenRequest], note: NoteAnswer) -> None:
        """Writes texts, those with the same settings in one batch."""
        tokenizer, vocabulary = self.text.tokenizer, self.text.generator.config.vocab_size
        rows, cuts = [], []
        for request in requests:
            tokens = text_tokens(tokenizer, request.prompt, request.special)
            tokens = tokens or list(self.beginning)
            check_known_tokens(tokens, vocabulary)
            longest = self.text.generator.config.max_length
            room = prompt_room(longest, request.max_tokens, self.text.filling)
            cuts.append(0 if room is None else max(0, len(tokens) - room))
            rows.append(tokens[cuts[-1] :])
        for numbers in _alike(requests):
            # What is drawn may not depend on the batch: each request has draws of its own.
            size = self.batch_size if requests[numbers[0]].temperature == 0 else 1
            for part, _ in cut_in_batches([len(rows[n]) for n in numbers], size):
                self._write([numbers[n] for n in part], requests, rows, cuts, note)

    def _write(self, numbers, requests, rows, cuts, note) -> None:
        one = requests[numbers[0]]
        sampling = Sampling(temperature=one.temperature, top_p=one.top_p, seed=one.seed)
        texts = self.text.texts_behind(
            [rows[n] for n in numbers],
            [not requests[n].prompt for n in numbers],
            sampling,
            one.max_tokens,
            one.stop,
            one.samples,
        )
        for order, number in enumerate(numbers):
            own = texts[order * one.samples : (order + 1) * one.samples]
            note(number, Written(tuple(own), cuts[number]))


def prompt_room(longest: int | None, most: int, filling: Infiller | None) -> int | None:
    """Most tokens of a prompt behind which a text is written; None: any number.

    Args:
      longest: tokens that the model reads; None: any number.
      most: tokens of the text.
      filling: how the model fills blanks, whose markers need room too; None: it continues texts.

    Raises:
      UserError: there is no room for a prompt, or the model writes no texts.
    """
    if isinstance(filling, MaskedTokenInfiller):
        raise UserError("a model that guesses masks writes no texts: leave the task")
    if longest is None:
        return None
    blank = isinstance(filling, AutoregressiveInfiller)
    found = filling.room(longest, most) if blank else longest - most
    if found < 1:
        raise UserError(
            f"{most} tokens are to be written, but the model reads {longest}: "
            "that leaves no room for the question; ask for fewer"
        )
    return found


def _alike(requests: Sequence[WrittenRequest]) -> list[list[int]]:
    """Numbers of requests that differ in their prompts alone."""
    found = collections.defaultdict(list)
    for number, one in enumerate(requests):
        settings = one.stop, one.max_tokens, one.temperature, one.top_p, one.samples, one.seed
        found[settings].append(number)
    return list(found.values())
