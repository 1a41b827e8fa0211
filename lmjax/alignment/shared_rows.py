"""Rows of replies that share their requests: what a model makes of one is computed once for all."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int, Shaped

from lmjax.alignment.rollouts import pack_rows, row_multiple
from lmjax.alignment.row_packing import RowPacking, Rows, SharedRows
from lmjax.models import TransformerConfig
from lmjax.models.batch import Batch
from lmjax.parallel import STAGE, Layout, axis_size
from lmjax.training.placement import fitting_size

REQUESTS = (4, 2)  # of a row, where they divide: the more, the less of it is left empty
MULTIPLE = 16  # of the columns of requests, and of those of a branch


def can_share(model: TransformerConfig, layout: Layout) -> bool:
    """Returns whether a model gives replies that share their request what it gives each alone.

    It does not where columns count (biases by distance, windows) or all that is in a row (scaling
    of positions by the length, experts), nor where devices have parts of each row. Stages of a
    pipeline want as many microbatches as they are, and fewer tokens make fewer.
    """
    rule = model.attention.position_rule
    by_column = rule.biased or any(window is not None for window in model.windows)
    by_row = rule.by_length or model.feed_forward.reads_rows
    return not (by_column or by_row or layout.axes("seq") or axis_size(STAGE) > 1)


def arrange(
    batch: Batch,
    written: Bool[np.ndarray, "texts length"],
    request: Int[np.ndarray, "texts"] | None,
    longest: tuple[int, int],
    layout: Layout,
    most: int,
) -> Rows:
    """Places for requests with a reply each: in rows that share requests where these are shorter.

    Args:
      batch: numpy arrays, a request and its reply from the left of each row.
      written: marks the targets that are tokens of a reply.
      request: number of the request of each reply; None: each has one of its own.
      longest: most tokens of a request, and of a reply.
      layout: of the mesh that is set, which shares the rows.
      most: tokens of a microbatch, padding included.
    """
    length = sum(longest)
    packing = pack_rows(batch, length, layout, most)
    if request is None:
        return packing
    # As many microbatches as without, so that rows of text beside them are cut likewise.
    multiple = row_multiple(layout) * -(-len(written) * length // most)
    shared = shared_rows(written, request, longest, multiple)
    return min(packing, shared, key=lambda rows: rows.rows * rows.length)


def shared_rows(
    written: Bool[np.ndarray, "texts length"],
    request: Int[np.ndarray, "texts"],
    longest: tuple[int, int],
    multiple: int,
) -> SharedRows:
    """Rows in which the replies to a request share it.

    How many requests a row has follows from how many there are, and the columns of requests and of
    replies have a few sizes each: so few shapes are compiled.

    Args:
      written, request, longest: as in `arrange`.
      multiple: of the number of rows.
    """
    sizes, begin = written.sum(axis=1), np.argmax(written, axis=1)  # an empty reply begins nowhere
    known, request = np.unique(request, return_inverse=True)
    count, order = len(known), np.argsort(sizes == 0, kind="stable")
    first_text = order[np.unique(request[order], return_index=True)[1]]
    most = next((n for n in REQUESTS if count % (n * multiple) == 0), 1)
    rows = -(-count // (most * multiple)) * multiple
    replies = np.bincount(request, sizes).astype(int)
    row, first, slot = (a[request] for a in spread_evenly(begin[first_text], replies, most, rows))
    own = np.where(first_text[request] == np.arange(len(request)), begin, 0)
    shared = fitting_size(int(np.max(first + own)), most * longest[0], MULTIPLE)
    branch = fitting_size(int(np.max(sizes)), longest[1], MULTIPLE)
    number, at = fill_branches(sizes, request, row, branch)
    most_branches = most * int(np.max(np.bincount(request)))
    branches = fitting_size(int(np.max(number)) + 1, most_branches, 1)
    return SharedRows(
        RowPacking(own, row, first, slot, rows, shared),
        RowPacking(sizes, row, number * branch + at, slot, rows, branches * branch, begin),
        branch,
    )


def spread_evenly(
    sizes: Int[np.ndarray, "requests"],
    replies: Shaped[np.ndarray, "requests"],
    most: int,
    rows: int,
) -> tuple[Int[np.ndarray, "requests"], ...]:
    """Row, first token and number in its row of each request.

    The one with the most tokens, replies included, comes first, and each into the row that has the
    fewest.

    Args:
      sizes: tokens of each request.
      replies: tokens of the replies to each.
      most: requests of a row.
      rows: enough for all.
    """
    row, first, slot = np.zeros((3, len(sizes)), np.int64)
    used, total, count = np.zeros((3, rows), np.int64)
    for one in np.argsort(-(sizes + replies), kind="stable"):
        best = np.argmin(np.where(count < most, total, np.iinfo(np.int64).max))
        row[one], first[one], slot[one] = best, used[best], count[best]
        used[best] += sizes[one]
        total[best] += sizes[one] + replies[one]
        count[best] += 1
    return row, first, slot


def fill_branches(
    sizes: Int[np.ndarray, "texts"],
    request: Int[np.ndarray, "texts"],
    row: Int[np.ndarray, "texts"],
    room: int,
) -> tuple[Int[np.ndarray, "texts"], Int[np.ndarray, "texts"]]:
    """Branch of its row, and first token there, of each reply; see `best_fit`.

    Replies to one request are in different branches, as they would see each other in one.

    Args:
      sizes: of the replies, none above `room`.
      request: number of the request of each.
      row: that each is in.
      room: tokens of a branch.
    """
    branch, first = np.zeros((2, len(sizes)), np.int64)
    filled: dict[int, list[tuple[int, set[int]]]] = {}  # by row: tokens and requests of branches
    for text in np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]:
        own, line = request[text], filled.setdefault(row[text], [])
        free = room - sizes[text]
        fits = [n for n, (used, of) in enumerate(line) if used <= free and own not in of]
        if not fits:
            fits = [len(line)]
            line.append((0, set()))
        best = max(fits, key=lambda n: line[n][0])
        used, others = line[best]
        branch[text], first[text] = best, used
        line[best] = used + sizes[text], others | {own}
    return branch, first
