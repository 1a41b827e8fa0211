"""Log-likelihoods of texts under a model, as EleutherAI's lm-evaluation-harness defines them.

What it computes once: a context with several continuations, what many contexts begin with (a prompt
with examples), and a request that is made twice. A number does not depend on the other requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from lmjax.config import UserError
from lmjax.evaluation.boundary import TokenPair, beginning_of, token_pairs
from lmjax.evaluation.likelihood_program import LikelihoodProgram
from lmjax.evaluation.requests import ContinuationRequest, Likelihood, RollingRequest
from lmjax.evaluation.row_sums import Note, RowSums, put_whole
from lmjax.evaluation.scoring_plan import (
    Family,
    cache_length,
    cut_in_batches,
    families_of,
    grouped,
    padded_length,
    right_padded,
    rows_of,
    shared_prefixes,
)
from lmjax.generation.generator import require_numbers
from lmjax.generation.prompts import check_prompts
from lmjax.generation.text import TextGenerator
from lmjax.models import EncoderDecoderConfig, TransformerConfig
from lmjax.models.rotary import DynamicNTKScaling, DynamicScaling, LongRoPEScaling

SHORT = 4  # columns of the shortest continuations behind a cache
PARTS = 8  # between two powers of two, of longer ones: see `padded_length`
# Positions that go by the length of the whole text: a context alone has other ones.
BY_LENGTH = (DynamicNTKScaling, DynamicScaling, LongRoPEScaling)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A pair as the model can read it.

    Attributes:
      pair: its tokens.
      cut: how many the context lost on its left.
    """

    pair: TokenPair
    cut: int


class LikelihoodScorer:
    """Scores texts with a model that continues them. A mesh must be set, that of the model."""

    def __init__(
        self,
        text: TextGenerator,
        batch_size: int = 32,
        begin: int | None = None,
        share: bool = True,
    ):
        """
        Args:
          text: the model and its tokenizer.
          batch_size: most rows that are run at once; long ones are fewer.
          begin: token that begins a text where the tokenizer puts none before it; see
            `beginning_of`.
          share: compute what requests have in common once.

        Raises:
          UserError: a model that does not continue texts, or no rows.
        """
        self.text, self.batch_size = text, batch_size
        self.generator = text.generator
        self.config: TransformerConfig = self.generator.config
        check_causal(self.config)
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: must be at least 1")
        self.beginning = beginning_of(text.tokenizer, begin)
        self.share = share and not isinstance(
            getattr(self.config.attention.position_rule, "scaling", None), BY_LENGTH
        )
        self.program = LikelihoodProgram(self.generator.decoder)

    def continuations(
        self, requests: Sequence[ContinuationRequest], note: Note | None = None
    ) -> list[Likelihood]:
        """Answers to requests; `note` is told each one as soon as it is there.

        Raises:
          UserError: a continuation that makes no token, or more than the model reads; the model
            gives no numbers.
        """
        pairs = token_pairs(self.text.tokenizer, requests, self.beginning)
        return self.score([self._fitted(*given) for given in zip(pairs, requests)], note)

    def rolling(
        self, requests: Sequence[RollingRequest], note: Note | None = None
    ) -> list[Likelihood]:
        """Answers to requests: of each text all tokens are scored once, in windows.

        A window has as many tokens as the model reads. The first token is scored behind what begins
        a text, those of each further window behind at least one token of the window before.

        Raises:
          UserError: a text without a token; the model gives no numbers.
        """
        encoded = self.text.tokenizer.encode_batch([request.text for request in requests])
        windows: list[Fitted] = []
        owners: list[int] = []
        for number, tokens in enumerate(encoded):
            if not tokens:
                raise UserError(f"the text {requests[number].text[:40]!r} has no token to score")
            most, stride = self.config.max_length, requests[number].stride
            found = list(rolling_windows(tokens, self.beginning, most, stride))
            windows += [Fitted(pair, 0) for pair in found]
            owners += [number] * len(found)
        sums = RowSums(owners, [0] * len(requests), note)
        self.score(windows, lambda number, one: sums.add(number, *one[:3]))
        return sums.answers

    def score(self, fitted: Sequence[Fitted], note: Note | None = None) -> list[Likelihood]:
        """Answers of pairs of tokens; see `continuations`."""
        answers: list[Likelihood | None] = [None] * len(fitted)
        for numbers, log_probability, is_greedy in self._scored([one.pair for one in fitted]):
            for number in numbers:
                one = fitted[number]
                count = len(one.pair.continuation)
                answers[number] = Likelihood(log_probability, is_greedy, count, one.cut)
                if note is not None:
                    note(number, answers[number])
        return answers

    def _fitted(self, pair: TokenPair, request: ContinuationRequest) -> Fitted:
        """The pair, cut on the left of its context; the last token is not read, only scored."""
        check_known_tokens([*pair.context, *pair.continuation], self.config.vocab_size)
        most = self.config.max_length
        cut = 0 if most is None else max(0, len(pair.context) + len(pair.continuation) - most - 1)
        if cut >= len(pair.context):
            raise UserError(
                f"the continuation {request.continuation[:60]!r} has {len(pair.continuation)} "
                f"tokens, more than the {most} that the model reads: it cannot be scored"
            )
        return Fitted(TokenPair(pair.context[cut:], pair.continuation), cut)

    def _scored(self, pairs: Sequence[TokenPair]) -> Iterator[tuple[list[int], float, bool]]:
        """Yields numbers of equal pairs, log-probability of their continuation, if it is greedy."""
        families = families_of(pairs)
        if not self.share:
            yield from self._whole(families)
            return
        for length, part in shared_prefixes(families):
            alone = [] if length else [one for one in part if _is_row(one)]
            yield from self._whole(alone)
            kept = {id(one) for one in alone}
            yield from self._shared([one for one in part if id(one) not in kept], length)

    def _whole(self, families: Sequence[Family]) -> Iterator[tuple[list[int], float, bool]]:
        """Runs a row for each continuation, its context in front."""
        found = [(one.context, *pair) for one in families for pair in one.continuations.items()]
        rows = [(*context, *continuation[:-1]) for context, continuation, _ in found]
        for part, columns in cut_in_batches(list(map(len, rows)), self.batch_size):
            batch = right_padded(
                [rows[n] for n in part], rows_of(self.batch_size, columns), columns
            )
            firsts = [len(found[n][0]) - 1 for n in part]
            wanted = [found[n][1] for n in part]
            given = self._put(batch), *self._scored_at(firsts, wanted, columns)
            values = self.program.whole(self.generator.weights, *given)
            yield from self._answers([found[n][1:] for n in part], values)

    def _shared(
        self, families: Sequence[Family], length: int
    ) -> Iterator[tuple[list[int], float, bool]]:
        """Runs each context once, behind what all of them begin with.

        Args:
          families: contexts with their continuations.
          length: number of tokens that all of them begin with.
        """
        if not families:
            return
        prefix, weights = None, self.generator.weights
        if length:
            text = families[0].context[:length]
            room = length + max(len(one.context) - length for one in families)
            batch = right_padded([text], 1, padded_length(length))
            prefix = self.program.prefix(weights, self._put(batch), length=cache_length(room))
        lengths = [len(one.context) - length for one in families]
        for part, columns in cut_in_batches(lengths, self.batch_size):
            some = [families[n] for n in part]
            rows = rows_of(self.batch_size, columns)
            texts = [one.context[length:] for one in some]
            firsts = [[tokens[0] for tokens in one.continuations] for one in some]
            choices = padded_length(max(map(len, firsts)))
            targets = np.zeros((rows, choices), np.int32)
            for row, tokens in enumerate(firsts):
                targets[row, : len(tokens)] = tokens
            batch = self._put(right_padded(texts, rows, columns, length))
            settings = {"length": cache_length(columns), "rows": rows}
            found, best, cache = self.program.contexts(
                weights, batch, put_whole(targets), prefix, **settings
            )
            yield from self._behind(some, np.asarray(found), np.asarray(best), cache)

    def _behind(
        self, families: Sequence[Family], found, best, cache
    ) -> Iterator[tuple[list[int], float, bool]]:
        """Scores what follows the first tokens of continuations, behind the cached contexts."""
        require_numbers(found[: len(families)])
        longer = []
        for row, family in enumerate(families):
            for choice, (tokens, numbers) in enumerate(family.continuations.items()):
                value, is_greedy = float(found[row, choice]), bool(best[row] == tokens[0])
                if len(tokens) == 1:
                    yield numbers, value, is_greedy
                else:
                    longer.append((row, tokens, numbers, value, is_greedy))
        lengths = [len(one[1]) - 1 for one in longer]
        for part, columns in cut_in_batches(lengths, self.batch_size, SHORT, PARTS):
            some = [longer[n] for n in part]
            rows = rows_of(self.batch_size, columns)
            owners = np.zeros(rows, np.int32)
            owners[: len(some)] = [one[0] for one in some]
            starts = [len(families[one[0]].context) for one in some]
            batch = right_padded([one[1][:-1] for one in some], rows, columns, starts)
            wanted = [one[1][1:] for one in some]
            given = self._scored_at([0] * len(some), wanted, columns)
            values = self.program.behind(
                self.generator.weights, cache, put_whole(owners), self._put(batch), *given
            )
            rest = self._answers([(one[1][1:], one[2]) for one in some], values)
            for one, (numbers, value, is_greedy) in zip(some, rest, strict=True):
                yield numbers, one[3] + value, one[4] and is_greedy

    def _scored_at(
        self, firsts: Sequence[int], wanted: Sequence[Sequence[int]], columns: int
    ) -> tuple[jax.Array, jax.Array]:
        """Positions of a batch that are scored, with their tokens; see `LikelihoodProgram.behind`.

        Args:
          firsts: column before the first scored token of each row.
          wanted: tokens of each row.
          columns: of the batch.
        """
        at = [
            row * columns + first + n
            for row, (first, tokens) in enumerate(zip(firsts, wanted, strict=True))
            for n in range(len(tokens))
        ]
        tokens = [token for row in wanted for token in row]
        size = self.config.vocab_size
        return tuple(put_whole(grouped(numbers, size)) for numbers in (at, tokens))

    def _answers(
        self, rows: Sequence[tuple[Sequence[int], list[int]]], values: tuple[jax.Array, jax.Array]
    ) -> Iterator[tuple[list[int], float, bool]]:
        """Yields the numbers of each row, the sum of its log-probabilities, and if it is greedy."""
        found, best = (np.asarray(array).ravel() for array in values)
        start = 0
        for tokens, numbers in rows:
            part = slice(start, start + len(tokens))
            require_numbers(found[part])
            total = float(np.sum(found[part], dtype=np.float64))
            yield numbers, total, bool((best[part] == np.array(tokens)).all())
            start += len(tokens)

    def _put(self, batch):
        return self.generator.put_on_devices(batch)


def check_causal(config: TransformerConfig) -> None:
    """Raises UserError for a model whose texts are not scored from the left to the right."""
    if isinstance(config, EncoderDecoderConfig):
        raise UserError("this model has an encoder: its texts are not scored from left to right")
    check_prompts(config, [])


def check_known_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Raises UserError for tokens that the model does not have."""
    highest = max(tokens)
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer gives the token {highest}; the model's are 0 to {vocab_size - 1}"
        )


def rolling_windows(
    tokens: Sequence[int],
    beginning: Sequence[int],
    longest: int | None,
    stride: int | None = None,
) -> Iterator[TokenPair]:
    """Yields windows in which each token is scored once, behind at least one other.

    Args:
      tokens: of a text.
      beginning: tokens before it.
      longest: most tokens of a window that the model reads; None: no limit.
      stride: tokens that a further window scores, behind those that there is room for; None: as
        many as it reads.
    """
    if longest is None:
        yield TokenPair(tuple(beginning), tuple(tokens))
        return
    beginning = tuple(beginning)[-longest:]
    done = min(len(tokens), longest + 1 - len(beginning))
    yield TokenPair(beginning, tuple(tokens[:done]))
    while done < len(tokens):
        end = min(len(tokens), done + min(longest, stride or longest))
        yield TokenPair(tuple(tokens[max(0, end - longest - 1) : done]), tuple(tokens[done:end]))
        done = end


def _is_row(family: Family) -> bool:
    """Returns whether a context has one continuation, so that nothing is shared."""
    return len(family.continuations) == 1 and family.longest > 1
