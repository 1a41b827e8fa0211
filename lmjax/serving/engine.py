"""The engine: continuous batching over a paged cache, one step after another in one thread."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from lmjax.config import UserError
from lmjax.generation.prompts import check_prompts, room
from lmjax.models import EncoderDecoderConfig
from lmjax.serving.active import ActiveRequest
from lmjax.serving.choice import greedy_tokens
from lmjax.serving.draft import DraftModel
from lmjax.serving.guesses import accepted, repeated
from lmjax.serving.pages import PageBook, page_keys
from lmjax.serving.request import (
    STOPS,
    WAITED,
    Answer,
    FinishReason,
    ScoredToken,
    TokenRequest,
    check_request,
)
from lmjax.serving.request_pages import RequestPages
from lmjax.serving.routing import EngineLoad
from lmjax.serving.rows import OpenStep, choose_next, score_prompt
from lmjax.serving.runner import PageRunner
from lmjax.serving.settings import EngineSettings
from lmjax.serving.shared_queue import SharedQueue
from lmjax.serving.weights import ServedWeights
from lmjax.serving.worker import QueueFull, Worker


class UnknownModel(UserError):
    """No weights have the name."""


class Engine(Worker):
    """Answers requests for one model.

    `submit` and `cancel` are for any thread. In a step a part of the oldest unread prompt is read,
    and each answer that is being written gets its next token. A request's tokens do not depend on
    the others'.

    Attributes:
      counts: what happened so far, by name.
    """

    def __init__(
        self,
        weights: Mapping[str, ServedWeights],
        settings: EngineSettings,
        draft: ServedWeights | None = None,
        queue: SharedQueue | None = None,
    ):
        """Nothing is compiled yet.

        Args:
          weights: by name, all of the same config; the first are the model's own.
          settings: of the engine.
          draft: of a smaller model that guesses tokens; None: they are guessed from the text.
          queue: that other engines of the model have theirs in too; None: one of its own.

        Raises:
          UserError: a model that does not continue texts, or a smaller one that does not fit.
        """
        super().__init__(settings.queue)
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self._weights = dict(weights)
        first = next(iter(self._weights.values()))
        self.config = first.forward.config
        if isinstance(self.config, EncoderDecoderConfig):
            raise UserError("a model with an encoder continues no text: it fills blanks")
        check_prompts(self.config, [[0]])
        by_length = self.config.attention.position_rule.by_length
        self._prefix = first.reads_prefix
        at_once = by_length or self._prefix
        self._runner = PageRunner(self.config, first.forward.layout, settings, at_once)
        self._draft = None if draft is None else DraftModel(draft, first, settings)
        self._book = PageBook(settings.pages)
        keeps = settings.prefix_cache and not at_once
        pages = self._book, settings.page, keeps
        # A text whose positions depend on its length is never read twice.
        self._pages = RequestPages(*pages, to_the_end=by_length, counts=self.counts)
        self._queue = SharedQueue(settings.queue) if queue is None else queue
        self._cancelled: set[int] = set()
        self._reading: deque[ActiveRequest] = deque()
        self._writing: list[ActiveRequest] = []
        self._open: dict[ServedWeights, OpenStep] = {}
        self._number = self._queue.join(self.wake, self.full)

    # Any thread.

    @property
    def models(self) -> list[str]:
        """Names of the weights; the first are the model's own."""
        return list(self._weights)

    def set_weights(self, name: str, weights: ServedWeights) -> None:
        """Puts weights under a name; answers that are being written go on with what they began."""
        with self._change:
            self._weights[name] = weights

    def submit(self, request: TokenRequest, answer: Answer) -> int:
        """Puts a request into the queue, and returns its number, by which it is cancelled.

        Raises:
          UserError: the model cannot continue the prompt, or has no such tokens or weights.
          QueueFull: too many requests wait.
        """
        config, capacity, length = self.config, self._runner.capacity, len(request.tokens)
        check_request(request, config, capacity, self._prefix)
        most = min(room(config, length, request.max_tokens), capacity + 1 - length)
        budget, size = max(most, 0), config.vocab_size
        weights = self._weights.get(request.model)
        if weights is None:
            known = ", ".join(self._weights)
            raise UnknownModel(f"there is no model {request.model!r}, only {known}")

        def make(number: int) -> ActiveRequest:
            return ActiveRequest(number, request, answer, weights, budget, size)

        try:
            return self._queue.push(request.client, make, self._number)
        except QueueFull:
            self.counts["refused"] += 1
            raise

    def cancel(self, number: int) -> None:
        """Ends a request, wherever it is; one that has ended stays as it is."""
        with self._change:
            self._cancelled.add(number)
            self._change.notify()

    def full(self) -> bool:
        """Returns whether all slots are taken."""
        return len(self._reading) + len(self._writing) >= self.settings.slots

    def load(self) -> EngineLoad:
        """The state at this moment."""
        with self._change:
            waiting, active = self._queue.waiting(self._number), (self._reading, self._writing)
            pages = self._book.held, self._book.known, self._book.pages
            return EngineLoad(waiting, *map(len, active), *pages)

    def known_tokens(self, request: TokenRequest) -> int:
        """Tokens at the beginning of a prompt whose pages are known at this moment."""
        weights, page = self._weights.get(request.model), self.settings.page
        if weights is None or not self._pages.keeps_beginnings:
            return 0
        return page * self._book.known_beginning(page_keys(weights.salt, request.tokens, page))

    # The engine's thread.

    def step(self) -> bool:
        """Does the next piece of work; returns whether there was any."""
        self._drop_cancelled()
        self._admit()
        worked = super().step()
        worked |= self._read()
        for weights in dict.fromkeys([*self._open, *(one.weights for one in self._writing)]):
            worked |= self._write(weights)
        return worked

    def end(self) -> None:
        """See `Worker.end`."""
        waiting = self._queue.remove(lambda one: True)
        for one in [*waiting, *self._reading, *self._writing]:
            self._finish(one, "error", STOPS)
        super().end()

    def idle(self) -> bool:
        """See `Worker.idle`."""
        return super().idle() and not (self._queue.offers(self._number) or self._cancelled)

    def _drop_cancelled(self) -> None:
        """Ends what was cancelled, and what has waited for too long."""
        with self._change:
            cancelled, self._cancelled = self._cancelled, set()
        latest = time.monotonic() - self.settings.queue_seconds
        gone = self._queue.remove(lambda one: one.number in cancelled or one.came < latest)
        for one in gone:
            if one.number in cancelled:
                self._finish(one, "cancelled")
            else:
                self._finish(one, "error", WAITED)
        for one in [*self._reading, *self._writing]:
            if one.number in cancelled:
                self._finish(one, "cancelled")

    def _admit(self) -> None:
        """Gives free slots to those whose turn it is."""
        with self._change:
            while not self.full() and (one := self._queue.pop(self._number)) is not None:
                one.weights, one.began = self._weights[one.request.model], time.monotonic()
                self._reading.append(one)
        if self._queue.waiting(self._number):  # others may have room
            self._queue.wake()

    def _read(self) -> bool:
        """Reads the next chunk of the oldest unread text; returns whether there was one.

        Short texts that came after it are read with it, as many as a chunk has room for.
        """
        if not self._reading:
            return False
        if self._reading[0].late(self.settings.answer_seconds):
            self._finish(self._reading[0], "length")
            return True
        group = self._pages.next_to_read(self._reading, self._runner.fits)
        if not group:
            return False
        scores = group[0].scores_prompt
        chunks = [one.tokens[one.cached : one.cached + self._runner.chunk] for one in group]
        logits = self._runner.extend(group, chunks, every=scores, prefix=self._prefix)
        if self._draft is not None:
            self._draft.read(group, chunks)
        if scores:
            score_prompt(group[0], logits[0], chunks[0])
            logits = logits[:, len(chunks[0]) - 1]
        for one, chunk in zip(group, chunks):
            self._pages.extended(one, len(chunk))
            self.counts["read_tokens"] += len(chunk)
        if group[0].reading == 0:  # else it is alone
            self._begin_to_write(group, logits)
        return True

    def _begin_to_write(self, group: Sequence[ActiveRequest], logits: jax.Array) -> None:
        """Gives texts that are read their first tokens; the logits' first rows are theirs."""
        tokens = choose_next(logits, group)
        for one, token in zip(group, tokens):
            self._reading.remove(one)
            self._writing.append(one)
            if not one.prompt_told:
                one.prompt_told = True
                one.answer.take_prompt(one.scored, one.matched)
            if one.budget == 0:
                self._finish(one, "length")
            else:
                self._take(one, token)

    def _write(self, weights: ServedWeights) -> bool:
        """Gives each answer of these weights its next tokens; returns whether there was any."""
        step = self._open.pop(weights, None)
        if step is None:
            guesses = self._with_room(weights)
            if not guesses:
                return False
            self.counts["steps"] += 1
            group = list(guesses)
            if any(guesses.values()):
                self._write_guessed(group, list(guesses.values()))
                return True
            logits = self._runner.extend(group, [one.tokens[-1:] for one in group])
            step = OpenStep.of(logits, group)
        following = self._follow(step, weights)
        for one, length, token in zip(step.group, step.lengths, step.tokens()):
            # Who lost its pages in between has no use of it: its text is read again.
            if one in self._writing and len(one.tokens) == length:
                self._pages.extended(one, 1)
                self._take(one, token)
        if following is not None:
            self._open[weights] = following
        return True

    def _with_room(self, weights: ServedWeights) -> dict[ActiveRequest, list[int]]:
        """Answers of these weights that have room for their next tokens, and guesses of them."""
        group = [one for one in self._writing if one.weights is weights]
        for one in group:
            if one.late(self.settings.answer_seconds):
                self._finish(one, "length")
        guesses = {one: self._guess(one) for one in group if one.pages}
        group = [one for one in guesses if self._grow(one, guesses)]
        guesses = {one: guesses[one] for one in group if one.pages}  # others may have taken them
        if self._draft is not None:  # until now they were there for their number
            guessed = [one for one in guesses if guesses[one]]
            counts = [len(guesses[one]) for one in guessed]
            guesses |= dict(zip(guessed, self._draft.guess(guessed, counts)))
        return guesses

    def _follow(self, step: OpenStep, weights: ServedWeights) -> OpenStep | None:
        """Begins the step after one whose tokens are still on the devices: so they never wait.

        An answer that ends meanwhile has no use of it, and no harm: what the step writes into its
        pages lies behind all that is known of them, and whoever gets them writes later.

        Returns:
          None where the next step is to be another one: it depends on the tokens, is for other
          answers, has no room, or a text is to be read before.
        """
        group = step.group
        if self._reading or self.settings.guesses or self._draft is not None:
            return None
        if group != [one for one in self._writing if one.weights is weights]:
            return None
        if step.lengths != [len(one.tokens) for one in group]:  # lost its pages, and has new ones
            return None
        for one in group:
            ends = one.written + 1 >= one.budget or one.late(self.settings.answer_seconds)
            if ends or one.request.adjusted:
                return None
        if not all(self._pages.make_room(one, 2) for one in group):
            return None
        self.counts["steps"] += 1
        logits = self._runner.extend(group, step.chosen.tokens, shift=1)
        return OpenStep.of(logits, group, ahead=1)

    def _write_guessed(self, group: Sequence[ActiveRequest], guesses: Sequence[list[int]]) -> None:
        """A step of which some answers may get several tokens."""
        tokens = [[*one.tokens[-1:], *guess] for one, guess in zip(group, guesses)]
        columns = self.settings.guesses + 1
        logits = self._runner.extend(group, tokens, columns, every=True)
        chosen, scores = (np.asarray(a).tolist() for a in greedy_tokens(logits))
        next_ones: list[ScoredToken | None] = [None] * len(group)
        if not all(one.request.guessable for one in group):
            next_ones = choose_next(logits[:, 0], group)
        for row, (one, guess) in enumerate(zip(group, guesses)):
            if not one.request.guessable:
                self._pages.extended(one, 1)
                self._take(one, next_ones[row])
                continue
            right = accepted(guess, chosen[row])
            self.counts["guessed"] += len(guess)
            self.counts["guessed_right"] += right
            for token, score in zip(chosen[row][: right + 1], scores[row]):
                self._pages.extended(one, 1)
                self._take(one, ScoredToken(token, score))
                if not one.pages:
                    break

    def _guess(self, one: ActiveRequest) -> list[int]:
        """Tokens that the answer may go on with; they leave room for one more.

        Of a smaller model's guess only the number is known, as it needs room in the cache.
        """
        count = min(self.settings.guesses, one.budget - one.written - 1)
        count = min(count, self._runner.capacity - len(one.tokens))
        if count < 1 or not one.request.guessable:
            return []
        return [0] * count if self._draft is not None else repeated(one.tokens, count)

    def _grow(self, one: ActiveRequest, guesses: dict[ActiveRequest, list[int]]) -> bool:
        """Gives an answer room for its next tokens, if need be that of the newest request.

        Returns:
          Whether it has it.
        """
        if not one.pages:
            return False
        if self._pages.make_room(one, 1 + len(guesses[one])):
            return True
        guesses[one] = []
        while not self._pages.make_room(one, 1):
            newest = max(
                (other for other in [*self._writing, *self._reading] if other.pages),
                key=lambda other: other.number,
            )
            self._suspend(newest)
            if newest is one:
                return False
        return True

    def _suspend(self, one: ActiveRequest) -> None:
        """Takes a request's pages; its text is read again once there are pages for it."""
        self.counts["suspended"] += 1
        self._book.release(one.forget_pages())
        if one in self._writing:
            self._writing.remove(one)
            self._reading.appendleft(one)

    def _take(self, one: ActiveRequest, token: ScoredToken) -> None:
        """Adds a token to an answer, and ends it where it ends."""
        if math.isnan(token.log_probability):
            error = "the model gives no probabilities (NaN): its parameters hold what is no number"
            self._finish(one, "error", error)
        elif token.token in one.request.stop_tokens:
            self._finish(one, "stop")
        else:
            self.counts["written_tokens"] += 1
            one.append(token.token)
            if not one.answer.take(token):
                self._finish(one, "stop")
            elif one.written >= one.budget:
                self._finish(one, "length")

    def _finish(self, one: ActiveRequest, reason: FinishReason, error: str = "") -> None:
        """Ends a request: its slot and pages are free."""
        self._book.release(one.forget_pages())
        for group in (self._reading, self._writing):
            if one in group:
                group.remove(one)
        self.counts[f"finished_{reason}"] += 1
        one.answer.finish(reason, error)
