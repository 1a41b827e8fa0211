"""Which row of which source stands where in training: weights, shuffling, epochs."""

import functools
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int32, Int64

from lmjax.config import UserError
from lmjax.data.permutation import permute, random_bits
from lmjax.data.spans import RowSpans, count_up, join_spans
from lmjax.data.store import TokenStore

PERIOD = 1000  # rows in which the weights are kept exactly, before common factors are divided out


class Rows:
    """A token store cut into rows of `row_length` tokens of which neighbours share `overlap`.

    The store is read as a ring: the token after the last is the first, so that each token is the
    target of a row of an epoch, with an overlap of 1 of exactly one. The last row of an epoch is
    filled up with tokens of segment 0. The ring is cut at a place of its own in every epoch.
    """

    def __init__(self, store: TokenStore, row_length: int, overlap: int = 1):
        if row_length < 2:
            raise UserError(f"rows have {row_length} tokens; they need at least 2")
        self.store = store
        self.row_length = row_length
        self.advance = row_length - overlap  # from one row's first token to the next one's
        self.count = -(-store.manifest.tokens // self.advance)  # rows in an epoch

    def read(
        self, row: Int64[np.ndarray, "rows"], start: int | Int64[np.ndarray, "rows"] = 0
    ) -> tuple[Int32[np.ndarray, "rows row_length"], Int32[np.ndarray, "rows row_length"]]:
        """Tokens and segment ids of some rows of an epoch that begins at token `start`.

        Segments are numbered from 1 in each row, a document each; 0 is filling.
        """
        size = self.store.manifest.tokens
        inner = np.asarray(row, np.int64) * self.advance
        first = (inner + start) % size
        places = first[:, None] + np.arange(self.row_length)
        tokens = np.take(self.store.tokens, places % size).astype(np.int32)
        segments = 1 + np.cumsum(self._boundaries(first, places), axis=1, dtype=np.int32)
        # The token at which the epoch began is its last target.
        filling = np.arange(self.row_length) > (size - inner)[:, None]
        tokens[filling] = 0
        segments[filling] = 0
        return tokens, segments

    def _boundaries(
        self, first: Int64[np.ndarray, "rows"], places: Int64[np.ndarray, "rows row_length"]
    ) -> Bool[np.ndarray, "rows row_length"]:
        """Where in the rows, after their first place, a document begins."""
        offsets, size = self.store.offsets, self.store.manifest.tokens
        documents = len(offsets) - 1
        laps, ends = np.divmod(places[:, -1], size)
        # Numbers of the documents that begin inside, counted on over laps of the ring.
        low = np.searchsorted(offsets[:-1], first, side="right")
        high = laps * documents + np.searchsorted(offsets[:-1], ends, side="right")
        row, number = count_up(low, high)
        lap, document = np.divmod(number, documents)
        found = np.zeros(places.shape, bool)
        found[row, offsets[document] + lap * size - first[row]] = True
        return found

    def spans(
        self, row: Int64[np.ndarray, "rows"], start: int | Int64[np.ndarray, "rows"] = 0
    ) -> RowSpans:
        """The spans of what `read` gives."""
        first, end, kind = self.store.spans
        size, spans = self.store.manifest.tokens, len(first)
        if not spans:
            return RowSpans.none()
        inner = np.asarray(row, np.int64) * self.advance
        begin = (inner + start) % size
        stop = begin + np.minimum(self.row_length, size - inner + 1)  # behind it is filling
        # Numbers of the spans, counted on over laps of the ring. What opens one stands before it.
        laps, last = np.divmod(stop, size)
        low = np.searchsorted(end, begin)
        high = laps * spans + np.searchsorted(first, last, side="right")
        found, number = count_up(low, high)
        lap, index = np.divmod(number, spans)
        shift = lap * size - begin[found]
        return RowSpans(found, first[index] + shift, end[index] + shift, kind[index])


class _Stage:
    """Rows from `first_row` on, in which each source has a fixed share.

    Within every period of rows each source has `counts` of them, spread evenly.

    Attributes:
      first_row: where it begins.
      counts: rows of each source in a period.
      before: rows of each source before `first_row`.
    """

    def __init__(self, first_row: int, counts: list[int], before: Int64[np.ndarray, "sources"]):
        self.first_row, self.counts, self.before = first_row, np.array(counts), before
        self.period = int(self.counts.sum())

    @functools.cached_property
    def _pattern(self) -> tuple[Int64[np.ndarray, "period"], Int64[np.ndarray, "period"]]:
        """For each row of a period: its source, and how many rows of that source came before."""
        source = np.repeat(np.arange(len(self.counts)), self.counts)
        rank = np.concatenate([np.arange(count) for count in self.counts])
        order = np.lexsort((source, (rank + 0.5) / self.counts[source]))
        return source[order], rank[order]

    def place(
        self, row: Int64[np.ndarray, "rows"]
    ) -> tuple[Int64[np.ndarray, "rows"], Int64[np.ndarray, "rows"]]:
        """See `Mixture.place`, for rows of this stage."""
        source, rank = self._pattern
        period, inside = np.divmod(np.asarray(row, np.int64) - self.first_row, self.period)
        source, rank = source[inside], rank[inside]
        return source, self.before[source] + period * self.counts[source] + rank

    def used(self, row: int) -> Int64[np.ndarray, "sources"]:
        """How many rows of each source come before a row of this stage."""
        period, inside = divmod(row - self.first_row, self.period)
        source, _ = self._pattern
        return (
            self.before
            + period * self.counts
            + np.bincount(source[:inside], minlength=len(self.counts))
        )


class Mixture:
    """Rows of several sources in given shares, each source shuffled anew in every epoch of it.

    Row numbers run over the whole training, which has one or more stages, each with its own shares.
    Each source is walked through without gaps, epoch after epoch, across the stages.
    """

    def __init__(
        self,
        stores: dict[str, TokenStore],
        weights: dict[str, float],
        row_length: int,
        changes: tuple[tuple[int, dict[str, float]], ...] = (),
        overlap: int = 1,
    ):
        """Sets up the stages.

        Args:
          stores: the sources by name.
          weights: relative shares of the rows, by name.
          row_length: tokens that a row takes from its store.
          changes: (first row, weights from there on), by rising row.
          overlap: how many of a row's tokens, from its end, the next one has too.

        Raises:
            UserError: a weight is negative, or too small beside the others.
        """
        self.names = tuple(stores)
        self.row_length = row_length
        self._sources = [Rows(store, row_length, overlap) for store in stores.values()]
        self._rows = np.array([rows.count for rows in self._sources])
        self._tokens = np.array([store.manifest.tokens for store in stores.values()])
        self.stages: list[_Stage] = []
        for first_row, stage_weights in ((0, weights), *changes):
            some = shares({name: weight for name, weight in stage_weights.items() if weight})
            counts = [some.get(name, 0) for name in self.names]
            nothing = np.zeros(len(counts), np.int64)
            before = self.stages[-1].used(first_row) if self.stages else nothing
            self.stages.append(_Stage(first_row, counts, before))

    def place(
        self, row: Int64[np.ndarray, "rows"]
    ) -> tuple[Int64[np.ndarray, "rows"], Int64[np.ndarray, "rows"]]:
        """The number of each row's source, and how many rows of that source came before."""
        row = np.asarray(row, np.int64)
        source, number = self.stages[0].place(row)
        for stage in self.stages[1:]:
            here = row >= stage.first_row
            source[here], number[here] = stage.place(row[here])
        return source, number

    def read(
        self, row: Int64[np.ndarray, "rows"], seed: int
    ) -> tuple[Int32[np.ndarray, "rows row_length"], Int32[np.ndarray, "rows row_length"]]:
        """Tokens and segment ids of some rows of the training with this seed."""
        tokens = np.empty((len(row), self.row_length), np.int32)
        segments = np.empty_like(tokens)
        for here, rows, index, start in self._by_source(row, seed):
            tokens[here], segments[here] = rows.read(index, start)
        return tokens, segments

    def spans(self, row: Int64[np.ndarray, "rows"], seed: int) -> RowSpans:
        """The spans of what `read` gives."""
        found = [
            (here, rows.spans(index, start))
            for here, rows, index, start in self._by_source(row, seed)
        ]
        return join_spans(*zip(*found, strict=True))

    def _by_source(
        self, row: Int64[np.ndarray, "rows"], seed: int
    ) -> Iterator[
        tuple[Int64[np.ndarray, "here"], Rows, Int64[np.ndarray, "here"], Int64[np.ndarray, "here"]]
    ]:
        """For each source: which rows are its, which ones of the ring, and where that is cut."""
        source, number = self.place(row)
        count, size = self._rows[source], self._tokens[source]
        epoch, index = np.divmod(number, count)
        start = (random_bits(seed, source, epoch, 0) % size.astype(np.uint64)).astype(np.int64)
        index = permute(index, count, random_bits(seed, source, epoch, 1))
        for which in np.unique(source):
            here = np.flatnonzero(source == which)
            yield here, self._sources[which], index[here], start[here]

    def epochs(self, rows: int) -> dict[str, float]:
        """How often each source has been read after that many rows of training."""
        stage = [stage for stage in self.stages if stage.first_row <= rows][-1]
        epochs = stage.used(rows) / self._rows
        return dict(zip(self.names, epochs.tolist(), strict=True))


def shares(weights: dict[str, float]) -> dict[str, int]:
    """Rows of each source in a period: the largest remainders are rounded up.

    Raises:
        UserError: a weight is not positive, or less than a thousandth of all.
    """
    total = sum(weights.values())
    for name, weight in weights.items():
        if weight <= 0 or weight / total < 1 / PERIOD:
            raise UserError(
                f"the weight of {name} is {weight} of {total} in all; it must be at least "
                f"{1 / PERIOD} of it"
            )
    exact = {name: weight / total * PERIOD for name, weight in weights.items()}
    counts = {name: math.floor(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: PERIOD - sum(counts.values())]:
        counts[name] += 1
    common = math.gcd(*counts.values())
    return {name: count // common for name, count in counts.items()}


class EvaluationRows:
    """The rows of a held-out store in order: with an overlap of 1 each token is a target once."""

    def __init__(self, store: TokenStore, row_length: int, overlap: int = 1):
        self._rows = Rows(store, row_length, overlap)

    def __len__(self) -> int:
        return self._rows.count

    def read(
        self, first: int, count: int
    ) -> tuple[Int32[np.ndarray, "count row_length"], Int32[np.ndarray, "count row_length"]]:
        """Tokens and segment ids of `count` rows from `first`; rows after the last are filling."""
        row = np.arange(first, first + count)
        tokens, segments = self._rows.read(np.minimum(row, len(self) - 1))
        after = row >= len(self)
        tokens[after] = 0
        segments[after] = 0
        return tokens, segments

    def spans(self, first: int, count: int) -> RowSpans:
        """The spans of what `read` gives."""
        return self._rows.spans(np.arange(first, min(first + count, len(self))))
