"""Edit distance of texts."""

from __future__ import annotations

from collections.abc import Sequence


def edit_distance(first: Sequence, second: Sequence) -> int:
    """Fewest insertions, removals and exchanges that make one sequence the other.

    (Levenshtein 1966; by the table of Wagner and Fischer 1974, a row at a time.)

    Args:
      first: a text, whose elements are its characters, or a sequence of tokens or words.
      second: another one.
    """
    row = list(range(len(second) + 1))
    for number, element in enumerate(first, 1):
        before, row = row, [number]
        for column, other in enumerate(second):
            exchanged = before[column] + (element != other)
            row.append(min(exchanged, before[column + 1] + 1, row[column] + 1))
    return row[-1]
