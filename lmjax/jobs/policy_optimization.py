"""Reinforcement learning: a policy learns from rewards of its own replies (GRPO, RLOO, ...)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from lmjax.alignment import ClippedPolicy, KLControl
from lmjax.alignment.critic import HEAD, has_critic
from lmjax.alignment.reply_rewards import ReplyRewards
from lmjax.alignment.reward_functions import Reward, make_ready
from lmjax.alignment.rollout_feed import RolloutFeed
from lmjax.alignment.rollouts import RolloutRows, make_example
from lmjax.alignment.value_network import ActorCriticLearner, ValueLoss, ValueNetwork
from lmjax.config import config, replace
from lmjax.console import RunLog
from lmjax.data import Data
from lmjax.evaluation.evaluator import Evaluator
from lmjax.generation.sampling import Sampling
from lmjax.jobs.begin_with import refuse_prefix_model, warn_of_format, with_starting_model
from lmjax.jobs.policy_checks import check_policy, check_settings
from lmjax.jobs.policy_step import REFERENCE, PolicyStep
from lmjax.jobs.pretraining_text import prepare_pretraining, with_pretraining
from lmjax.jobs.text import prepare_text, warn_of_requests
from lmjax.jobs.training_job import FrozenModel, TrainingJob
from lmjax.models import TransformerConfig
from lmjax.objectives import CausalLM, Example
from lmjax.objectives.weighted_sum import join_examples
from lmjax.runs.folder import RunFolder
from lmjax.training.feed import RolloutRequest
from lmjax.training.learner import Learner
from lmjax.training.loop import Advance
from lmjax.training.schedules import Rate


@config
class PolicyOptimization(TrainingJob):
    """Train a policy by the rewards of replies that it samples itself.

    Each step replies to `data.batch_size` requests, `samples` times each, and makes `updates`
    updates of `epochs` passes over the replies. The policy begins as `begin_with`, which is also
    the reference that it is held to.
    """

    model: TransformerConfig | None = None  # what is trained; None: the model of begin_with
    objective: ClippedPolicy = ClippedPolicy()  # what an update minimises
    data: Data  # requests; data.length is the most tokens of one
    rewards: tuple[Reward, ...]  # what the replies are worth: the sum
    # price of the divergence from the reference, taken off the reward token by token (InstructGPT);
    # none: the divergence is in the loss alone (objective.kl)
    reward_kl: KLControl | None = None
    samples: int = 4  # replies to each request
    reply_length: int = 128  # most tokens of a reply
    # go on where all replies of the first step are cut off before their end, which mostly is a
    # mistake
    allow_cut_off: bool = False
    sampling: Sampling = Sampling()  # how replies are drawn: the temperature alone may be set
    # shift and scale the rewards of a step to mean 0 and deviation 1 before the divergence is taken
    # off (LLaMA 2)
    whiten_rewards: bool = False
    # of a reply: its reward compared with those of the other replies to the request, over their
    # deviation (GRPO) or not (group_centred: Dr. GRPO); gae: of each token, by a critic (PPO)
    advantage: Literal[
        "group_relative", "group_centred", "leave_one_out", "reinforce_plus_plus", "gae"
    ] = "group_relative"
    gae_lambda: float = 0.95  # for advantage=gae: 1 trusts the rewards alone, 0 the next value
    # the critic of gae, which begins as a reward model; none: a head on the policy's own model
    value_network: ValueNetwork | None = None
    value_warmup: int = 0  # first steps, in which the critic alone is trained, or its head
    # text that is learnt in the same updates, its rows split among those of a pass (PPO-ptx); its
    # tokenizer is that of data
    pretraining: Data | None = None
    pretraining_weight: float = 27.8  # of its mean loss of a token, the policy's has weight 1
    epochs: int = 1  # passes over the replies of a step
    updates: int = 1  # updates in a pass, each with a part of the replies
    # divergence in nats of a token from the policy that sampled, after which no further update of a
    # step is made; none: all are. The learning rate goes by the updates that are made
    stop_kl: float | None = None
    evaluate_every: int = 50  # steps between rewards of replies to held-out requests
    evaluate_requests: int = 64  # most of them, of each set

    def validate(self) -> None:
        """Raises UserError for settings that do not go together."""
        check_settings(self)
        super().validate()

    def check_model(self) -> None:
        """See `TrainingJob.check_model`; a model that `resolved` changes is checked then."""
        if self.model is not None and not self.lacks_critic(self.model):
            check_policy(self)
            super().check_model()

    @property
    def has_critic(self) -> bool:
        """Returns whether a critic gives tokens a value."""
        return self.advantage == "gae"

    @property
    def has_value_head(self) -> bool:
        """Returns whether that critic is a head on the policy's own model."""
        return self.has_critic and self.value_network is None

    def lacks_critic(self, model: TransformerConfig) -> bool:
        """Returns whether a model is to get that head."""
        return self.has_value_head and not has_critic(model)

    @property
    def scores_replies(self) -> bool:
        """Returns whether the policy that sampled scores replies before an update.

        Needless where a step has one update, whose ratio is 1, and its rewards need no scores.
        """
        several = self.epochs * self.updates > 1 or self.sampling.temperature != 1
        return several or self.reward_kl is not None or self.has_critic

    @property
    def replies(self) -> int:
        """Replies of a step."""
        return self.data.batch_size * self.samples

    @property
    def lengths_vary(self) -> bool:
        """See `TrainingJob.lengths_vary`."""
        return True

    @property
    def length(self) -> int:
        """Tokens of a row: of a request and its reply, with the token that ends it."""
        return self.data.length + self.reply_length

    def resolved(self) -> PolicyOptimization:
        """See `TrainingJob.resolved`: with the model and the tokenizer of `begin_with`.

        The model gets a critic where the advantage needs one.
        """

        def with_critic(model: TransformerConfig) -> TransformerConfig:
            lacks = self.lacks_critic(model)
            return replace(model, heads=(*model.heads, HEAD)) if lacks else model

        job = with_starting_model(self, with_critic, self.lacks_critic)
        if self.pretraining is None:
            return job
        return replace(job, pretraining=replace(job.pretraining, tokenizer=job.data.tokenizer))

    def frozen_models(self) -> dict[str, FrozenModel]:
        """See `TrainingJob.frozen_models`: the reference."""
        return {REFERENCE: FrozenModel(self.model, self.begin_with)}

    def example_shapes(self) -> Example:
        """See `TrainingJob.example_shapes`."""
        count = self.replies // self.updates
        nothing = np.zeros((count, self.length), np.float32)
        rows = RolloutRows(nothing.astype(np.int32), *np.zeros((2, count), np.int32))
        critic = (nothing, nothing) if self.has_value_head else None
        policy, sampled = (nothing, None) if self.scores_replies else (None, nothing)
        example = make_example(rows, policy, nothing, nothing, critic, sampled)
        if (text := self.pretraining) is None:
            return example
        rows = text.batch_size // self.updates
        return join_examples([example, CausalLM().shapes(rows, text.length)])

    def all_evaluators(self) -> tuple[Evaluator, ...]:
        """Rewards of replies to held-out requests, and further ones."""
        rewards = ReplyRewards(
            every=self.evaluate_every,
            requests=self.evaluate_requests,
            length=self.reply_length,
            sampling=self.sampling,
        )
        return (rewards, *self.evaluators)

    def rate(self, steps: int) -> Rate:
        """See `TrainingJob.rate`: all updates of a step have its rate."""
        return self._by_update(self.schedule.build(steps))

    def _by_update(self, by_step: Rate) -> Rate:
        each = self.epochs * self.updates
        return lambda update: by_step(update // each)

    def facts(self) -> Iterator[tuple[str, str]]:
        """See `TrainingJob.facts`."""
        yield (
            "training",
            f"{self.steps:,} steps of {self.data.batch_size} requests x {self.samples} replies, "
            f"{self.epochs * self.updates} updates each",
        )

    def prepare(self, folder: RunFolder, log: RunLog, saved: dict[str, Any]) -> RolloutFeed:
        """See `TrainingJob.prepare`."""
        refuse_prefix_model(self.begin_with)
        warn_of_format(self, log)
        prepared = prepare_text(self.data, folder.tokenizer, self.model.vocab_size, log, saved)
        rewards = make_ready(self.rewards, prepared.tokenizer, self.length, self.begin_with)
        if self.value_network is not None:
            self.value_network.check(prepared.tokenizer, self.length, self.begin_with)
            log.fact("critic", f"a network of its own, which began as {self.value_network.folder}")
        plan, text = self.data.plan(self.seed), prepare_pretraining(self, folder, log, saved)
        lines = folder.metrics() if saved else ()
        before = [m for m in lines if (m["step"], m["split"]) == (saved["step"], "train")]
        settings = rewards, text, dict(*before[-1:])
        feed = RolloutFeed(prepared, plan, self.data.length, *settings)
        warn_of_requests(log, feed)
        return feed

    def learner(self) -> Learner:
        """See `TrainingJob.learner`; the reference's log-probabilities are in the examples."""
        learner = super().learner()
        frozen = {name: graph for name, graph in learner.frozen.items() if name != REFERENCE}
        objective = self.penalised(with_pretraining(self, learner))
        learner = dataclasses.replace(learner, frozen=frozen, objective=objective)
        if self.value_network is None:
            return learner
        network, shared = self.value_network, ("layout", "clip", "microbatch", "zero")
        critic = Learner(
            model=network.model,
            objective=ValueLoss(value_clip=self.objective.value_clip),
            optimizer=network.optimizer,
            rate=self._by_update(network.schedule.build(self.steps)),
            microbatch_tokens=self.microbatch * self.length,
            **{name: getattr(learner, name) for name in shared},
        )
        both = {field.name: getattr(learner, field.name) for field in dataclasses.fields(learner)}
        begin = functools.partial(network.params, learner.layout)
        return ActorCriticLearner(**both, critic=critic, critic_params=begin)

    def advance(
        self,
        learner: Learner,
        feed: RolloutFeed,
        examples: Iterator[tuple[list[RolloutRequest], Example | None]],
        frozen: Mapping[str, dict] | None,
    ) -> Advance:
        """See `TrainingJob.advance`: replies, rewards, and the updates by them."""
        return PolicyStep(self, learner, feed, examples, frozen)
