"""The same numbers through the trainers of TRL 1.16.0, where it is installed.

    python -m pytest -m slow tests/lmjax/alignment/test_trl.py   (with the extra parity)

The losses of its trainers are called with a fake model, which returns given log-probabilities. So
the formula alone is compared, to 1e-5.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.alignment import (
    DPO,
    IPO,
    KTO,
    ORPO,
    AnswerMean,
    Answers,
    ClippedPolicy,
    FixedLengthMean,
    HingeDPO,
    SampledTargets,
    SimPO,
    TokenMean,
    group_relative,
    kto_divergence,
    leave_one_out,
    ranking_loss,
    spread,
)
from lmjax.models import plain_batch
from lmjax.objectives import Example, TokenTargets
from tests.trl_cases import NEEDS_TRL

pytestmark = NEEDS_TRL
ROWS, LENGTH = 6, 9


def trainer(**settings):
    """An object with what the losses of a trainer read of it, in one process, in evaluation."""
    import torch

    same = lambda a, *_, **__: a  # noqa: E731
    accelerator = types.SimpleNamespace(
        device=torch.device("cpu"),
        gather=same,
        gather_for_metrics=same,
        reduce=same,
        num_processes=1,
    )
    numbers = collections.defaultdict(lambda: collections.defaultdict(list))
    return types.SimpleNamespace(
        accelerator=accelerator,
        model=types.SimpleNamespace(training=False),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=numbers,
        _total_train_tokens=0,
        **settings,
    )


def model_with(log_probs):
    """A function that returns log-probabilities of the next tokens, whatever it is given."""
    import torch

    log_probs = torch.tensor(log_probs)
    zeros = torch.zeros_like(log_probs)
    return lambda **_: types.SimpleNamespace(
        log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )


def completions(seed, rows=ROWS):
    """Log-probabilities of tokens, masks of answers and their sums and lengths."""
    random = np.random.default_rng(seed)
    mask = np.arange(LENGTH) < random.integers(1, LENGTH, rows)[:, None]
    log_probs = np.where(mask, -2 * random.random(mask.shape), 0).astype(np.float32)
    reference = (log_probs.sum(axis=1) + random.normal(size=rows)).astype(np.float32)
    return log_probs, mask, reference


def answers_of(log_probs, mask, reference, rows=slice(None)):
    arrays = log_probs.sum(axis=1), mask.sum(axis=1).astype(np.float32), reference
    return Answers(*(jnp.asarray(a[rows]) for a in arrays))


DPO_LOSSES = {
    "sigmoid": DPO(beta=0.3),
    "hinge": HingeDPO(beta=0.3),
    "ipo": IPO(beta=0.3),
}


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_dpo(name):
    """The first half of the rows is chosen."""
    import torch
    from trl import DPOTrainer

    log_probs, mask, reference = completions(0)
    half = ROWS // 2
    own = trainer(
        loss_types=[name],
        loss_weights=[1.0],
        beta=0.3,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
    )
    inputs = {
        "input_ids": torch.zeros((ROWS, LENGTH + 1), dtype=torch.long),
        "attention_mask": torch.ones((ROWS, LENGTH + 1)),
        "completion_mask": torch.tensor(np.pad(mask, ((0, 0), (1, 0)))).long(),
        "ref_chosen_logps": torch.tensor(reference[:half]),
        "ref_rejected_logps": torch.tensor(reference[half:]),
    }
    expected = DPOTrainer._compute_loss(own, model_with(log_probs), inputs, False)
    sides = (answers_of(log_probs, mask, reference, s) for s in (slice(half), slice(half, None)))
    sums = DPO_LOSSES[name].sums(*sides)
    np.testing.assert_allclose(sums.loss / sums.weight, expected, rtol=1e-5)
    if name != "ipo":  # whose rewards there are not those of its loss
        metrics = own._metrics["eval"]
        for metric, theirs in {
            "margin": "rewards/margins",
            "accuracy": "rewards/accuracies",
            "chosen_reward": "rewards/chosen",
        }.items():
            found = float(sums.extra[metric] / sums.weight)
            assert found == pytest.approx(metrics[theirs][0], rel=1e-5)


def test_kto():
    import torch
    from trl import KTOTrainer

    log_probs, mask, reference = completions(1)
    others, other_mask, other_reference = completions(2)
    wanted = np.array([True, False, True, True, False, False])
    own = trainer(
        loss_type="kto",
        beta=0.3,
        calculate_KL=True,
        desirable_weight=1.33,
        undesirable_weight=0.5,
        _compute_kl_logps=lambda model, batch: torch.tensor(others.sum(axis=1)),
    )
    inputs = {
        "input_ids": torch.zeros((ROWS, LENGTH + 1), dtype=torch.long),
        "attention_mask": torch.ones((ROWS, LENGTH + 1)),
        "completion_mask": torch.tensor(np.pad(mask, ((0, 0), (1, 0)))).long(),
        "label": torch.tensor(wanted),
        "ref_logps": torch.tensor(reference),
        "ref_KL_logps": torch.tensor(other_reference),
    }
    expected = KTOTrainer._compute_loss(own, model_with(log_probs), inputs, False)
    kl = kto_divergence(answers_of(others, other_mask, other_reference))
    sums = KTO(beta=0.3, desirable=1.33, undesirable=0.5).sums(
        answers_of(log_probs, mask, reference), jnp.asarray(wanted), kl
    )
    np.testing.assert_allclose(sums.loss / sums.weight, expected, rtol=1e-5)
    assert float(kl) == pytest.approx(own._metrics["eval"]["kl"][0], rel=1e-5)


@pytest.mark.parametrize("margins", [None, (1.0, 2 / 3, 0.0)])
@pytest.mark.parametrize("centring", [None, 0.01])
def test_reward_model(margins, centring):
    import torch
    from trl import RewardTrainer

    scores = np.random.default_rng(3).normal(size=6).astype(np.float32)
    own = trainer(args=types.SimpleNamespace(center_rewards_coefficient=centring))
    inputs = {"attention_mask": torch.ones((6, 2))}
    if margins is not None:
        inputs["margin"] = torch.tensor(margins)
    given = types.SimpleNamespace(logits=torch.tensor(scores)[:, None])
    expected = RewardTrainer.compute_loss(own, lambda **_: given, inputs)
    if margins is not None:
        margins = jnp.broadcast_to(jnp.asarray(margins)[:, None, None], (3, 2, 2))
    pairs, ranks = jnp.asarray(scores.reshape(2, 3).T), jnp.tile(jnp.arange(2), (3, 1))
    sums = ranking_loss(pairs, ranks, margins=margins, centring=centring or 0.0)
    np.testing.assert_allclose(sums.loss / sums.weight, expected, rtol=1e-5)
    for metric, theirs in {"accuracy": "accuracy", "margin": "margin"}.items():
        found = float(sums.extra[metric] / sums.weight)
        assert found == pytest.approx(own._metrics["eval"][theirs][0], rel=1e-5)


GRPO_SETTINGS = {
    "beta": 0.1,
    "epsilon_low": 0.2,
    "epsilon_high": 0.28,
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "use_vllm": False,
    "max_completion_length": 20,
    "entropy_coef": 0.01,
    "_entropy_bonus_enabled": True,
    "use_adaptive_entropy": False,
    "current_gradient_accumulation_steps": 1,
    "args": types.SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
}
GRPO_LOSSES = {
    "grpo": AnswerMean(),
    "dapo": TokenMean(),
    "dr_grpo": FixedLengthMean(length=20),
}


@pytest.mark.parametrize("name", GRPO_LOSSES)
def test_grpo(name):
    """With the divergence, the entropy's bonus and different bounds of the ratio."""
    import torch
    from trl import GRPOTrainer

    log_probs, mask, _ = completions(4)
    random = np.random.default_rng(5)
    old, reference = (
        (log_probs + 0.3 * random.normal(size=log_probs.shape)).astype(np.float32) for _ in "ab"
    )
    entropies = random.random(log_probs.shape).astype(np.float32)
    advantages = random.normal(size=ROWS).astype(np.float32)
    tensors = {
        "prompt_ids": np.zeros((ROWS, 1), int),
        "prompt_mask": np.ones((ROWS, 1), int),
        "completion_ids": np.zeros((ROWS, LENGTH), int),
        "completion_mask": mask.astype(int),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    given = torch.tensor(log_probs), torch.tensor(entropies), None
    own = trainer(
        loss_type=name, _get_per_token_logps_and_entropies=lambda *_, **__: given, **GRPO_SETTINGS
    )
    inputs = {key: torch.tensor(value) for key, value in tensors.items()}
    expected = GRPOTrainer._compute_loss(own, None, inputs)
    objective = ClippedPolicy(
        average=GRPO_LOSSES[name], clip=0.2, clip_high=0.28, kl=0.1, entropy=0.01
    )
    tokens = TokenTargets(jnp.zeros(mask.shape, jnp.int32), jnp.asarray(mask, jnp.float32))
    targets = SampledTargets(
        tokens,
        jnp.asarray(old),
        spread(jnp.asarray(advantages), jnp.asarray(mask)),
        jnp.asarray(reference),
    )
    rows = jax.tree.map(jnp.asarray, plain_batch(np.zeros(log_probs.shape, np.int32)))
    sums = objective.sums(
        jnp.asarray(log_probs),
        jnp.asarray(entropies),
        objective.normalise(Example(rows, targets)).targets,
    )
    np.testing.assert_allclose(sums.loss / sums.weight, expected, rtol=1e-5)
    for metric in ("kl", "entropy"):
        found = float(sums.extra[metric] / sums.weight)
        assert found == pytest.approx(own._metrics["eval"][metric][0], rel=1e-5)


def test_advantages_by_groups():
    """Its lines, with its own deviation, since they are in the middle of a longer function."""
    import torch
    from trl.trainer.utils import nanstd

    rewards = np.random.default_rng(6).normal(size=(5, 4)).astype(np.float32)
    grouped = torch.tensor(rewards)
    mean = torch.nanmean(grouped, dim=1, keepdim=True)
    expected = (grouped - mean) / (nanstd(grouped, dim=1)[:, None] + 1e-4)
    np.testing.assert_allclose(group_relative(jnp.asarray(rewards)), expected, atol=1e-5)
    others = (grouped.sum(dim=1, keepdim=True) - grouped) / 3
    np.testing.assert_allclose(leave_one_out(jnp.asarray(rewards)), grouped - others, atol=1e-5)


def test_simpo_and_orpo():
    """ORPO's second term; there the first is averaged over the tokens of the batch."""
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    log_probs, mask, reference = completions(7)
    half = ROWS // 2
    sides = [answers_of(log_probs, mask, reference, s) for s in (slice(half), slice(half, None))]
    means = [torch.tensor(np.asarray(side.log_probs / side.lengths)) for side in sides]
    own = trainer(loss_type="simpo", beta=2.0, simpo_gamma=0.5, alpha=0.0, label_smoothing=0.0)
    expected = CPOTrainer.cpo_loss(own, *means)[0]
    np.testing.assert_allclose(SimPO(beta=2.0, gamma=0.5).losses(*sides), expected, rtol=1e-5)
    expected = ORPOTrainer.odds_ratio_loss(trainer(beta=0.2), *means)[0]
    found = ORPO(weight=0.2).losses(*sides) + sides[0].mean_log_prob
    np.testing.assert_allclose(found, -expected, atol=1e-5)
