"""Every function gives on a mesh, with rows and tokens cut, the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.alignment import (
    DPO,
    KTO,
    ORPO,
    AnswerMean,
    Answers,
    ClippedPolicy,
    FixedLengthMean,
    SampledTargets,
    clipped_value_sums,
    generalized_advantages,
    group_relative,
    k3,
    kto_divergence,
    leave_one_out,
    ranking_loss,
    reinforce_plus_plus,
    spread,
    sum_segments,
    token_rewards,
    whiten,
)
from lmjax.models import Batch
from lmjax.objectives import Example, TokenTargets
from lmjax.parallel import Mesh, training_layout

ROWS, LENGTH = 8, 6
pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, real or simulated")


def answers(a):
    return Answers(-jnp.abs(a["x"]) - 1, a["lengths"].astype(jnp.float32), -jnp.abs(a["y"]) - 1)


def policy(a, average):
    objective = ClippedPolicy(average=average, kl=0.1, entropy=0.01)
    tokens = TokenTargets(a["segments"], a["mask"].astype(jnp.float32))
    rows = Batch(a["segments"], a["segments"], a["segments"])
    example = Example(rows, SampledTargets(tokens, a["q"], a["r"], a["p"]))
    return objective.sums(a["p"], a["r"], objective.normalise(example).targets)


# x, y: a number of each row; p, q, r: of each token; grid: of each answer to each prompt.
FUNCTIONS = {
    "sum_segments": lambda a: sum_segments(a["p"], a["mask"], a["segments"], 3),
    "spread": lambda a: spread(a["x"], a["mask"]),
    "whiten": lambda a: whiten(a["p"], a["mask"]),
    "gae": lambda a: generalized_advantages(a["p"], a["q"], a["mask"], a["x"]),
    "gae_ended": lambda a: generalized_advantages(a["p"], a["q"], a["mask"]),
    "leave_one_out": lambda a: leave_one_out(a["grid"]),
    "grpo": lambda a: group_relative(a["grid"], a["grid"] > 0),
    "reinforce_plus_plus": lambda a: reinforce_plus_plus(a["grid"]),
    "token_rewards": lambda a: token_rewards(a["x"], k3(a["p"], a["q"]), a["mask"], 0.1),
    "ranking": lambda a: ranking_loss(a["grid"], a["ranks"], a["grid"] > -1, centring=0.1),
    "dpo": lambda a: DPO().sums(answers(a), answers(a)),
    "orpo": lambda a: ORPO().sums(answers(a), answers(a)),
    "kto": lambda a: KTO().sums(answers(a), a["x"] > 0, kto_divergence(answers(a))),
    "values": lambda a: clipped_value_sums(a["p"], a["q"], a["r"], a["mask"]),
    "grpo_loss": lambda a: policy(a, AnswerMean()),
    "dr_grpo_loss": lambda a: policy(a, FixedLengthMean(length=9)),
}


def arrays():
    random = np.random.default_rng(0)
    mask = random.random((ROWS, LENGTH)) < 0.7
    mask[2] = False
    return {
        **{name: random.normal(size=ROWS).astype(np.float32) for name in "xy"},
        **{name: random.normal(size=(ROWS, LENGTH)).astype(np.float32) for name in "pqr"},
        "mask": mask,
        "lengths": random.integers(1, 4, ROWS).astype(np.int32),
        "segments": random.integers(1, 4, (ROWS, LENGTH)).astype(np.int32),
        "grid": random.normal(size=(ROWS, 5)).astype(np.float32),
        "ranks": random.integers(0, 3, (ROWS, 5)).astype(np.int32),
    }


def test_numbers_on_a_mesh_are_those_of_one_device():
    """Rows over fsdp and tokens over context; the numbers of all functions in one program."""
    every = jax.jit(lambda a: {name: function(a) for name, function in FUNCTIONS.items()})
    expected = every(jax.tree.map(jnp.asarray, arrays()))
    layout = training_layout()
    with jax.set_mesh(Mesh(fsdp=4, context=2).build(jax.devices()[:8])):
        axes = {1: ("batch",), 2: ("batch", "seq")}
        given = {
            name: layout.reshard(
                jnp.asarray(a), *(("batch", None) if a.shape[1:] == (5,) else axes[a.ndim])
            )
            for name, a in arrays().items()
        }
        found = every(given)
    for name in FUNCTIONS:
        pairs = zip(jax.tree.leaves(found[name]), jax.tree.leaves(expected[name]), strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=name)
