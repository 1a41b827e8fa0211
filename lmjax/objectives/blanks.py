"""Blanks: parts of a text that a model fills in, words, sentences, or most of it."""

from __future__ import annotations

import abc
import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lmjax.config import UserError, config
from lmjax.objectives.draws import RandomStream
from lmjax.objectives.lexicon import TokenTable
from lmjax.objectives.rows import RowPiece

LONGEST = 39  # tokens of GLM's longest blank
ADDED = 2  # tokens that a blank adds to a text: its mask, and one that begins or ends its content
DEVIATIONS = 4  # how far above the mean number of blanks a row has room


class Cut(NamedTuple):
    """Spans that are cut out of a text.

    Attributes:
      spans: first and one past the last token of each blank, in the order of filling in.
      open: nothing marks the end of the one blank, since the text's own end follows from it.
    """

    spans: Int[np.ndarray, "blanks 2"]
    open: bool = False


@config
class Blanks(abc.ABC):
    """Base of the ways to choose blanks."""

    mask: str  # name of the token that stands for a blank

    @abc.abstractmethod
    def choose(self, piece: RowPiece, lexicon: TokenTable, draws: RandomStream) -> Cut:
        """Blanks of one text, without overlap; none where it has no room for one."""

    @abc.abstractmethod
    def text_length(self, length: int) -> int:
        """Tokens of text that nearly always have room in `length` together with what blanks add."""

    def fit(
        self, piece: RowPiece, room: int, lexicon: TokenTable, draws: RandomStream
    ) -> tuple[Int[np.ndarray, "text"], Cut]:
        """The beginning of a text that has room together with its blanks, and these.

        Blanks are left out where more are drawn than `text_length` leaves room for.
        """
        if len(piece.tokens) > (most := self.text_length(room)):
            piece = RowPiece(piece.tokens[:most], closed=False, documents=piece.documents)
        cut = self.choose(piece, lexicon, draws)
        number = (room - len(piece.tokens) + cut.open) // ADDED
        return piece.tokens, cut._replace(spans=cut.spans[: max(number, 0)])


@config
class TokenBlanks(Blanks):
    """Short blanks with text between them (GLM: Du et al. 2022, arXiv:2103.10360, section 2.1).

    Lengths are Poisson-distributed, never 0; they are drawn until the blanks hold the share of the
    text's tokens, rounded down, and placed at random with a token or more between two of them.
    Tokens that begin or end documents stay, so that no blank crosses them.
    """

    mask: str = "[MASK]"  # name of the token that stands for a blank
    share: float = 0.15  # of a document's tokens
    mean: float = 3.0  # of the Poisson distribution of lengths
    longest: int = LONGEST  # tokens of a blank
    whole_words: bool = False  # blanks, and the three settings above, count words, not tokens

    def validate(self) -> None:
        _check_share(self.share)
        if self.mean <= 0 or self.longest < 1:
            raise UserError(
                f"mean={self.mean}, longest={self.longest}: the mean length of blanks must be "
                "above 0, and the longest at least 1"
            )

    def choose(self, piece: RowPiece, lexicon: TokenTable, draws: RandomStream) -> Cut:
        """See `Blanks.choose`."""
        enough = (1 + ADDED) * len(piece.tokens)
        return self.fit(piece, enough, lexicon, draws)[1]

    def fit(
        self, piece: RowPiece, room: int, lexicon: TokenTable, draws: RandomStream
    ) -> tuple[Int[np.ndarray, "text"], Cut]:
        """The longest beginning of a text that has room together with its blanks, and these."""
        tokens, found = piece.tokens, [np.zeros((0, 2), np.int64)]
        for first, end in _texts(tokens, lexicon):
            edges = np.arange(first, end + 1)
            if self.whole_words:
                begins = lexicon.begins(tokens[first:end])
                edges = edges[np.append(begins, True)]
            size, blanks = self.spread(edges, room, draws)
            found.append(edges[blanks])
            room -= ADDED * len(blanks)
            if size < len(edges) - 1:
                tokens = tokens[: edges[size]]
                break
        spans = np.concatenate(found)
        return tokens[:room], Cut(spans[draws.order(len(spans))])

    def spread(
        self, edges: Int[np.ndarray, "edges"], room: int, draws: RandomStream
    ) -> tuple[int, Int[np.ndarray, "blanks 2"]]:
        """Blanks of one document's beginning, as long as it has room together with them.

        Args:
          edges: where in the text the document's tokens (or words) begin, and its end.
          room: tokens, of which what stands in the text before the document takes its part.
          draws: random numbers.

        Returns:
          How many tokens (or words) the beginning has, and its blanks, as numbers of these, in the
          order of the text.
        """
        sizes = np.arange(len(edges))
        wanted = (self.share * sizes).astype(np.int64)
        cumulative = np.cumsum(length_probabilities(self.mean, self.longest))
        lengths = 1 + draws.choices(cumulative, int(wanted[-1]))
        sums = np.cumsum(lengths)
        # How many of these blanks a beginning of each size has: until they hold its share, and
        # only as many as fit with a token between. Longer ones have as many or more.
        numbers = np.searchsorted(sums - lengths, wanted)
        fitting = np.searchsorted(sums + np.arange(len(sums)), sizes, side="right")
        numbers = np.minimum(numbers, fitting)
        size = max(0, int(np.searchsorted(edges + ADDED * numbers, room, side="right")) - 1)
        number = int(numbers[size])
        lengths = lengths[draws.order(number)]
        spare = size - int(lengths.sum()) - number + 1  # tokens that need not stand between two
        between = np.sort(draws.integers(0, spare, number))
        starts = between + np.cumsum(lengths + 1) - (lengths + 1)
        return size, np.stack([starts, starts + lengths], axis=1)

    def text_length(self, length: int) -> int:
        """Leaves room for four standard deviations more blanks than the mean, and one."""
        return _text_length(length, self.share, self.mean, self.longest)


@config
class SentenceBlanks(Blanks):
    """Whole sentences, in random order until they hold the share of the text's tokens or more.

    A sentence ends with . ? ! ; : their Chinese forms, an ellipsis or a line. One always stays.
    """

    mask: str = "[sMASK]"  # name of the token that stands for a blank
    share: float = 0.15  # of a sample's tokens

    def validate(self) -> None:
        _check_share(self.share)

    def choose(self, piece: RowPiece, lexicon: TokenTable, draws: RandomStream) -> Cut:
        """See `Blanks.choose`."""
        spans = []
        for first, end in _texts(piece.tokens, lexicon):
            ends = np.flatnonzero(lexicon.ends_sentence[piece.tokens[first:end]])
            edges = np.unique([0, *(ends + 1), end - first]) + first
            spans.append(np.stack([edges[:-1], edges[1:]], axis=1))
        sentences = np.concatenate([np.zeros((0, 2), np.int64), *spans])
        sentences = sentences[draws.order(len(sentences))]
        sizes = sentences[:, 1] - sentences[:, 0]
        taken = np.cumsum(sizes) - sizes < int(self.share * len(piece.tokens))
        return Cut(sentences[:-1][taken[:-1]])

    def text_length(self, length: int) -> int:
        """Leaves room for a blank of a sentence in 64 tokens, and one."""
        return max(2, length - 2 * (1 + length // 64))


@config
class DocumentBlank(Blanks):
    """One long blank: the rest of the text, or its middle.

    The rest needs no token that says where it ends, where the text has one at its end or goes on
    in the next row. A text of several documents always loses its rest.
    """

    mask: str = "[gMASK]"  # name of the token that stands for a blank
    shortest: float = 0.5  # share of the text that is cut out at the least; all but two at the most
    rest: float = 0.5  # how often it is the text's rest

    def validate(self) -> None:
        _check_share(self.shortest)
        if not 0 <= self.rest <= 1:
            raise UserError(f"rest={self.rest}: a probability lies between 0 and 1")

    def choose(self, piece: RowPiece, lexicon: TokenTable, draws: RandomStream) -> Cut:
        """See `Blanks.choose`."""
        size = len(piece.tokens)
        least = max(1, int(self.shortest * size))
        if size - 2 < least:
            return Cut(np.zeros((0, 2), np.int64))
        length = draws.integer(least, size - 2)
        if draws.chance(self.rest) or piece.documents > 1:
            is_open = not piece.closed or piece.tokens[-1] == lexicon.end
            return Cut(np.array([[size - length, size]]), bool(is_open))
        first = draws.integer(1, size - length - 1)
        return Cut(np.array([[first, first + length]]))

    def text_length(self, length: int) -> int:
        """All but the blank's mask and the token that begins it."""
        return max(2, length - 2)


@functools.cache
def length_probabilities(mean: float, longest: int) -> Float[np.ndarray, "longest"]:
    """Probabilities of the lengths 1 to `longest`: Poisson's, of these alone."""
    lengths = np.arange(1, longest + 1)
    logs = lengths * math.log(mean) - np.array([math.lgamma(n + 1) for n in lengths.tolist()])
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()


@functools.cache
def _text_length(length: int, share: float, mean: float, longest: int) -> int:
    """See `TokenBlanks.text_length`; kept, since it is asked of every document."""
    probabilities = length_probabilities(mean, longest)
    lengths = np.arange(1, longest + 1)
    average = float(probabilities @ lengths)
    deviation = math.sqrt(float(probabilities @ (lengths - average) ** 2)) / average

    def fits(text: int) -> bool:
        number = share * text / average
        return text + 2 * (number + DEVIATIONS * deviation * math.sqrt(number) + 1) <= length

    return max(filter(fits, range(2, length + 1)), default=2)


def _texts(tokens: Int[np.ndarray, "piece"], lexicon: TokenTable) -> list[tuple[int, int]]:
    """First and one past the last token of what stands between the marks of documents."""
    marks = [-1, *np.flatnonzero(lexicon.is_mark(tokens)).tolist(), len(tokens)]
    pairs = itertools.pairwise(marks)
    return [(before + 1, mark) for before, mark in pairs if mark > before + 1]


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise UserError(f"a share of the text is {share}; it must lie between 0 and 1")
