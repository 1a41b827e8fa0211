"""Plans of scoring: which rows are run together, padded to few lengths, and what they share."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from lmjax.evaluation.boundary import TokenPair
from lmjax.models import Batch

LONG = 256  # columns from which on a batch has fewer rows
ROOM = 64  # tokens of the smallest cache
SHARED = 32  # fewest tokens that are worth a cache of their own
SHARERS = 8  # fewest contexts that are
GROUP = 64  # tokens that are scored at once, or a multiple
LARGEST = 256  # tokens of the largest group
LOGITS = 1 << 24  # of a group at most, where that is more than one of `GROUP` tokens


def padded_length(length: int, step: int = 8, parts: int = 16) -> int:
    """The next multiple of `step`, or of a part of the next power of two if that is more.

    Few shapes are compiled, and at most 2 in `parts` columns of a long row are padding.
    """
    power = 1 << max(0, length - 1).bit_length()
    step = max(step, power // parts)
    return -(-max(1, length) // step) * step


def cache_length(length: int) -> int:
    """Room of a cache for so many tokens: 64, 128, 256, then 320, 384, 448, 512, 640, ...

    They are fewer than those of `padded_length`, as what reads a cache is compiled for each of its
    own lengths as well, and room that is not used costs little.
    """
    if length > LONG:
        return padded_length(length, 32, 8)
    return max(ROOM, 1 << (length - 1).bit_length())


def rows_of(batch_size: int, columns: int) -> int:
    """Rows of a batch with so many columns: fewer where they are long, so that memory is bounded.

    Args:
      batch_size: rows of up to `LONG` columns.
      columns: of the batch, as `padded_length` gives them.
    """
    rows = batch_size
    while rows > 1 and rows * columns > batch_size * LONG:
        rows = (rows + 1) // 2
    return rows


@dataclasses.dataclass
class Family:
    """A context with its continuations.

    Attributes:
      context: tokens.
      continuations: tokens of each, with the numbers of the pairs that ask for it.
    """

    context: tuple[int, ...]
    continuations: dict[tuple[int, ...], list[int]] = dataclasses.field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Most tokens of a continuation."""
        return max(map(len, self.continuations))


def families_of(pairs: Sequence[TokenPair]) -> list[Family]:
    """The contexts among pairs, each once; so are the continuations of each."""
    found: dict[tuple[int, ...], Family] = {}
    for number, (context, continuation) in enumerate(pairs):
        family = found.setdefault(context, Family(context))
        family.continuations.setdefault(continuation, []).append(number)
    return list(found.values())


def shared_prefixes(families: Sequence[Family]) -> list[tuple[int, list[Family]]]:
    """Families by what their contexts begin with.

    Returns:
      Number of tokens that all contexts of a part have in common, less than any of them has, with
      the families of the part. It is 0 for those with nothing worth a cache.
    """
    ordered = sorted(families, key=lambda family: family.context)
    common = [_common(one.context, other.context) for one, other in itertools.pairwise(ordered)]
    parts: list[list[Family]] = []
    for number, family in enumerate(ordered):
        if number and common[number - 1] >= SHARED:
            parts[-1].append(family)
        else:
            parts.append([family])
    found, rest = [], []
    for part in parts:
        first, last = part[0].context, part[-1].context
        # In the order of the tokens the first and the last have the least in common.
        length = min(_common(first, last), min(len(f.context) for f in part) - 1)
        if len(part) < SHARERS or length < SHARED:
            rest += part
        else:
            found.append((length, part))
    return [*found, *([(0, rest)] if rest else [])]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that two texts begin with alike."""
    pairs = enumerate(zip(one, other))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def cut_in_batches(
    lengths: Sequence[int], batch_size: int, step: int = 8, parts: int = 16
) -> Iterator[tuple[list[int], int]]:
    """Numbers of rows that are run together, the longest first, and the columns of their batch.

    Args:
      lengths: of the rows.
      batch_size: see `rows_of`.
      step, parts: see `padded_length`.
    """
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    first = 0
    while first < len(order):
        columns = padded_length(lengths[order[first]], step, parts)
        rows = rows_of(batch_size, columns)
        yield order[first : first + rows], columns
        first += rows


def right_padded(
    texts: Sequence[Sequence[int]], rows: int, columns: int, first: Sequence[int] | int = 0
) -> Batch:
    """Texts as one batch, padded on the right, and with rows of padding.

    Args:
      texts: tokens.
      rows: of the batch.
      columns: of the batch.
      first: position of the first token of each text, or of all.
    """
    tokens, segments = np.zeros((2, rows, columns), np.int32)
    starts = np.zeros(rows, np.int32)
    starts[: len(texts)] = first
    for row, text in enumerate(texts):
        tokens[row, : len(text)], segments[row, : len(text)] = text, 1
    positions = np.where(segments > 0, starts[:, None] + np.arange(columns), 0).astype(np.int32)
    return Batch(tokens=tokens, positions=positions, segments=segments)


def grouped(numbers: Sequence[int], vocabulary: int) -> Int[np.ndarray, "groups size"]:
    """Numbers in groups of one size, filled with zeros: few shapes, and little is filling.

    Args:
      numbers: one of each token that is scored.
      vocabulary: logits of a token; those of a group are there at once.
    """
    most = min(LARGEST, max(GROUP, LOGITS // vocabulary // GROUP * GROUP))
    size = min(most, padded_length(len(numbers), GROUP))
    groups = -(-max(1, len(numbers)) // size)
    groups = groups if groups <= 4 else padded_length(groups)
    found = np.zeros(groups * size, np.int32)
    found[: len(numbers)] = numbers
    return found.reshape(groups, size)
