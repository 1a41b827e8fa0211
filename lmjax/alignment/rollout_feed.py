"""The feed of reinforcement learning: requests, and the rewards of replies to them."""

from __future__ import annotations

import dataclasses

from lmjax.alignment.reward_functions import ReadyReward
from lmjax.training.feed import RequestFeed


@dataclasses.dataclass(frozen=True)
class RolloutFeed(RequestFeed):
    """Requests of stored texts, with what judges the replies.

    Attributes:
      rewards: whose sum a reply is worth.
    """

    rewards: tuple[ReadyReward, ...]
