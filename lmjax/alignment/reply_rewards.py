"""Rewards of replies to held-out requests."""

from __future__ import annotations

import math

import numpy as np

from lmjax.alignment.reward_functions import total_rewards
from lmjax.alignment.rollout_feed import RolloutFeed
from lmjax.alignment.rollouts import sample_replies
from lmjax.config import config
from lmjax.console import Table
from lmjax.evaluation.evaluator import Context, Evaluate, Evaluator, Record
from lmjax.evaluation.text_samples import describe_sampling
from lmjax.generation.generator import Generator
from lmjax.generation.sampling import Sampling

COLUMNS = ("requests", "standard error", "reward")
SHOWN = 3  # replies of each set
SEED = 1 << 20  # of the first reply; those of training have other ones


@config
class ReplyRewards(Evaluator):
    """Mean reward of replies to held-out requests, the same draws each time."""

    every: int | None = 50  # steps between evaluations; the end always has one
    requests: int = 64  # most of each set
    length: int = 128  # most tokens of a reply
    sampling: Sampling = Sampling()  # how replies are drawn

    def prepare(self, context: Context) -> Evaluate:
        """See `Evaluator.prepare`; the feed, a `RolloutFeed`, has the rewards."""
        feed: RolloutFeed = context.feed
        sets = {name: feed.held_out(name, self.requests) for name in feed.prepared.held_out}
        model = context.learner.model

        def evaluate(step: int, params: dict) -> tuple[Record | Table, ...]:
            records, rows, samples = [], [], []
            generator = Generator(model, params, merge=False)
            for name, requests in sets.items():
                settings = requests, self.sampling, self.length, SEED
                rollouts = sample_replies(generator, feed.tokenizer, feed.template, *settings)
                found = [one.reply for one in rollouts]
                rewards, means = total_rewards(feed.rewards, found)
                error = float(np.std(rewards)) / math.sqrt(len(rewards))
                reward = float(rewards.mean())
                further = {f"reward_{one}": mean for one, mean in means.items()}
                records.append({"split": f"held_out/{name}", "reward": reward, **further})
                rows.append((name, error, reward))
                samples += [(one.request, one.text) for one in found[:SHOWN]]
            drawn = describe_sampling(self.sampling)
            return (
                *records,
                Table("Rewards", COLUMNS, tuple(rows), "Of replies to held-out requests."),
                Table("Replies", ("request", "reply"), tuple(samples), drawn),
            )

        return evaluate
