"""A step of reinforcement learning: replies, their rewards, and the updates by them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lmjax.alignment import FixedKL, group_relative, leave_one_out, reinforce_plus_plus, whiten
from lmjax.alignment.critic import critic_advantages, critic_step
from lmjax.alignment.reward_functions import total_rewards
from lmjax.alignment.rollout_feed import RolloutFeed
from lmjax.alignment.rollouts import (
    Rollout,
    RolloutRows,
    Scorer,
    Scores,
    ValueScorer,
    divergence_rewards,
    inputs_of,
    make_example,
    make_rows,
    packed,
    sample_replies,
    sampled_log_probs,
)
from lmjax.alignment.row_packing import Rows
from lmjax.alignment.shared_rows import arrange, can_share
from lmjax.alignment.value_network import join_states, split_states
from lmjax.config import UserError
from lmjax.data.permutation import random_bits
from lmjax.generation.generator import Generator
from lmjax.generation.run import tell
from lmjax.jobs.pretraining_text import policy_names
from lmjax.models import Batch
from lmjax.objectives import Example, TokenTargets
from lmjax.objectives.example import count_tokens
from lmjax.objectives.weighted_sum import join_examples
from lmjax.training.feed import RolloutRequest
from lmjax.training.learner import Learner, Metrics
from lmjax.training.placement import fitting_length, own_rows, to_devices
from lmjax.training.state import TrainState

BETA, REPLY_KL = "beta", "reply_kl"  # price of a nat, and nats of a reply, among the metrics
REFERENCE = "reference"  # the frozen model that the policy is held to
LEFT = "approximate_kl"  # of the policy that sampled, in nats of a token
GAP = "sampler_gap"  # of log-probabilities of the sampler and the trainer, in nats of a token
LARGEST_GAP = 0.05  # in the mean over tokens; a quarter of the usual clip of the ratio
VALUE_METRICS = ("value_loss", "value_error", "value_clip_fraction")
ADVANTAGES = {
    "group_relative": group_relative,
    "group_centred": functools.partial(group_relative, scaled=False),
    "leave_one_out": leave_one_out,
    "reinforce_plus_plus": reinforce_plus_plus,
}
Numbers = Float[np.ndarray, "replies length"]


class PolicyStep:
    """The steps of a `PolicyOptimization`: a function of the state and the step, for the loop."""

    def __init__(
        self,
        job: Any,
        learner: Learner,
        feed: RolloutFeed,
        examples: Iterator[tuple[list[RolloutRequest], Example | None]],
        frozen: Mapping[str, dict],
    ) -> None:
        """A mesh must be set, that of the learner.

        Args:
          job: the settings, a `PolicyOptimization`, whose module imports this one.
          learner: of the job.
          feed: tokenizer, rewards, and metrics of the step before.
          examples: requests of the steps to come, each with its rows of text.
          frozen: parameters of the model that the policy is held to, as `Learner.begun` has them,
            and of those of `elastic`.
        """
        self.job, self.feed, self.examples, self.reference = job, feed, examples, frozen[REFERENCE]
        self.frozen = (frozen,) if learner.frozen else ()  # what the loss of an update reads
        self.layout, self.before = learner.layout, dict(feed.before)
        self.policy, self.critic = learner, None
        if job.value_network is not None:
            self.policy, self.critic = learner.policy, learner.critic
            self.value_scorer = ValueScorer(self.critic.model, self.layout)
        temperature = job.objective.temperature
        self.scorer = Scorer(job.model, self.layout, temperature, job.has_value_head)
        self.warm_up = None
        if job.value_warmup and self.critic is None:
            self.warm_up = critic_step(learner, job.objective)
        self.most = job.microbatch * job.length  # tokens of replies that are computed at once
        models = [job.model] if self.critic is None else [job.model, self.critic.model]
        self.share = job.samples > 1 and all(can_share(one, self.layout) for one in models)
        self.told: set[str] = set()
        self.gap: tuple[int, Any] | None = None  # of a step, which may still be on the devices

    def __call__(self, state: TrainState, step: int) -> tuple[TrainState, Metrics, int]:
        """See `lmjax.training.loop.Advance`."""
        job = self.job
        requests, text = next(self.examples)
        seed = random_bits(job.seed, step).item() % 2**31
        found = sample_replies(
            Generator(job.model, state.params, merge=False),
            self.feed.tokenizer,
            self.feed.template,
            requests,
            job.sampling,
            job.reply_length,
            seed,
            job.samples,
        )
        self.check_ends(found, step)
        self.tell_gap()
        scores, means = total_rewards(self.feed.rewards, [one.reply for one in found])
        further = {"reward": scores.mean(), **{f"reward_{k}": v for k, v in means.items()}}
        if job.whiten_rewards:
            every = jnp.ones(scores.shape, bool)
            scores = np.asarray(whiten(jnp.asarray(scores, jnp.float32), every))
        longest = max(len(one.reply.tokens) for one in found)
        rows = make_rows(found, fitting_length(longest, job.length, self.layout))
        packing = self.arrange(*inputs_of(rows), np.arange(job.replies))
        policy, sampled = self.policy_scores(state, found, rows, packing)
        held_to = self.policy.trained.whole(self.reference, state.params)
        reference = self.scorer.score(held_to, rows, packing, self.most)
        del held_to  # of a stack that is trained in part, it has a copy
        log_probs = policy.log_probs, reference.log_probs
        beta, estimator = self.beta(step), (job.reward_kl or FixedKL()).estimator
        rewards, reply_kl = divergence_rewards(rows, scores, *log_probs, beta, estimator)
        values = policy.values
        if self.critic is not None:
            values = self.value_scorer.score(state.critic.params, rows, packing, self.most)
        advantages, critic = self.advantages(rows, np.asarray(rewards), values)
        if job.scores_replies:
            example = make_example(rows, *log_probs, advantages, critic)
        else:
            example = make_example(rows, None, reference.log_probs, advantages, critic, sampled)
        if step <= job.value_warmup:
            text = None
        state, metrics = self.updates(state, example, text, step)
        further["reply_tokens"] = rows.reply_lengths.mean()
        further["ended"] = np.mean([one.reply.ended for one in found])
        if job.scores_replies and job.sampling.temperature == 1:
            written = inputs_of(rows)[1].weights > 0
            gaps = np.abs(policy.log_probs - sampled)
            further[GAP] = np.mean(gaps, where=written) if written.any() else 0.0
        self.before = {BETA: beta, REPLY_KL: reply_kl}
        metrics |= {k: jnp.float32(v) for k, v in (further | self.before).items()}
        self.gap = step, metrics.get(GAP)
        tokens = packing.rows * packing.length + (0 if text is None else count_tokens(text))
        return state, metrics, tokens

    def arrange(
        self, batch: Batch, answers: TokenTargets, replies: Int[np.ndarray, "rows"]
    ) -> Rows:
        """Places for replies, a row each with its request, which all of a step may share.

        One of several updates has few replies to a request, and how many changes with each.

        Args:
          batch, answers: as `inputs_of` gives them.
          replies: number of each reply among those of the step.
        """
        job = self.job
        requests = replies // job.samples if self.share and len(replies) == job.replies else None
        longest = job.data.length, job.reply_length
        return arrange(batch, answers.weights > 0, requests, longest, self.layout, self.most)

    def policy_scores(
        self,
        state: TrainState,
        rollouts: Sequence[Rollout],
        rows: RolloutRows,
        packing: Rows,
    ) -> tuple[Scores, Numbers]:
        """Scores by the policy that sampled, and its log-probabilities as the sampler gave them.

        Where the one update of a step computes the former anyway, the latter stand for them.
        """
        sampled = sampled_log_probs(rollouts, rows)
        if not self.job.scores_replies:
            return Scores(sampled, None), sampled
        return self.scorer.score(state.params, rows, packing, self.most), sampled

    def advantages(
        self, rows: RolloutRows, rewards: Numbers, values: Numbers | None
    ) -> tuple[Numbers, tuple[Numbers, Numbers] | None]:
        """Advantages of tokens, and the critic's values with what they should be.

        Args:
          rows: requests and replies, those of a request one after another.
          rewards: of their tokens.
          values: of the critic; None where there is none.
        """
        if self.job.has_critic:
            mask = inputs_of(rows)[1].weights > 0
            found = critic_advantages(rewards, values, mask, self.job.gae_lambda)
            advantages, returns = jax.device_get(found)
            return advantages, (values, returns)
        groups = jnp.asarray(rewards.sum(axis=1).reshape(-1, self.job.samples), jnp.float32)
        each = np.asarray(ADVANTAGES[self.job.advantage](groups)).reshape(-1, 1)
        return np.broadcast_to(each, rewards.shape).copy(), None

    def beta(self, step: int) -> Float[jax.Array, ""]:
        """Price of a nat of divergence in the reward of a step, counted from 1.

        At the first step of this process, the metrics of the step before are those that the run
        has written, whose nine digits give back every bit of a float32.
        """
        control = self.job.reward_kl
        if control is None or step == 1:
            return jnp.float32(0.0 if control is None else control.beta)
        if BETA not in self.before:
            raise UserError(
                f"{self.job.output}: metrics.jsonl lacks {BETA} of step {step - 1}, from which "
                "reward_kl goes on"
            )
        beta, kl = (jnp.float32(self.before[name]) for name in (BETA, REPLY_KL))
        return jnp.float32(control.update(beta, kl, self.job.replies))

    def updates(
        self, state: TrainState, example: Example, text: Example | None, step: int
    ) -> tuple[TrainState, Metrics]:
        """All updates of a step, each with its rows of text, and the means of their metrics."""
        job, found = self.job, []
        warms_up = step <= job.value_warmup
        for epoch in range(job.epochs):
            order = np.argsort(random_bits(job.seed, step, epoch, np.arange(job.replies)))
            for number, part in enumerate(np.split(order, job.updates)):
                replies = jax.tree.map(lambda a, part=part: a[part], example)
                packing = self.arrange(replies.inputs, replies.targets.answers, part)
                own = None
                if text is not None:
                    own = jax.tree.map(lambda a, n=number: np.split(a, job.updates)[n], text)
                state, metrics = self.update(state, packed(replies, packing), own, warms_up)
                found.append(metrics)
                if not warms_up and self.has_left(metrics):
                    return state, mean_metrics(found)
        return state, mean_metrics(found)

    def has_left(self, metrics: Metrics) -> bool:
        """Returns whether an update found the policy too far from the one that sampled."""
        limit = self.job.stop_kl
        return limit is not None and float(metrics[LEFT]) > limit

    def update(
        self, state: TrainState, rows: Example, text: Example | None, warms_up: bool
    ) -> tuple[TrainState, Metrics]:
        """One update, of the critic alone while it warms up."""
        if self.critic is None:
            example = self.on_devices(rows, text)
            if warms_up:
                return self.warm_up(state, example)
            state, metrics = self.policy.compiled_step(state, example, *self.frozen)
            return state, metrics if text is None else policy_names(metrics)
        policy, critic = split_states(state)
        critic, learnt = self.critic.compiled_step(critic, self.on_devices(rows, None))
        if warms_up:
            return join_states(policy, critic), learnt
        targets = dataclasses.replace(rows.targets, values=None, returns=None)
        rows = self.on_devices(Example(rows.inputs, targets), text)
        policy, metrics = self.policy.compiled_step(policy, rows, *self.frozen)
        metrics = metrics if text is None else policy_names(metrics)
        metrics |= {name: learnt[name] for name in VALUE_METRICS}
        metrics["value_gradient_norm"] = learnt["gradient_norm"]
        return join_states(policy, critic), metrics

    def on_devices(self, rows: Example, text: Example | None) -> Example:
        """Replies, and perhaps this process's rows of text, on the devices."""
        rows = own_rows(rows)
        example = rows if text is None else join_examples([rows, text])
        return to_devices(example, self.layout, self.job.model.vocab_size)

    def check_ends(self, rollouts: Sequence[Rollout], step: int) -> None:
        """Raises UserError, or tells once, that no reply of a step has come to its end.

        The first step raises unless `allow_cut_off` is set: such a policy has mostly not learnt
        the end of a reply, or another format than that of the requests.
        """
        if any(one.reply.ended for one in rollouts):
            return
        length = f"were cut off after reply_length={self.job.reply_length} tokens"
        if step == 1 and not self.job.allow_cut_off:
            raise UserError(
                f"all {len(rollouts)} replies of the first step {length}: give a longer one, or a "
                "policy that ends its replies, in the format of the requests; or go on all the "
                "same with allow_cut_off=true"
            )
        self.tell_once(
            f"step {step}: all {len(rollouts)} replies {length}; a longer one lets them end, and "
            "the reward CutOff makes them shorter",
            "cut off",
        )

    def tell_gap(self) -> None:
        """Tells once that in the step before the sampler and the trainer differed by too much."""
        step, gap = self.gap or (0, None)
        if gap is not None and (found := float(gap)) > LARGEST_GAP:
            self.tell_once(
                f"step {step}: log-probabilities of the sampler and of the trainer differ by "
                f"{found:.3f} nats a token, more than {LARGEST_GAP}: the policy that is trained is "
                "not quite the one that samples (model.dtype=float32 computes both more exactly)",
                GAP,
            )

    def tell_once(self, words: str, what: str) -> None:
        """Tells what has not been told before."""
        if what not in self.told:
            self.told.add(what)
            tell(words)


@jax.jit
def mean_metrics(found: Sequence[Metrics]) -> Metrics:
    """Means of the metrics of some updates, and their number."""
    means = jax.tree.map(lambda *values: sum(values) / len(values), *found)
    return means | {"updates": jnp.float32(len(found))}
