"""Rewards of replies: numbers that a policy is trained to raise."""

from __future__ import annotations

import abc
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from lmjax.config import UserError, config
from lmjax.data.tokenizers import Tokenizer
from lmjax.launch import from_first

WORD = re.compile(r"[^\W_]+")


class Reply(NamedTuple):
    """A reply to a request.

    Attributes:
      request: text of the request, as the model reads it.
      text: of the reply, without what ends it.
      ended: whether the model ended it; else it was cut off.
      metadata: fields of the request's line.
      tokens: of the request and the reply, with the token that ends it.
    """

    request: str
    text: str
    ended: bool
    metadata: dict[str, Any]
    tokens: list[int]


Score = Callable[[Sequence[Reply]], Sequence[float]]


class ReadyReward(NamedTuple):
    """A reward that has read what it needs.

    Attributes:
      name: of the reward among the metrics.
      weight: of the reward in the sum of all.
      score: number for each reply.
    """

    name: str
    weight: float
    score: Score


@config
class Reward(abc.ABC):
    """Base of the rewards; one of your own is a class with a method.

    @config
    class RightAnswer(Reward):
        '''1 for a reply that ends with the answer of the request's line.'''

        def score(self, replies):
            return [float(r.text.endswith(r.metadata["answer"])) for r in replies]
    """

    weight: float = 1.0  # of the reward in the sum of all

    @property
    def name(self) -> str:
        """Name of the reward among the metrics."""
        return type(self).__name__

    @abc.abstractmethod
    def score(self, replies: Sequence[Reply]) -> Sequence[float]:
        """Number for each reply, finite; the more, the better."""

    def prepare(self, tokenizer: Tokenizer, length: int, policy: str) -> Score:
        """Reads once what `score` needs in a run; most rewards need nothing. A mesh is set.

        Args:
          tokenizer: of the policy.
          length: most tokens of a request and its reply.
          policy: folder that the policy begins as, for messages.

        Returns:
          `score`, or what takes its part in the run.
        """
        return self.score


@config
class CutOff(Reward):
    """-1 for a reply that is cut off before its end, and 0 for one that ends."""

    def score(self, replies: Sequence[Reply]) -> list[float]:
        """See `Reward.score`."""
        return [float(reply.ended) - 1 for reply in replies]


@config
class SharedWords(Reward):
    """F1 between the words of a reply and those of the right answer, from 0 to 1.

    A word is a run of letters and digits, in any case; one that is written several times counts as
    often (Rajpurkar et al. 2016, arXiv:1606.05250).
    """

    answer: str = "answer"  # field of the request's line that holds the right answer

    def score(self, replies: Sequence[Reply]) -> list[float]:
        """See `Reward.score`. UserError: a request lacks the field, or it holds no text."""
        return [_shared(reply.text, self._answer(reply)) for reply in replies]

    def _answer(self, reply: Reply) -> str:
        found = reply.metadata.get(self.answer)
        if not isinstance(found, str):
            known = ", ".join(map(repr, reply.metadata)) or "none"
            raise UserError(
                f"{self.name} reads the field {self.answer!r} of a request, a text; its fields are "
                f"{known} (the source's `metadata` names those that are read)"
            )
        return found


def _shared(text: str, answer: str) -> float:
    """F1 of the words of two texts."""
    found, wanted = (Counter(WORD.findall(one.lower())) for one in (text, answer))
    size = found.total() + wanted.total()
    return 2 * (found & wanted).total() / size if size else 0.0


def make_ready(
    rewards: Sequence[Reward], tokenizer: Tokenizer, length: int, policy: str
) -> tuple[ReadyReward, ...]:
    """Prepares all rewards; see `Reward.prepare`. Those of one name are numbered from 2 on."""
    found: list[ReadyReward] = []
    for number, one in enumerate(rewards):
        before = sum(other.name == one.name for other in rewards[:number])
        name = f"{one.name}_{before + 1}" if before else one.name
        found.append(ReadyReward(name, one.weight, one.prepare(tokenizer, length, policy)))
    return tuple(found)


def total_rewards(
    rewards: Sequence[Reward | ReadyReward], replies: Sequence[Reply]
) -> tuple[Float[np.ndarray, "replies"], dict[str, float]]:
    """Weighted sum of all rewards of each reply, and the mean of each reward by its name.

    Of several processes, all score the replies, and the scores of the first one count.

    Raises:
      UserError: a reward gives another number of scores than there are replies, or one that is not
        finite.
    """
    total, means = np.zeros(len(replies)), {}
    for reward in rewards:
        # Those of a function may differ from process to process.
        scores = from_first(np.asarray(reward.score(replies), np.float64))
        if scores.shape != (len(replies),):
            raise UserError(
                f"reward {reward.name} gives scores of the shape {scores.shape} for "
                f"{len(replies)} replies"
            )
        if not np.isfinite(scores).all():
            number = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise UserError(
                f"reward {reward.name} gives {scores[number]} for the reply "
                f"{replies[number].text[:60]!r}"
            )
        total += reward.weight * scores
        means[reward.name] = float(scores.mean())
    return total, means
