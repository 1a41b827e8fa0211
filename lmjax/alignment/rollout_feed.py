"""The feed of reinforcement learning: requests, judges of replies, and text of pretraining."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lmjax.alignment.reward_functions import ReadyReward
from lmjax.objectives import Example
from lmjax.training.feed import RequestFeed, RolloutRequest, TextFeed


@dataclasses.dataclass(frozen=True)
class RolloutFeed(RequestFeed):
    """Requests of stored texts, with what judges the replies.

    Attributes:
      rewards: whose sum a reply is worth.
      pretraining: text that is learnt beside the replies; None: there is none.
      before: metrics of the step that the run goes on after; empty where it begins.
    """

    rewards: tuple[ReadyReward, ...]
    pretraining: TextFeed | None = None
    before: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """See `RequestFeed.identity`, with that of the text."""
        more = {} if self.pretraining is None else {"pretraining": self.pretraining.identity}
        return super().identity | more

    @contextmanager
    def examples(
        self, done: int
    ) -> Iterator[Iterator[tuple[list[RolloutRequest], Example | None]]]:
        """See `Feed.examples`: the requests of each step, and its rows of text."""
        with super().examples(done) as requests:
            if self.pretraining is None:
                yield zip(requests, itertools.repeat(None), strict=False)
                return
            with self.pretraining.examples(done) as texts:
                yield zip(requests, texts, strict=False)
