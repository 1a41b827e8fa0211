"""Examples as EleutherAI's lm-evaluation-harness (0.4) draws them: others for each question."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

SEED = 1234  # of the harness's stream of random numbers, unless its user says another
T = TypeVar("T")


def harness_examples(
    pool: Sequence[T],
    shots: int,
    stream: random.Random | None,
    is_question: Callable[[T], bool] | None = None,
) -> list[T]:
    """Examples of the next question; fewer than `shots` where there are not as many.

    Args:
      pool: what examples are taken of, in the order of its file.
      shots: number of examples.
      stream: random numbers of all questions of a task, asked one after another; None: the first
        items of the pool are taken.
      is_question: of an item, whether it is the question itself; None: the pool is another part of
        the test set.
    """
    own = is_question is not None
    others = (one for one in pool if not (own and is_question(one)))
    if stream is None:
        return list(itertools.islice(others, shots))
    if shots + own > len(pool):
        return list(others)
    # One more is drawn than is wanted, since the question may be among them.
    found = stream.sample(pool, shots + own)
    if own:
        found = [one for one in found if not is_question(one)][:shots]
    if len(found) == shots:
        return found
    left = list(others)  # the question stands in the pool more than once
    return stream.sample(left, shots) if len(left) >= shots else left
