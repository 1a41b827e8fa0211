"""A critic that is a network of its own and begins as a reward model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from lmjax.alignment.model_reward import check_reader, find_score
from lmjax.alignment.policy_objective import VALUE, ClippedPolicy, target_states, values_of
from lmjax.config import UserError, config, replace
from lmjax.data.tokenizers import Tokenizer
from lmjax.interop.folder import model_folder, read_params
from lmjax.models import TokenHeadConfig, Transformer, TransformerConfig
from lmjax.objectives import Example, Objective, Sums
from lmjax.parallel import Layout
from lmjax.remote import check_path
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW, Optimizer
from lmjax.training.schedules import Constant, Schedule
from lmjax.training.state import TrainState


@config
class ValueNetwork:
    """A critic that begins as a reward model (Ouyang et al. 2022, arXiv:2203.02155, C.4).

    Before it is trained, its value at a token is the score of the text up to there.
    """

    folder: str  # run folder of the reward model, or a public model folder
    head: str = "reward"  # name of its head with one output
    optimizer: Optimizer = AdamW()  # turns its gradients into updates
    schedule: Schedule = Constant(peak=9e-6, warmup=0)  # its learning rate (InstructGPT)

    def validate(self) -> None:
        """Raises UserError for a path that cannot be served."""
        check_path(self.folder, "folder")

    @property
    def model(self) -> TransformerConfig:
        """The reward model with its score as a value of each token.

        Raises:
          UserError: it has no such score, or one that reads no single token.
        """
        found = model_folder(self.folder)
        score = find_score(found, self.head, f"the value network in {self.folder}")
        if score.pooler or score.token != "last":
            raise UserError(
                f"the value network in {self.folder}: the head {self.head!r} has a pooler or reads "
                "the first token, and no values of tokens can be made of it"
            )
        value = TokenHeadConfig(name=VALUE, outputs=1, bias=score.bias)
        return replace(found, word_head=False, heads=(value,), lora=None)

    def check(self, tokenizer: Tokenizer, length: int, policy: str) -> None:
        """Raises UserError where it cannot read what the policy writes; see `Reward.prepare`."""
        check_reader(self.folder, "value network", tokenizer, length, policy)

    def params(self, layout: Layout) -> dict:
        """Its parameters before the first step, on the mesh that is set."""
        model, found = self.model, model_folder(self.folder)
        score = find_score(found, self.head, self.folder)
        params = read_params(self.folder, replace(model, heads=(score,)), layout)
        return params | {"heads": {VALUE: params["heads"][self.head]}}


@config
class ValueLoss(Objective):
    """The critic's loss of a `ClippedPolicy`, for a critic that is a model of its own."""

    value_clip: float | None = 0.2  # how far a value may move in a step; none: any way

    def loss(
        self, model: Transformer, example: Example, key: PRNGKeyArray | None, frozen: Any = None
    ) -> Sums:
        """Sums over the tokens that the policy wrote."""
        hidden = target_states(model, example.inputs)
        values = values_of(model, hidden, example.inputs)
        return ClippedPolicy(value_clip=self.value_clip).critic_sums(values, example.targets)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActorCriticState(TrainState):
    """State of a policy, and that of its critic.

    Attributes:
      critic: of the value network.
    """

    critic: TrainState = dataclasses.field(kw_only=True)


@dataclasses.dataclass(frozen=True)
class ActorCriticLearner(Learner):
    """The learner of a policy, with that of its value network.

    Attributes:
      critic: learner of the value network.
      critic_params: () -> its parameters before the first step.
    """

    critic: Learner = dataclasses.field(kw_only=True)
    critic_params: Callable[[], dict] = dataclasses.field(kw_only=True)

    @functools.cached_property
    def policy(self) -> Learner:
        """The learner of the policy alone."""
        return Learner(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Learner)})

    def init(self, seed: int, params: dict | None = None) -> ActorCriticState:
        """See `Learner.init`."""
        return join_states(
            self.policy.init(seed, params), self.critic.init(seed, self.critic_params())
        )

    def abstract(self) -> ActorCriticState:
        """See `Learner.abstract`."""
        return join_states(self.policy.abstract(), self.critic.abstract())

    def compile_step(self, example: Example, frozen: Mapping[str, dict] | None = None) -> None:
        """See `Learner.compile_step`: the policy's step."""
        self.policy.compile_step(example, frozen)


def join_states(policy: TrainState, critic: TrainState) -> ActorCriticState:
    """State of both."""
    return ActorCriticState(**_fields(policy), critic=critic)


def split_states(state: ActorCriticState) -> tuple[TrainState, TrainState]:
    """States of the policy and of the critic."""
    return TrainState(**_fields(state)), state.critic


def _fields(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(TrainState)}
