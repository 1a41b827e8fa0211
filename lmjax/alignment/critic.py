"""A critic on the policy's own model: advantages of its values, and updates of it alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lmjax.alignment.advantages import generalized_advantages, whiten
from lmjax.alignment.policy_objective import VALUE, ClippedPolicy, target_states, values_of
from lmjax.config import config, fields
from lmjax.models import TokenHeadConfig, Transformer, TransformerConfig
from lmjax.objectives import Example, Sums
from lmjax.training.learner import Learner, Metrics
from lmjax.training.state import TrainState

HEAD = TokenHeadConfig(name=VALUE, outputs=1)


def has_critic(model: TransformerConfig) -> bool:
    """Returns whether a model gives each token a value."""
    return any(
        isinstance(head, TokenHeadConfig) and (head.name, head.outputs) == (VALUE, 1)
        for head in model.heads
    )


@functools.partial(jax.jit, static_argnames="decay")
def critic_advantages(
    rewards: Float[Array, "rows seq"],
    values: Float[Array, "rows seq"],
    mask: Bool[Array, "rows seq"],
    decay: float,
) -> tuple[Float[Array, "rows seq"], Float[Array, "rows seq"]]:
    """Advantages by `generalized_advantages`, whitened over all real tokens, and returns.

    Rewards are not discounted, as in InstructGPT. Nothing comes after a reply that was cut off.

    Args:
      rewards: of each token.
      values: of the critic before it.
      mask: tokens that the policy wrote, of the whole batch.
      decay: the lambda of the estimate.
    """
    advantages, returns = generalized_advantages(rewards, values, mask, decay=decay)
    return whiten(advantages, mask), returns


@config
class CriticAlone(ClippedPolicy):
    """The critic's loss of a `ClippedPolicy`, whose gradient does not enter the trunk."""

    def loss(
        self, model: Transformer, example: Example, key: PRNGKeyArray | None, frozen: Any = None
    ) -> Sums:
        """Sums over the tokens that the policy wrote."""
        hidden = jax.lax.stop_gradient(target_states(model, example.inputs))
        values = values_of(model, hidden, example.inputs)
        sums = self.critic_sums(values, example.targets)
        return dataclasses.replace(sums, loss=self.value * sums.loss)


def critic_step(
    learner: Learner, policy: ClippedPolicy
) -> Callable[[TrainState, Example], tuple[TrainState, Metrics]]:
    """A step, compiled, that trains the head of values and leaves all other parameters as they are.

    It takes over the state that it is given. The optimizer counts the step.

    Args:
      learner: of the policy.
      policy: its objective; the settings of the critic's loss are taken from it.
    """
    settings = {name: getattr(policy, name) for name in fields(ClippedPolicy)}
    alone = dataclasses.replace(learner, objective=CriticAlone(**settings), frozen={})

    def head_of(new: Any, old: Any) -> Any:
        """The tree `old` with the head of values of `new`: weights decay without a gradient too."""
        return jax.tree.map_with_path(
            lambda path, n, o: n if [part.key for part in path[:2]] == ["heads", VALUE] else o,
            new,
            old,
        )

    def step(state: TrainState, example: Example) -> tuple[TrainState, Metrics]:
        new, metrics = alone.step(state, example)
        params, average = (
            None if old is None else head_of(now, old)
            for now, old in ((new.params, state.params), (new.average, state.average))
        )
        return dataclasses.replace(new, params=params, average=average), metrics

    return jax.jit(step, donate_argnums=0)
