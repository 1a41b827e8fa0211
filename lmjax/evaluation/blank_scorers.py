"""Log-likelihoods under models that fill blanks: GLM, T5 and BERT, each in its own way."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lmjax.config import UserError
from lmjax.data.tokenizers import Tokenizer
from lmjax.evaluation.boundary import TokenPair, beginning_of, token_pairs
from lmjax.evaluation.likelihood import (
    GROUP,
    LikelihoodScorer,
    Note,
    check_known_tokens,
    rolling_windows,
)
from lmjax.evaluation.likelihood_program import LikelihoodProgram
from lmjax.evaluation.requests import ContinuationRequest, Likelihood, RollingRequest
from lmjax.evaluation.scoring_plan import cut_in_batches, grouped
from lmjax.generation.decoder import Decoder
from lmjax.generation.fill import (
    BlankInfiller,
    Infiller,
    MaskedTokenInfiller,
    SentinelInfiller,
    token,
)
from lmjax.generation.generator import require_numbers
from lmjax.generation.prompts import Prompt, prompt_batch, tokens_of
from lmjax.generation.text import TextGenerator
from lmjax.models import blank_row


class ScoredRow(NamedTuple):
    """A row of a batch and what is scored in it.

    Attributes:
      row: as the model, or its decoder, reads it.
      first: column before the first scored token, or of it where it is hidden.
      targets: scored tokens, one a column from there.
      source: what the encoder reads; None without one.
    """

    row: Prompt
    first: int
    targets: tuple[int, ...]
    source: tuple[int, ...] | None = None


class BlankScorer(abc.ABC):
    """Base: every continuation makes rows, and its score is the sum of what they score."""

    def __init__(self, text: TextGenerator, batch_size: int = 32, begin: int | None = None):
        """See `LikelihoodScorer`."""
        self.text, self.batch_size = text, batch_size
        self.generator, self.tokenizer = text.generator, text.tokenizer
        self.longest = self.generator.config.max_length
        self.beginning = beginning_of(text.tokenizer, begin)
        self.program = LikelihoodProgram(Decoder(self.generator.config, self.generator.layout))

    @abc.abstractmethod
    def rows(self, pair: TokenPair) -> tuple[list[ScoredRow], int]:
        """Rows of a pair, and how many tokens its context lost on the left.

        Raises:
          UserError: it does not fit into the model's context.
        """

    def continuations(
        self, requests: Sequence[ContinuationRequest], note: Note | None = None
    ) -> list[Likelihood]:
        """See `LikelihoodScorer.continuations`."""
        pairs = token_pairs(self.tokenizer, requests, self.beginning)
        return self.score([[pair] for pair in pairs], note)

    def rolling(
        self, requests: Sequence[RollingRequest], note: Note | None = None
    ) -> list[Likelihood]:
        """See `LikelihoodScorer.rolling`."""
        encoded = self.tokenizer.encode_batch([request.text for request in requests])
        for request, tokens in zip(requests, encoded, strict=True):
            if not tokens:
                raise UserError(f"the text {request.text[:40]!r} has no token to score")
        return self.score([self.windows(tokens) for tokens in encoded], note)

    @abc.abstractmethod
    def windows(self, tokens: Sequence[int]) -> list[TokenPair]:
        """Parts of a text that are scored one by one. UserError: the model scores none."""

    def score(
        self, texts: Sequence[Sequence[TokenPair]], note: Note | None = None
    ) -> list[Likelihood]:
        """Answers of texts, each from those of its parts."""
        rows: list[ScoredRow] = []
        owners, cuts = [], [0] * len(texts)
        for number, pairs in enumerate(texts):
            for pair in pairs:
                check_known_tokens(
                    [*pair.context, *pair.continuation], self.generator.config.vocab_size
                )
                found, cut = self.rows(pair)
                rows += found
                owners += [number] * len(found)
                cuts[number] += cut
        sums, greedy = np.zeros(len(texts)), np.ones(len(texts), bool)
        counts = np.zeros(len(texts), int)
        for number, values, right in self._scored(rows):
            sums[owners[number]] += values.sum(dtype=np.float64)
            greedy[owners[number]] &= right.all()
            counts[owners[number]] += len(values)
        answers = []
        for number, values in enumerate(zip(sums.tolist(), greedy.tolist(), counts.tolist(), cuts)):
            answers.append(Likelihood(*values))
            if note is not None:
                note(number, answers[-1])
        return answers

    def _scored(self, rows: Sequence[ScoredRow]):
        """Yields the number of each row, its log-probabilities, and which tokens are likeliest."""
        for part, _ in cut_in_batches([len(tokens_of(one.row)) for one in rows], self.batch_size):
            some = [rows[n] for n in part]
            padded = some + [some[-1]] * (self.batch_size - len(some))
            sources = None if some[0].source is None else [one.source for one in padded]
            batch = prompt_batch([one.row for one in padded], sources)
            columns = batch.tokens.shape[1]
            at, targets = [], []
            for line, one in enumerate(some):
                start = (line + 1) * columns - len(tokens_of(one.row)) + one.first
                at += range(start, start + len(one.targets))
                targets += one.targets
            given = (self._put_whole(grouped(values, GROUP)) for values in (at, targets))
            found = self.program.whole(
                self.generator.weights, self.generator.put_on_devices(batch), *given
            )
            values, best = (np.asarray(array).ravel() for array in found)
            require_numbers(values[: len(targets)])
            start = 0
            for number, one in zip(part, some, strict=True):
                own = slice(start, start + len(one.targets))
                yield number, values[own], best[own] == np.array(one.targets)
                start += len(one.targets)

    def _put_whole(self, array: np.ndarray) -> jax.Array:
        mesh = jax.sharding.get_mesh()
        return jax.device_put(array, jax.NamedSharding(mesh, jax.sharding.PartitionSpec()))

    def _cut(self, pair: TokenPair, more: int) -> tuple[tuple[int, ...], int]:
        """The context's right end that fits beside the continuation and `more` tokens."""
        if self.longest is None:
            return pair.context, 0
        room = self.longest - more - len(pair.continuation)
        if room < 1:
            raise UserError(
                f"a continuation of {len(pair.continuation)} tokens does not fit into the "
                f"{self.longest} tokens that the model reads"
            )
        return pair.context[-room:], max(0, len(pair.context) - room)


class GLMScorer(BlankScorer):
    """GLM: the continuation fills the blank that stands for the rest of its context.

    The context is seen from both sides (Du et al. 2021, arXiv:2103.10360, section 3.3).
    """

    def rows(self, pair: TokenPair) -> tuple[list[ScoredRow], int]:
        """See `BlankScorer.rows`."""
        filling: BlankInfiller = self.text.filling
        known = self.tokenizer.special
        names = [n for n in (*filling.rest, *filling.masks) if n in known] or filling.masks[:1]
        mask, sop = token(self.tokenizer, names[0]), token(self.tokenizer, filling.sop)
        head, cut = self._cut(pair, 1)
        content = [sop, *pair.continuation[:-1]]
        row = blank_row([*head, mask], [(len(head), content)], names[0] in filling.run_on)
        return [ScoredRow(row, len(head) + 1, pair.continuation)], cut

    def windows(self, tokens: Sequence[int]) -> list[TokenPair]:
        """See `BlankScorer.windows`: a window is a blank behind the end of the one before."""
        most = None if self.longest is None else (self.longest - 1) // 2
        return list(rolling_windows(tokens, self.beginning, most))


class T5Scorer(BlankScorer):
    """T5: the decoder writes the continuation into the sentinel that ends the encoder's text.

    A model that learned to reply has no sentinel: it replies to the context.
    """

    def rows(self, pair: TokenPair) -> tuple[list[ScoredRow], int]:
        """See `BlankScorer.rows`."""
        filling: SentinelInfiller = self.text.filling
        sentinel = filling.sentinel.format(0)
        marks = () if filling.replies else (token(self.tokenizer, sentinel),)
        context = tuple(t for t in pair.context if t != self.tokenizer.end)
        kept = (
            context if self.longest is None else context[max(0, len(context) - self.longest + 2) :]
        )
        decoder = [token(self.tokenizer, filling.start), *marks, *pair.continuation[:-1]]
        source = (*kept, *marks, self.tokenizer.end)
        row = ScoredRow(decoder, len(marks), pair.continuation, source)
        return [row], len(context) - len(kept)

    def windows(self, tokens: Sequence[int]) -> list[TokenPair]:
        """See `BlankScorer.windows`: none."""
        raise UserError("a model with an encoder has no perplexity of whole texts: leave the task")


class BERTScorer(BlankScorer):
    """BERT: pseudo-log-likelihood, each token hidden by itself (Salazar et al. 2020).

    "Masked language model scoring", arXiv:1910.14659: not the probability of the text, but
    comparable between texts. All other tokens are seen on both sides.
    """

    def rows(self, pair: TokenPair) -> tuple[list[ScoredRow], int]:
        """See `BlankScorer.rows`."""
        filling: MaskedTokenInfiller = self.text.filling
        before, context, after = _framed(filling, self.tokenizer, pair.context)
        mask = token(self.tokenizer, filling.mask)
        plain = TokenPair(context, pair.continuation)
        head, cut = self._cut(plain, len(before) + len(after))
        whole = [*before, *head, *pair.continuation, *after]
        first = len(before) + len(head)
        found = []
        for number, wanted in enumerate(pair.continuation, first):
            hidden = [*whole[:number], mask, *whole[number + 1 :]]
            found.append(ScoredRow(hidden, number, (wanted,)))
        return found, cut

    def windows(self, tokens: Sequence[int]) -> list[TokenPair]:
        """See `BlankScorer.windows`: the text whole, which must fit."""
        return [TokenPair((), tuple(tokens))]


def _framed(
    filling: MaskedTokenInfiller, tokenizer: Tokenizer, context: Sequence[int]
) -> tuple[list[int], tuple[int, ...], list[int]]:
    """Tokens before a text, its context without them and the opening, and tokens behind it."""
    before, after = filling.frame(tokenizer, [filling.mask], "")
    frame = {*before, *after, *tokenizer.opening}  # it takes the opening's place
    return before, tuple(t for t in context if t not in frame), after


def tokens_read(pair: TokenPair, tokenizer: Tokenizer, filling: Infiller | None) -> int:
    """Number of tokens that a model reads at once to score a pair, its own markers included.

    Args:
      pair: context and continuation.
      tokenizer: of the model.
      filling: how it fills blanks; None: it continues texts.
    """
    size = len(pair.context) + len(pair.continuation)
    if isinstance(filling, BlankInfiller):
        return size + 1  # the blank and the start of its piece, without the last token
    if isinstance(filling, SentinelInfiller):
        context = sum(t != tokenizer.end for t in pair.context)
        return max(context + 2, len(pair.continuation) + 1)  # of the encoder, of the decoder
    if isinstance(filling, MaskedTokenInfiller):
        before, context, after = _framed(filling, tokenizer, pair.context)
        return len(before) + len(context) + len(pair.continuation) + len(after)
    return size - 1  # nothing follows the last token


def scorer_of(
    text: TextGenerator, batch_size: int = 32, begin: int | None = None
) -> LikelihoodScorer | BlankScorer:
    """The way to score texts with a model: by what it learned to fill, or from left to right.

    Raises:
      UserError: a model that does neither.
    """
    kinds = {BlankInfiller: GLMScorer, SentinelInfiller: T5Scorer, MaskedTokenInfiller: BERTScorer}
    for filling, scorer in kinds.items():
        if isinstance(text.filling, filling):
            return scorer(text, batch_size, begin)
    return LikelihoodScorer(text, batch_size, begin)
