"""A packing plan: which lengths of documents stand together in a row."""

import bisect
import dataclasses

import numpy as np
from jaxtyping import Int64

Pairs = tuple[tuple[int, int], ...]  # (kind of documents, how many there are)


@dataclasses.dataclass(frozen=True)
class Packing:
    """Rows by the lengths of their documents: rows with the same lengths form a group.

    It holds numbers of documents alone, so it is as small for a billion of them as for a thousand.

    Attributes:
      ends: one past the last row of each group.
      pairs: number of the first pair of each group, and of all pairs.
      kind: of the documents of a pair: their length, and one more than the room of a row added
        for those at the beginning.
      each: documents of this kind in every row of the group.
      before: documents of this kind in the groups before.
    """

    ends: Int64[np.ndarray, "groups"]
    pairs: Int64[np.ndarray, "group_edges"]
    kind: Int64[np.ndarray, "pairs"]
    each: Int64[np.ndarray, "pairs"]
    before: Int64[np.ndarray, "pairs"]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.ends[-1]) if len(self.ends) else 0


def best_fit(
    counts: Int64[np.ndarray, "lengths"], at_beginning: Int64[np.ndarray, "lengths"] | None = None
) -> Packing:
    """Packs the longest documents first, each into the row with the least room that it fits into.

    Best fit decreasing needs at most 11/9 as many rows as the best possible packing, and 4 more
    (Johnson et al., "Worst-case performance bounds for simple one-dimensional packing algorithms",
    SIAM Journal on Computing 1974). Since documents of a length are all alike, rows with the same
    lengths are filled together: the time grows with the number of lengths, not of documents (as
    in Krell et al. 2021, arXiv:2107.02027).

    Args:
      counts: how many documents there are of each length, up to what a row has room for; those
        without a token are left out.
      at_beginning: of each length, further ones that have to stand at the beginning of a row; these
        rows are filled up with the others, and the bound does not hold for them.
    """
    groups = _Groups(len(counts) - 1)
    if at_beginning is not None:
        for length in np.flatnonzero(at_beginning).tolist():
            begun = ((len(counts) + length, 1),)
            groups.put(len(counts) - 1 - length, begun, int(at_beginning[length]))
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left and length:
            room, pairs, rows = groups.take(length)
            each = room // length
            if rows is None:  # new ones
                rows = -(-left // each)
            full = min(rows, left // each)
            groups.put(room - each * length, (*pairs, (length, each)), full)
            rows, left = rows - full, left - full * each
            if rows and left:
                groups.put(room - left * length, (*pairs, (length, left)), 1)
                rows, left = rows - 1, 0
            groups.put(room, pairs, rows)
    return _numbered(groups.all())


class _Groups:
    """Rows that hold the same lengths, by the room that they have left."""

    def __init__(self, size: int):
        self._size = size
        self._by_room: dict[int, list[tuple[Pairs, int]]] = {}
        self._rooms: list[int] = []  # of which there are groups, rising

    def take(self, length: int) -> tuple[int, Pairs, int | None]:
        """Room, contents and number of the fullest rows that a document fits into.

        As many empty rows as are wanted, None, where there are no such rows.
        """
        room_index = bisect.bisect_left(self._rooms, length)
        if room_index == len(self._rooms):
            return self._size, (), None
        room = self._rooms[room_index]
        pairs, rows = self._by_room[room].pop()
        if not self._by_room[room]:
            del self._rooms[room_index]
        return room, pairs, rows

    def put(self, room: int, pairs: Pairs, rows: int) -> None:
        """Takes some rows, if there are any."""
        if not rows:
            return
        groups = self._by_room.setdefault(room, [])
        if not groups:
            bisect.insort(self._rooms, room)
        groups.append((pairs, rows))

    def all(self) -> list[tuple[Pairs, int]]:
        """All groups, in a fixed order."""
        return [group for room in self._rooms for group in self._by_room[room]]


def _numbered(groups: list[tuple[Pairs, int]]) -> Packing:
    seen: dict[int, int] = {}  # documents so far, by kind
    kinds, each, before = [], [], []
    for pairs, rows in groups:
        for kind, number in pairs:
            kinds.append(kind)
            each.append(number)
            before.append(seen.get(kind, 0))
            seen[kind] = before[-1] + number * rows
    return Packing(
        ends=np.cumsum([rows for _, rows in groups], dtype=np.int64),
        pairs=np.cumsum([0, *(len(pairs) for pairs, _ in groups)], dtype=np.int64),
        kind=np.array(kinds, np.int64),
        each=np.array(each, np.int64),
        before=np.array(before, np.int64),
    )
