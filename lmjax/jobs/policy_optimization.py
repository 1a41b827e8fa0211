"""Reinforcement learning: a policy learns from rewards of its own replies (GRPO, RLOO, ...)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lmjax.alignment import (
    ClippedPolicy,
    KLControl,
    group_relative,
    leave_one_out,
    reinforce_plus_plus,
)
from lmjax.alignment.critic import HEAD, critic_advantages, critic_step, has_critic
from lmjax.alignment.reply_rewards import ReplyRewards
from lmjax.alignment.reward_functions import Reward, make_ready, total_rewards
from lmjax.alignment.rollout_feed import RolloutFeed
from lmjax.alignment.rollouts import (
    RolloutRows,
    Scorer,
    divergence_rewards,
    inputs_of,
    make_example,
    make_rows,
    sample_replies,
    sampler_gap,
)
from lmjax.config import UserError, config, replace
from lmjax.console import RunLog
from lmjax.data import Data
from lmjax.data.permutation import random_bits
from lmjax.evaluation.evaluator import Evaluator
from lmjax.generation.sampling import Sampling
from lmjax.jobs.begin_with import warn_of_format, with_starting_model
from lmjax.jobs.settings import at_least
from lmjax.jobs.text import prepare_text
from lmjax.jobs.training_job import FrozenModel, TrainingJob
from lmjax.models import TransformerConfig
from lmjax.objectives import CausalLM, Example, WeightedSum
from lmjax.objectives.example import count_tokens
from lmjax.objectives.weighted_sum import join_examples
from lmjax.parallel import Layout, axis_size
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import read_metrics
from lmjax.training.feed import RolloutRequest, TextFeed
from lmjax.training.learner import Learner, Metrics
from lmjax.training.loop import Advance
from lmjax.training.placement import to_devices
from lmjax.training.schedules import Rate
from lmjax.training.state import TrainState

REFERENCE = "reference"
BETA, REPLY_KL = "beta", "reply_kl"  # price of a nat, and nats of a reply, among the metrics
ADVANTAGES = {
    "group_relative": group_relative,
    "leave_one_out": leave_one_out,
    "reinforce_plus_plus": reinforce_plus_plus,
}


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
    sampling: Sampling = Sampling()  # how replies are drawn: the temperature alone may be set
    # of a reply: its reward compared with those of the other replies to the request; gae: of each
    # token, by a critic, a head on the policy's own model (PPO)
    advantage: Literal["group_relative", "leave_one_out", "reinforce_plus_plus", "gae"] = (
        "group_relative"
    )
    decay: float = 0.95  # lambda of gae: 1 trusts the rewards alone, 0 the next value
    value_warmup: int = 0  # first steps, in which the critic's head alone is trained
    # text that is learnt in the same updates, its rows split among those of a pass (PPO-ptx); its
    # tokenizer is that of data
    pretraining: Data | None = None
    pretraining_weight: float = 27.8  # of its mean loss of a token, the policy's has weight 1
    epochs: int = 1  # passes over the replies of a step
    updates: int = 1  # updates in a pass, each with a part of the replies
    evaluate_every: int = 50  # steps between rewards of replies to held-out requests
    evaluate_requests: int = 64  # most of them, of each set

    def validate(self) -> None:
        """Raises UserError for settings that do not go together."""
        if not self.rewards:
            raise UserError("rewards: give at least one")
        at_least(1, self, "samples", "reply_length", "epochs", "updates")
        if self.elastic is not None:
            raise UserError("elastic: a policy is held by objective.kl, reward_kl and pretraining")
        if self.begin_with is None:
            raise UserError("begin_with: the policy, and the reference that it is held to")
        if self.sampling != Sampling(temperature=self.sampling.temperature):
            raise UserError(
                "sampling: the temperature alone may be set; other filters draw from another "
                "distribution than the one that is trained"
            )
        if self.objective.temperature != self.sampling.temperature:
            raise UserError(
                f"objective.temperature={self.objective.temperature} and sampling.temperature="
                f"{self.sampling.temperature} must be the same"
            )
        if self.reward_kl is not None and self.objective.kl:
            raise UserError(
                f"objective.kl={self.objective.kl} and reward_kl: the divergence would count "
                "twice; set one of them"
            )
        if not 0 <= self.decay <= 1:
            raise UserError(f"decay={self.decay}: must be between 0 and 1")
        at_least(0, self, "value_warmup")
        if self.value_warmup and not self.has_critic:
            raise UserError(f"value_warmup={self.value_warmup}: advantage=gae alone has a critic")
        if self.data.rows != "groups" or self.data.ramp:
            raise UserError("requests are read with data.rows=groups, and without a ramp")
        if self.replies % self.updates:
            raise UserError(
                f"{self.replies} replies of a step do not divide into updates={self.updates}"
            )
        self._check_pretraining()
        super().validate()

    def _check_pretraining(self) -> None:
        """Raises UserError for pretraining text that does not go together with the updates."""
        if (text := self.pretraining) is None:
            return
        if self.pretraining_weight <= 0:
            raise UserError(f"pretraining_weight={self.pretraining_weight}: must be above 0")
        parts = self.updates * self.accumulation
        if text.ramp or text.batch_size % parts:
            raise UserError(
                f"pretraining.batch_size={text.batch_size} must divide into updates={self.updates} "
                f"x accumulation={self.accumulation} parts, without a ramp"
            )

    def check_model(self) -> None:
        """See `TrainingJob.check_model`; a model that is not read yet is checked then."""
        if self.model is None:
            return
        if self.has_critic and not has_critic(self.model):
            raise UserError(
                "advantage=gae reads a TokenHead with one output of the name 'value'; model.heads "
                "has none"
            )
        if self.has_critic and not self.trained().trains("heads.value.outputs.weight"):
            raise UserError("trainable: the critic of advantage=gae, heads.value, is not trained")
        longest = self.model.max_length
        if longest is not None and self.length > longest:
            raise UserError(
                f"data.length={self.data.length} and reply_length={self.reply_length} are more "
                f"than model.max_length={longest}"
            )
        if self.pretraining is not None:
            CausalLM().check(self.model)
            if longest is not None and self.pretraining.length > longest:
                raise UserError(
                    f"pretraining.length={self.pretraining.length} is more than model.max_length="
                    f"{longest}"
                )
        super().check_model()

    @property
    def has_critic(self) -> bool:
        """Returns whether the policy's model gives tokens a value."""
        return self.advantage == "gae"

    @property
    def replies(self) -> int:
        """Replies of a step."""
        return self.data.batch_size * self.samples

    @property
    def length(self) -> int:
        """Tokens of a row: of a request and its reply, with the token that ends it."""
        return self.data.length + self.reply_length

    def resolved(self) -> PolicyOptimization:
        """See `TrainingJob.resolved`: with the model and the tokenizer of `begin_with`.

        The model has a critic where the advantage needs one.

        Raises:
          UserError: also for several processes, whose replies are not gathered yet.
        """
        if (processes := jax.process_count()) > 1:
            raise UserError(
                f"PolicyOptimization works in one process with any number of devices, and there are"
                f" {processes}"
            )

        def with_critic(model: TransformerConfig) -> TransformerConfig:
            lacks = self.has_critic and not has_critic(model)
            return replace(model, heads=(*model.heads, HEAD)) if lacks else model

        job = with_starting_model(self, with_critic)
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
        critic = (nothing, nothing) if self.has_critic else None
        example = make_example(rows, nothing, nothing, nothing, critic)
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
        by_step, each = self.schedule.build(steps), self.epochs * self.updates
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
        warn_of_format(self, log)
        prepared = prepare_text(self.data, folder.tokenizer, self.model.vocab_size, log, saved)
        rewards = make_ready(self.rewards, prepared.tokenizer, self.length, self.begin_with)
        plan, text = self.data.plan(self.seed), self.pretraining
        if text is not None:
            before = saved and {"step": saved["step"], **saved.get("pretraining", {})}
            stored = prepare_text(text, folder.tokenizer, self.model.vocab_size, log, before)
            rows = text.batch_size // (self.updates * self.accumulation)
            text = TextFeed(stored, text.plan(self.seed), CausalLM(), text.length, rows)
        return RolloutFeed(prepared, plan, self.data.length, rewards, text)

    def learner(self) -> Learner:
        """See `TrainingJob.learner`; the reference's log-probabilities are in the examples."""
        learner = dataclasses.replace(super().learner(), frozen={})
        if self.pretraining is None:
            return learner
        rows = self.pretraining.batch_size // (self.updates * self.accumulation)
        if rows % (shards := axis_size(*learner.layout.axes("batch"))):
            raise UserError(
                f"pretraining.batch_size={self.pretraining.batch_size}: the {rows} rows of a part "
                f"do not divide among mesh.data x mesh.fsdp = {shards} devices"
            )
        weights = 1.0, self.pretraining_weight
        both = WeightedSum(objectives=(self.objective, CausalLM()), weights=weights)
        return dataclasses.replace(learner, objective=both)

    def advance(
        self,
        learner: Learner,
        feed: RolloutFeed,
        examples: Iterator[tuple[list[RolloutRequest], Example | None]],
        frozen: Mapping[str, dict] | None,
    ) -> Advance:
        """See `TrainingJob.advance`: replies, rewards, and the updates by them."""
        model, temperature = self.model, self.objective.temperature
        scorer = Scorer(model, learner.layout, temperature, self.has_critic)
        warm_up = critic_step(learner, self.objective) if self.value_warmup else None
        before: Metrics = {}  # what the step before says of the divergence

        def improve(state: TrainState, step: int) -> tuple[TrainState, Metrics, int]:
            asked, text = next(examples)
            requests = [one for one in asked for _ in range(self.samples)]
            settings = self.sampling, self.reply_length
            seed = random_bits(self.seed, step).item() % 2**31
            found = sample_replies(self.model, state.params, feed, requests, *settings, seed)
            scores, means = total_rewards(feed.rewards, [one.reply for one in found])
            rows = make_rows(found, self.length)
            policy, reference = (
                scorer.score(params, rows, self.microbatch)
                for params in (state.params, frozen[REFERENCE])
            )
            log_probs = policy.log_probs, reference.log_probs
            beta = self._beta(step, before)
            rewards, reply_kl = divergence_rewards(rows, scores, *log_probs, beta)
            advantages, critic = self.advantages(rows, np.asarray(rewards), policy.values)
            example = make_example(rows, *log_probs, advantages, critic)
            update = learner.compiled_step
            if step <= self.value_warmup:
                update, text = warm_up, None
            state, metrics = self._updates(update, learner.layout, state, example, text, step)
            further = {"reward": scores.mean(), **{f"reward_{k}": v for k, v in means.items()}}
            further["reply_tokens"] = rows.reply_lengths.mean()
            further["ended"] = np.mean([one.reply.ended for one in found])
            further["sampler_gap"] = sampler_gap(found, rows, log_probs[0], self.sampling)
            before.update({BETA: beta, REPLY_KL: reply_kl})
            metrics |= {k: jnp.float32(v) for k, v in (further | before).items()}
            more = 0 if text is None else count_tokens(text)
            return state, metrics, rows.tokens.size + more

        return improve

    def advantages(
        self,
        rows: RolloutRows,
        rewards: Float[np.ndarray, "replies length"],
        values: Float[np.ndarray, "replies length"] | None,
    ) -> tuple[Float[np.ndarray, "replies length"], tuple[np.ndarray, np.ndarray] | None]:
        """Advantages of tokens, and the critic's values with what they should be.

        Args:
          rows: requests and replies, those of a request one after another.
          rewards: of their tokens.
          values: of the critic; None where there is none.
        """
        if self.has_critic:
            mask = inputs_of(rows)[1].weights > 0
            found = critic_advantages(rewards, values, mask, self.decay)
            advantages, returns = jax.device_get(found)
            return advantages, (values, returns)
        groups = jnp.asarray(rewards.sum(axis=1).reshape(-1, self.samples), jnp.float32)
        each = np.asarray(ADVANTAGES[self.advantage](groups)).reshape(-1, 1)
        return np.broadcast_to(each, rewards.shape).copy(), None

    def _beta(self, step: int, before: Metrics) -> Float[jax.Array, ""]:
        """Price of a nat of divergence in the reward of a step.

        Args:
          step: counted from 1.
          before: metrics of the step before; empty at the first one of this process. They are read
            from metrics.jsonl then, whose nine digits give back every bit of a float32.
        """
        if self.reward_kl is None or step == 1:
            return jnp.float32(0.0 if self.reward_kl is None else self.reward_kl.beta)
        if not before:
            lines = (line for line in read_metrics(self.output) if line["split"] == "train")
            before = next((line for line in lines if line["step"] == step - 1), {})
            if BETA not in before:
                raise UserError(f"{self.output}: metrics.jsonl lacks {BETA} of step {step - 1}")
        beta, kl = (jnp.float32(before[name]) for name in (BETA, REPLY_KL))
        return jnp.float32(self.reward_kl.update(beta, kl, self.replies))

    def _updates(
        self,
        update: Callable[[TrainState, Example], tuple[TrainState, Metrics]],
        layout: Layout,
        state: TrainState,
        example: Example,
        text: Example | None,
        step: int,
    ) -> tuple[TrainState, Metrics]:
        """All updates of a step, each with its rows of text, and the means of their metrics."""
        found = []
        for epoch in range(self.epochs):
            order = np.argsort(random_bits(self.seed, step, epoch, np.arange(self.replies)))
            for number, part in enumerate(np.split(order, self.updates)):
                rows = jax.tree.map(lambda a, part=part: a[part], example)
                if text is not None:
                    own = jax.tree.map(lambda a, n=number: np.split(a, self.updates)[n], text)
                    rows = join_examples([rows, own])
                state, metrics = update(state, to_devices(rows, layout, self.model.vocab_size))
                found.append(metrics)
        return state, jax.tree.map(lambda *values: sum(values) / len(values), *found)
