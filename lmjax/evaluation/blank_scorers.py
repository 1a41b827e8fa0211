"""Log-likelihoods of whole rows: models that fill blanks (GLM, T5, BERT), and prefix models.

Each reads the context in its own way, so that none of it is cached between requests.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lmjax.config import UserError
from lmjax.data.tokenizers import Tokenizer
from lmjax.evaluation.boundary import TokenPair, beginning_of, token_pairs
from lmjax.evaluation.likelihood import LikelihoodScorer, check_known_tokens, rolling_windows
from lmjax.evaluation.likelihood_program import LikelihoodProgram
from lmjax.evaluation.requests import ContinuationRequest, Likelihood, RollingRequest
from lmjax.evaluation.row_sums import Note, RowSums, put_whole
from lmjax.evaluation.scoring_plan import grouped, padded_length, rows_of
from lmjax.generation.fill import (
    AutoregressiveInfiller,
    BlankInfiller,
    Infiller,
    MaskedTokenInfiller,
    SentinelInfiller,
    token,
)
from lmjax.generation.generator import require_numbers
from lmjax.generation.prompts import Prompt, left_padded, prefix_row, tokens_of
from lmjax.generation.text import TextGenerator


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


class RowBatch(NamedTuple):
    """Rows that are run together.

    Attributes:
      numbers: of the rows.
      size: rows of the batch; those that lack are padding.
      columns: of the batch.
      source_columns: of what the encoder reads; 0 without one.
    """

    numbers: list[int]
    size: int
    columns: int
    source_columns: int


def batches_of(rows: Sequence[ScoredRow], batch_size: int) -> Iterator[RowBatch]:
    """Yields batches of rows of nearly one length, long ones of fewer rows; see `rows_of`.

    The encoder's texts are the longer ones, so that rows are ordered by them first.
    """
    lengths = [len(tokens_of(one.row)) for one in rows]
    sources = [0 if one.source is None else padded_length(len(one.source)) for one in rows]
    order = sorted(range(len(rows)), key=lambda n: (-sources[n], -lengths[n]))
    first = 0
    while first < len(order):
        size = rows_of(batch_size, sources[order[first]])
        longest = padded_length(max(lengths[n] for n in order[first : first + size]))
        size = min(size, rows_of(batch_size, longest))
        numbers = order[first : first + size]
        columns = padded_length(max(lengths[n] for n in numbers))
        yield RowBatch(numbers, size, columns, sources[numbers[0]])
        first += size


class BlankScorer(abc.ABC):
    """Base: every continuation makes rows, and its score is the sum of what they score."""

    def __init__(self, text: TextGenerator, batch_size: int = 32, begin: int | None = None):
        """See `LikelihoodScorer`."""
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: must be at least 1")
        self.text, self.batch_size = text, batch_size
        self.generator, self.tokenizer = text.generator, text.tokenizer
        self.longest = self.generator.config.max_length
        self.beginning = beginning_of(text.tokenizer, begin)
        self.program = LikelihoodProgram(self.generator.decoder)

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
        pairs = zip(encoded, requests, strict=True)
        return self.score([self.windows(tokens, one.stride) for tokens, one in pairs], note)

    @abc.abstractmethod
    def windows(self, tokens: Sequence[int], stride: int | None = None) -> list[TokenPair]:
        """Parts of a text that are scored one by one; see `rolling_windows`.

        UserError: the model scores none.
        """

    def score(
        self, texts: Sequence[Sequence[TokenPair]], note: Note | None = None
    ) -> list[Likelihood]:
        """Answers of texts, each from those of its parts; `note` is told each at once."""
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
        sums = RowSums(owners, cuts, note)
        for number, values, right in self._scored(rows):
            total = float(values.sum(dtype=np.float64))
            sums.add(number, total, bool(right.all()), len(values))
        return sums.answers

    def _scored(self, rows: Sequence[ScoredRow]):
        """Yields the number of each row, its log-probabilities, and which tokens are likeliest."""
        for part, size, columns, source_columns in batches_of(rows, self.batch_size):
            some = [rows[n] for n in part]
            padded = some + [some[-1]] * (size - len(some))
            batch = left_padded([one.row for one in padded], columns)
            if source_columns:
                sources = left_padded([one.source for one in padded], source_columns)
                batch = dataclasses.replace(batch, encoder=sources)
            at, targets = [], []
            for line, one in enumerate(some):
                start = (line + 1) * columns - len(tokens_of(one.row)) + one.first
                at += range(start, start + len(one.targets))
                targets += one.targets
            words = self.generator.config.vocab_size
            given = (put_whole(grouped(values, words)) for values in (at, targets))
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

    def _rest(self, context: Sequence[int], continuation: tuple[int, ...]) -> ScoredRow:
        """The continuation as what fills the blank of the context's rest."""
        filling: AutoregressiveInfiller = self.text.filling
        blanked = filling.before_rest(self.tokenizer, context)
        row, source = filling.prompt(self.tokenizer, blanked, [continuation[:-1]])
        first = len(tokens_of(row)) - len(continuation)
        return ScoredRow(row, first, continuation, None if source is None else tuple(source))

    def _cut(self, pair: TokenPair, more: int) -> tuple[tuple[int, ...], int]:
        """The context's right end that fits beside the continuation and `more` tokens."""
        if self.longest is None:
            return pair.context, 0
        room = self.longest - more - len(pair.continuation)
        if room < 1:
            raise _too_long(pair, self.longest)
        return pair.context[-room:], max(0, len(pair.context) - room)


class GLMScorer(BlankScorer):
    """GLM: the continuation fills the blank that stands for the rest of its context.

    The context is seen from both sides (Du et al. 2021, arXiv:2103.10360, section 3.3).
    """

    def rows(self, pair: TokenPair) -> tuple[list[ScoredRow], int]:
        """See `BlankScorer.rows`."""
        head, cut = self._cut(pair, 1)
        return [self._rest(head, pair.continuation)], cut

    def windows(self, tokens: Sequence[int], stride: int | None = None) -> list[TokenPair]:
        """See `BlankScorer.windows`: a window is a blank behind the end of the one before."""
        most = self.longest  # of context, blank and continuation
        if most is not None:
            most = (most - 1) // 2 if stride is None else most - 2
        return list(rolling_windows(tokens, self.beginning, most, stride))


class PrefixScorer(BlankScorer):
    """A prefix language model: the context's tokens see each other both ways, as in training.

    (Raffel et al. 2020, arXiv:1910.10683, section 3.2.1.)
    """

    def rows(self, pair: TokenPair) -> tuple[list[ScoredRow], int]:
        """See `BlankScorer.rows`: the last token is not read, only scored."""
        head, cut = self._cut(pair, -1)
        row = prefix_row(head, pair.continuation[:-1])
        return [ScoredRow(row, len(head) - 1, pair.continuation)], cut

    def windows(self, tokens: Sequence[int], stride: int | None = None) -> list[TokenPair]:
        """See `BlankScorer.windows`: a window is continued behind the end of the one before."""
        return list(rolling_windows(tokens, self.beginning, self.longest, stride))


class T5Scorer(BlankScorer):
    """T5: the decoder writes the continuation into the sentinel that ends the encoder's text.

    A model that learned to reply has no sentinel: it replies to the context.
    """

    def rows(self, pair: TokenPair) -> tuple[list[ScoredRow], int]:
        """See `BlankScorer.rows`."""
        context = tuple(t for t in pair.context if t != self.tokenizer.end)
        most = self.longest
        if most is not None and len(pair.continuation) >= most:
            raise _too_long(pair, most)
        cut = 0 if self.longest is None else max(0, len(context) - self.longest + 2)
        return [self._rest(context[cut:], pair.continuation)], cut

    def windows(self, tokens: Sequence[int], stride: int | None = None) -> list[TokenPair]:
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

    def windows(self, tokens: Sequence[int], stride: int | None = None) -> list[TokenPair]:
        """See `BlankScorer.windows`: the text whole, which must fit."""
        return [TokenPair((), tuple(tokens))]


def _too_long(pair: TokenPair, most: int) -> UserError:
    return UserError(
        f"a continuation of {len(pair.continuation)} tokens does not fit into the {most} tokens "
        "that the model reads"
    )


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
    """The way to score texts with a model: by what it learned to fill or read, or left to right.

    Raises:
      UserError: a model that does neither.
    """
    kinds = {BlankInfiller: GLMScorer, SentinelInfiller: T5Scorer, MaskedTokenInfiller: BERTScorer}
    for filling, scorer in kinds.items():
        if isinstance(text.filling, filling):
            return scorer(text, batch_size, begin)
    if text.reads_prefix:
        return PrefixScorer(text, batch_size, begin)
    return LikelihoodScorer(text, batch_size, begin)
