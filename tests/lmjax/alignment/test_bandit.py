"""Policies on tasks of one token or two, whose optimum is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax.alignment import ClippedPolicy, group_relative, k1, leave_one_out, token_rewards
from lmjax.alignment.critic import HEAD, critic_advantages
from lmjax.alignment.policy_objective import values_of
from lmjax.alignment.rollouts import RolloutRows, divergence_rewards, inputs_of, make_example
from lmjax.config import replace
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, plain_batch
from lmjax.parallel import training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import to_devices

VOCABULARY, SAMPLES, STEPS = 6, 512, 120
MODEL = TransformerConfig(
    vocab_size=VOCABULARY,
    hidden=8,
    num_layers=1,
    max_length=2,
    attention=AttentionConfig(num_heads=2, head_dim=4),
    feed_forward=FeedForwardConfig(size=16),
    dropout=0.0,
)
REWARDS = np.array([0.0, 1.0, 0.5, -0.5, 0.8, 0.2])
BETA = 0.3


def of_price(reference):
    """Optimum of E[r] - beta KL(policy | reference)."""
    tilted = reference * np.exp(REWARDS / BETA)
    return tilted / tilted.sum()


def of_k3(reference):
    """Optimum of E[r] - beta KL(reference | policy), whose gradient is that of k3 in the loss.

    Where the gradient vanishes, policy = beta reference / (c - r), with c such that it adds to 1.
    """
    low, high = REWARDS.max(), REWARDS.max() + BETA
    for _ in range(100):
        middle = (low + high) / 2
        total = (BETA * reference / (middle - REWARDS)).sum()
        low, high = (middle, high) if total > 1 else (low, middle)
    return BETA * reference / (middle - REWARDS)


def in_reward(tokens, policy, reference):
    """Advantages of rewards with the price of divergence in them (PPO, RLOO)."""
    rewards = token_rewards(
        jnp.asarray(REWARDS[tokens], jnp.float32),
        k1(*map(jnp.asarray, (policy, reference)))[:, :1],
        jnp.ones((SAMPLES, 1), bool),
        BETA,
    )
    return leave_one_out(rewards.reshape(1, -1)).reshape(-1)


def in_loss(tokens, policy, reference):
    """Advantages of rewards alone, not over their deviation (Dr. GRPO)."""
    rewards = jnp.asarray(REWARDS[tokens], jnp.float32).reshape(1, -1)
    return group_relative(rewards, scaled=False).reshape(-1)


def distance(one, other):
    """In total variation."""
    return np.abs(one - other).sum() / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "advantages", "optimum"),
    [
        (ClippedPolicy(), in_reward, of_price),
        (ClippedPolicy(kl=BETA), in_loss, of_k3),
        (ClippedPolicy(kl=BETA, kl_estimator="k2"), in_loss, of_price),
    ],
    ids=["price", "k3", "k2"],
)
def test_the_optimum_is_reached(objective, advantages, optimum, one_device):
    """To 0.03 in total variation.

    The rate falls to 0, so that the noise of 512 samples a step averages out; the two optima are
    more than 0.1 apart, and further from the reference.
    """
    layout = training_layout()
    rate = lambda step: 0.02 * (1 - step / (2 * STEPS))  # noqa: E731
    learner = Learner(MODEL, objective, AdamW(weight_decay=0.0), rate, layout)
    state = learner.init(seed=0)

    @jax.jit
    def log_probabilities(params):
        model = nnx.merge(learner.graph, params)
        hidden, _ = model(plain_batch(np.zeros((1, 2), np.int32)))
        return jax.nn.log_softmax(model.logits(hidden)[0, 0, :VOCABULARY])

    generator = np.random.default_rng(0)
    reference = np.asarray(log_probabilities(state.params))
    for _ in range(STEPS):
        policy = np.asarray(log_probabilities(state.params))
        chances = np.exp(policy.astype(np.float64))
        tokens = generator.choice(VOCABULARY, SAMPLES, p=chances / chances.sum())
        written = np.stack([np.zeros(SAMPLES), tokens], axis=1).astype(np.int32)
        one = np.ones(SAMPLES, np.int32)
        sides = [np.stack([a[tokens], 0 * a[tokens]], axis=1) for a in (policy, reference)]
        each = np.asarray(advantages(tokens, *sides))
        each = np.stack([each, 0 * each], axis=1).astype(np.float32)
        example = make_example(RolloutRows(written, one, one), *sides, each)
        for _ in range(2):  # the second update is off the policy that sampled
            on_devices = to_devices(example, layout, VOCABULARY)
            state, _ = learner.compiled_step(state, on_devices)
    found = np.exp(np.asarray(log_probabilities(state.params), np.float64))
    reference = np.exp(reference.astype(np.float64))
    wanted = optimum(reference)
    other = of_k3 if optimum is of_price else of_price
    assert distance(found, wanted) < 0.03
    assert min(distance(wanted, reference), distance(wanted, other(reference))) > 0.1


# After the second token the first one is rewarded too: 0 is worth 0.4 whatever follows it, and 1 is
# worth most, but on average least.
TWO_STEPS = np.array([[0.4] * 4, [1.2, -0.6, -0.6, -0.6], [0.0] * 4, [0.0] * 4])


@pytest.mark.parametrize(
    ("rewards", "beta"),
    [pytest.param(REWARDS, BETA, marks=pytest.mark.slow), (TWO_STEPS, 0.2)],
    ids=["token", "two steps"],
)
def test_ppo_with_a_critic_reaches_the_optimum(rewards, beta, one_device):
    """Advantages by GAE, on rewards as in the job: at the end, less the price of divergence.

    To 0.05 in total variation over all replies, and 0.1 in the value of the beginning, whose closed
    form is beta log E exp(reward / beta) under the reference.
    """
    words, steps = len(rewards), rewards.ndim
    replies = np.stack(np.unravel_index(np.arange(rewards.size), rewards.shape), axis=1)
    written = np.pad(replies, ((0, 0), (1, 0))).astype(np.int32)
    model = replace(MODEL, vocab_size=words, max_length=steps + 1, heads=(HEAD,))
    layout, rate = training_layout(), lambda step: 0.03 * (1 - step / 160)
    learner = Learner(model, ClippedPolicy(), AdamW(weight_decay=0.0), rate, layout)
    state = learner.init(seed=0)

    @jax.jit
    def outputs(params):
        policy, batch = nnx.merge(learner.graph, params), plain_batch(written)
        hidden, _ = policy(batch)
        logits = policy.logits(hidden)[..., :words]
        return jax.nn.log_softmax(logits), values_of(policy, hidden, batch)

    def scored(params):
        """Of all replies: log-probabilities of their tokens, and values before them."""
        log_probs, values = map(np.asarray, outputs(params))
        own = np.take_along_axis(log_probs[:, :-1], replies[..., None], axis=2)[..., 0]
        return np.pad(own, ((0, 0), (0, 1))), values

    generator, (reference, _) = np.random.default_rng(0), scored(state.params)
    samples = 1024
    for _ in range(80):
        policy, values = scored(state.params)
        chances = np.exp(policy.sum(axis=1, dtype=np.float64))
        drawn = generator.choice(rewards.size, samples, p=chances / chances.sum())
        sizes = np.ones(samples, np.int32), np.full(samples, steps, np.int32)
        rows = RolloutRows(written[drawn], *sizes)
        sides = policy[drawn], reference[drawn]
        each, _ = divergence_rewards(rows, rewards.flat[drawn], *sides, jnp.float32(beta))
        mask = inputs_of(rows)[1].weights > 0
        advantages, returns = critic_advantages(each, values[drawn], mask, 0.95)
        critic = values[drawn], np.asarray(returns)
        example = make_example(rows, *sides, np.asarray(advantages), critic)
        for _ in range(2):  # the second update is off the policy that sampled
            state, _ = learner.compiled_step(state, to_devices(example, layout, words))
    policy, values = scored(state.params)
    before = np.exp(reference.sum(axis=1, dtype=np.float64))
    tilted = before * np.exp(rewards.ravel() / beta)
    wanted = tilted / tilted.sum()
    assert distance(np.exp(policy.sum(axis=1, dtype=np.float64)), wanted) < 0.05
    assert distance(before, wanted) > 0.3
    assert values[0, 0] == pytest.approx(beta * np.log(tilted.sum()), abs=0.1)
    if steps == 2:  # the first token that is best at the beginning is not that of the best reply
        mean = (before.reshape(rewards.shape) * rewards).sum(axis=1)
        greedy = np.argmax(mean / before.reshape(rewards.shape).sum(axis=1))
        assert greedy == 0 and replies[np.argmax(wanted)].tolist() == [1, 0]
