"""Answers for texts from the rows that they were scored in, whatever order these come in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from lmjax.evaluation.requests import Likelihood

# (number of a text, its answer) -> nothing; called as soon as an answer is there.
Note = Callable[[int, Likelihood], None]


class RowSums:
    """Sums of rows by text.

    Attributes:
      answers: of the texts; None where rows are missing.
    """

    def __init__(
        self, owners: Sequence[int], cuts: Sequence[int], note: Note | None = None
    ) -> None:
        """
        Args:
          owners: number of the text of each row; every text has one or more.
          cuts: of each text, tokens that its context lost.
          note: is told each answer.
        """
        count = len(cuts)
        self.answers: list[Likelihood | None] = [None] * count
        self._owners, self._cuts, self._note = owners, cuts, note
        self._left = np.bincount(np.asarray(owners, int), minlength=count)
        self._sums, self._greedy = np.zeros(count), np.ones(count, bool)
        self._tokens = np.zeros(count, int)

    def add(self, row: int, log_probability: float, is_greedy: bool, tokens: int) -> None:
        """Adds what was found of a row; see `Likelihood`."""
        owner = self._owners[row]
        self._sums[owner] += log_probability
        self._greedy[owner] &= is_greedy
        self._tokens[owner] += tokens
        self._left[owner] -= 1
        if self._left[owner]:
            return
        found = float(self._sums[owner]), bool(self._greedy[owner]), int(self._tokens[owner])
        self.answers[owner] = Likelihood(*found, self._cuts[owner])
        if self._note is not None:
            self._note(owner, self.answers[owner])


def put_whole(array: np.ndarray) -> jax.Array:
    """An array that every device of the mesh that is set has all of."""
    mesh = jax.sharding.get_mesh()
    return jax.device_put(array, jax.NamedSharding(mesh, jax.sharding.PartitionSpec()))
