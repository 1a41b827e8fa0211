"""Mixtures: the order of the sources' rows in training, by weights, shuffling, epochs."""

import functools
import math
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float32, Int32, Int64

from lmjax.config import UserError
from lmjax.data.rows import RowReader
from lmjax.data.spans import RowSpans, join_spans

Numbers = Int64[np.ndarray, "_"]
PERIOD = 1000  # rows in which the weights are kept exactly, before common factors are divided out


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

    def locate(
        self, row: Int64[np.ndarray, "rows"]
    ) -> tuple[Int64[np.ndarray, "rows"], Int64[np.ndarray, "rows"]]:
        """See `Mixture.place`, for rows of this stage."""
        source, rank = self._pattern
        period, inside = np.divmod(np.asarray(row, np.int64) - self.first_row, self.period)
        source, rank = source[inside], rank[inside]
        return source, self.before[source] + period * self.counts[source] + rank

    def used(self, row: int) -> Int64[np.ndarray, "sources"]:
        """Numbers of rows of each source before a row of this stage."""
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
        readers: Mapping[str, RowReader],
        weights: dict[str, float],
        changes: tuple[tuple[int, dict[str, float]], ...] = (),
    ):
        """Sets up the stages.

        Args:
          readers: the sources by name, with rows of one length.
          weights: relative shares of the rows, by name.
          changes: (first row, weights from there on), by rising row.

        Raises:
            UserError: a weight is negative, or too small beside the others.
        """
        self.readers = dict(readers)
        self.names = tuple(readers)
        self._sources = list(readers.values())
        self.row_length = self._sources[0].row_length
        self._rows = np.array([rows.count for rows in self._sources])
        self.stages: list[_Stage] = []
        for first_row, stage_weights in ((0, weights), *changes):
            some = shares({name: weight for name, weight in stage_weights.items() if weight})
            counts = [some.get(name, 0) for name in self.names]
            nothing = np.zeros(len(counts), np.int64)
            before = self.stages[-1].used(first_row) if self.stages else nothing
            self.stages.append(_Stage(first_row, counts, before))

    def locate(
        self, row: Int64[np.ndarray, "rows"]
    ) -> tuple[Int64[np.ndarray, "rows"], Int64[np.ndarray, "rows"]]:
        """The number of each row's source, and how many rows of that source came before."""
        row = np.asarray(row, np.int64)
        source, number = self.stages[0].locate(row)
        for stage in self.stages[1:]:
            here = row >= stage.first_row
            source[here], number[here] = stage.locate(row[here])
        return source, number

    def read(
        self, row: Int64[np.ndarray, "rows"], seed: int
    ) -> tuple[Int32[np.ndarray, "rows row_length"], Int32[np.ndarray, "rows row_length"]]:
        """Tokens and segment ids of some rows of the training with this seed."""
        tokens = np.empty((len(row), self.row_length), np.int32)
        segments = np.empty_like(tokens)
        for here, rows, index, variant in self.by_source(row, seed):
            tokens[here], segments[here] = rows.read(index, variant)
        return tokens, segments

    def spans(self, row: Int64[np.ndarray, "rows"], seed: int) -> RowSpans:
        """The spans of what `read` gives."""
        found = [
            (here, rows.spans(index, variant))
            for here, rows, index, variant in self.by_source(row, seed)
        ]
        return join_spans(*zip(*found, strict=True))

    def labels(
        self, row: Int64[np.ndarray, "rows"], seed: int
    ) -> Float32[np.ndarray, "rows slots labels"]:
        """The labels of what `read` gives, of sources with as many each."""
        found = [
            (here, rows.labels(index, variant))
            for here, rows, index, variant in self.by_source(row, seed)
        ]
        where, parts = zip(*found, strict=True)
        return np.concatenate(parts)[np.argsort(np.concatenate(where))]

    def by_source(
        self, row: Int64[np.ndarray, "rows"], seed: int
    ) -> Iterator[tuple[Numbers, RowReader, Numbers, Numbers]]:
        """For each source: which rows are its, its reader, and what `RowReader.shuffle` gives."""
        source, number = self.locate(row)
        for which in np.unique(source).tolist():
            here, rows = np.flatnonzero(source == which), self._sources[which]
            yield here, rows, *rows.shuffle(number[here], seed, which)

    def epochs(self, rows: int) -> dict[str, float]:
        """Epochs of each source after that many rows of training."""
        stage = [stage for stage in self.stages if stage.first_row <= rows][-1]
        epochs = stage.used(rows) / self._rows
        return dict(zip(self.names, epochs.tolist(), strict=True))

    def rows_of_epochs(self, name: str, epochs: float) -> int:
        """Rows of training after which a source has been read so often, with the first weights.

        Args:
          name: of the source.
          epochs: how often; a fraction is a part of it.
        """
        number, stage = self.names.index(name), self.stages[0]
        wanted = math.ceil(epochs * self._sources[number].count)
        return math.ceil(wanted * stage.period / int(stage.counts[number]))


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
