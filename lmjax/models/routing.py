"""Routers of mixtures of experts: which experts compute which tokens, and with what weights.

A row of a batch is what GShard calls a group: capacities, the order in which tokens are taken, and
the balance of the load are of each row alone. So a token's output, the losses and the dropped
tokens depend neither on the microbatches nor on the mesh. Padding is never routed.
"""

from __future__ import annotations

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmjax.config import UserError, config, replace

# Sums over the tokens of a row, before the load of each expert.
TOKENS, BALANCE, SQUARES, CHOICES, DROPPED = range(5)
SUMS = 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choices:
    """Experts of each token.

    Attributes:
      experts: their numbers; that of no expert, which is one more than the last, for padding.
      weights: of their outputs.
    """

    experts: Int[Array, "*tokens chosen"]
    weights: Float[Array, "*tokens chosen"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Tokens of each expert, at most its capacity of each row.

    Attributes:
      tokens: indices in the row; the length of the row where a slot is empty.
      weights: of the expert's output, 0 where a slot is empty.
    """

    tokens: Int[Array, "batch experts slots"]
    weights: Float[Array, "batch experts slots"]


@config
class Router(abc.ABC):
    """Base of the routers, which compute in float32."""

    z_loss: float = 0.001  # weight of log(sum of exp(logits))^2, summed over layers (ST-MoE)
    jitter: float = 0.0  # in training the router's input is multiplied by 1 +- jitter (Switch)

    def validate(self) -> None:
        """Raise UserError for numbers that cannot be meant."""
        if self.z_loss < 0:
            raise UserError(f"router.z_loss={self.z_loss}: must be 0 or more")
        if not 0 <= self.jitter < 1:
            raise UserError(f"router.jitter={self.jitter}: must be 0 or more, and below 1")

    def check(self, experts: int) -> None:
        """Raises UserError where there are too few experts for it."""
        if (used := self.uses(experts)) > experts:
            raise UserError(
                f"feed_forward.experts={experts}: {type(self).__name__} takes {used:g} for a token"
            )

    @property
    def architecture(self) -> Router:
        """The router without settings of training."""
        return replace(self, z_loss=0.0, jitter=0.0)

    @abc.abstractmethod
    def uses(self, experts: int) -> float:
        """Number of experts that compute a token, on average and without drops."""

    @property
    def drops(self) -> bool:
        """True where experts have a capacity, above which tokens are dropped."""
        return True

    def room(self, experts: int) -> float:
        """Rows that the experts compute for each token, empty slots included."""
        return self.uses(experts)

    @abc.abstractmethod
    def slots(
        self, logits: Float[Array, "batch seq experts"], real: Bool[Array, "batch seq"]
    ) -> tuple[Slots, Float[Array, "batch sums"]]:
        """Tokens of each expert within its capacity, and the sums of each row.

        Args:
          logits: of the experts, for whole rows.
          real: which tokens are no padding.
        """

    def loss(self, sums: Float[Array, "... sums"]) -> Float[Array, "..."]:
        """Auxiliary losses with their weights, summed over tokens."""
        return self.z_loss * sums[..., SQUARES]

    def measures(self, sums: Float[Array, "layers sums"]) -> dict[str, Float[Array, ""]]:
        """Metrics of a batch from its sums: means over layers, and the loss, a sum over them.

        "expert_load" is the largest load of an expert over the mean one, "dropped" the share of
        choices above the capacity.
        """
        tokens, loads = sums[:, TOKENS], sums[:, SUMS:]
        routed = tokens > 0  # not in layers that are frozen

        def mean(values: jax.Array, over: jax.Array) -> jax.Array:
            return jnp.sum(values) / jnp.where(jnp.sum(over) > 0, jnp.sum(over), 1)

        largest, total = jax.lax.top_k(loads, 1)[0][:, 0], jnp.sum(loads, axis=1)
        imbalance = loads.shape[1] * largest / jnp.where(total > 0, total, 1)
        each = jnp.where(routed, self.loss(sums) / jnp.where(routed, tokens, 1), 0)
        return {
            "auxiliary_loss": jnp.sum(each),
            "balance_loss": mean(sums[:, BALANCE], tokens),
            "router_z_loss": mean(sums[:, SQUARES], tokens),
            "expert_load": mean(imbalance, routed),
            "dropped": mean(sums[:, DROPPED], sums[:, CHOICES]),
        }


@config
class TopKRouter(Router):
    """Each token takes the experts with the largest logits (Shazeer et al. 2017).

    Switch Transformers (Fedus et al. 2021, arXiv:2101.03961) take one, GShard (Lepikhin et al.
    2020, arXiv:2006.16668) and Mixtral (Jiang et al. 2024, arXiv:2401.04088) two.
    """

    chosen: int = 2  # experts of a token
    # weights of the chosen experts add up to 1 (Mixtral); false: they are probabilities among all
    # experts (Switch)
    normalise: bool = True
    # tokens of a row that an expert takes, as a multiple of its even share; none: all that choose
    # it, and no token is dropped
    capacity: float | None = None
    balance: float = 0.01  # weight of the load-balance loss, summed over layers (Switch)

    def validate(self) -> None:
        """Raise UserError for numbers that cannot be meant."""
        Router.validate(self)
        if self.chosen < 1:
            raise UserError(f"router.chosen={self.chosen}: must be 1 or more")
        if self.chosen == 1 and self.normalise:
            raise UserError(
                "router.chosen=1 with router.normalise=true: the one weight is always 1, so the"
                " router learns nothing; set router.normalise=false"
            )
        if self.capacity is not None and self.capacity <= 0:
            raise UserError(f"router.capacity={self.capacity}: must be above 0, or none")
        if self.balance < 0:
            raise UserError(f"router.balance={self.balance}: must be 0 or more")

    @property
    def architecture(self) -> TopKRouter:
        """See `Router.architecture`."""
        return replace(self, z_loss=0.0, jitter=0.0, balance=0.0)

    def uses(self, experts: int) -> float:
        """See `Router.uses`."""
        return float(self.chosen)

    @property
    def drops(self) -> bool:
        """See `Router.drops`."""
        return self.capacity is not None

    def room(self, experts: int) -> float:
        """See `Router.room`."""
        return self.chosen * (1.0 if self.capacity is None else self.capacity)

    def choose(
        self, logits: Float[Array, "batch seq experts"], real: Bool[Array, "batch seq"]
    ) -> tuple[Choices, Float[Array, "batch sums"]]:
        """Experts of each token, none dropped, and the sums of each row; see `slots`.

        The balance loss is experts * sum over experts of f P, with f the share of the row's choices
        that fall on an expert and P its mean probability (Switch, equation 4): 1 where all is even,
        however many experts a token takes.
        """
        experts = logits.shape[2]
        probabilities = jax.nn.softmax(logits, axis=2)
        weights, chosen = jax.lax.top_k(probabilities, self.chosen)
        if self.normalise:
            weights = weights / jnp.sum(weights, axis=2, keepdims=True)
        choices = Choices(
            experts=jnp.where(real[..., None], chosen, experts),
            weights=jnp.where(real[..., None], weights, 0),
        )
        loads = jnp.sum(jax.nn.one_hot(choices.experts, experts), axis=(1, 2))
        tokens = jnp.sum(real, axis=1, dtype=jnp.float32)
        mass = jnp.sum(jnp.where(real[..., None], probabilities, 0), axis=1)
        balance = jnp.sum(loads * mass, axis=1) * experts
        balance = balance / (self.chosen * jnp.where(tokens > 0, tokens, 1))
        none = jnp.zeros_like(tokens)
        columns = tokens, balance, _squares(logits, real), tokens * self.chosen, none
        return choices, jnp.concatenate([jnp.stack(columns, axis=1), loads], axis=1)

    def slots(
        self, logits: Float[Array, "batch seq experts"], real: Bool[Array, "batch seq"]
    ) -> tuple[Slots, Float[Array, "batch sums"]]:
        """See `Router.slots`.

        First choices go before second ones, and earlier tokens before later ones.
        """
        choices, sums = self.choose(logits, real)
        _, length, experts = logits.shape
        capacity = _capacity(self.chosen * self.capacity * length / experts, length)

        def assign(numbers: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
            numbers, weights = numbers.T.reshape(-1), weights.T.reshape(-1)  # first choices first
            ones = jax.nn.one_hot(numbers, experts, dtype=jnp.int32)
            slot = jnp.sum((jnp.cumsum(ones, axis=0) - 1) * ones, axis=1)
            slot = jnp.where(numbers < experts, slot, capacity)
            tokens = jnp.tile(jnp.arange(length, dtype=jnp.int32), self.chosen)
            empty = jnp.full((experts, capacity), length, jnp.int32)
            nothing = jnp.zeros((experts, capacity), weights.dtype)
            taken = empty.at[numbers, slot].set(tokens, mode="drop")
            given = nothing.at[numbers, slot].set(weights, mode="drop")
            dropped = jnp.sum((numbers < experts) & (slot >= capacity), dtype=jnp.float32)
            return taken, given, dropped

        tokens, weights, dropped = jax.vmap(assign)(choices.experts, choices.weights)
        return Slots(tokens, weights), sums.at[:, DROPPED].set(dropped)

    def loss(self, sums: Float[Array, "... sums"]) -> Float[Array, "..."]:
        """See `Router.loss`."""
        return Router.loss(self, sums) + self.balance * sums[..., BALANCE]


@config
class ExpertChoiceRouter(Router):
    """Each expert takes the tokens of a row with its largest probabilities (Zhou et al. 2022).

    The load is even by construction (arXiv:2202.09368). A token's experts depend on those after it
    in the row, so a model that continues texts learns with a little knowledge of what comes, and
    cannot generate.
    """

    capacity: float = 2.0  # experts that a token has, on average

    def validate(self) -> None:
        """Raise UserError for numbers that cannot be meant."""
        Router.validate(self)
        if self.capacity <= 0:
            raise UserError(f"router.capacity={self.capacity}: must be above 0")

    def uses(self, experts: int) -> float:
        """See `Router.uses`."""
        return self.capacity

    def slots(
        self, logits: Float[Array, "batch seq experts"], real: Bool[Array, "batch seq"]
    ) -> tuple[Slots, Float[Array, "batch sums"]]:
        """See `Router.slots`; choices are tokens here, dropped ones those that no expert takes."""
        _, length, experts = logits.shape
        probabilities = jax.nn.softmax(logits, axis=2)
        masked = jnp.where(real[..., None], probabilities, -1)
        capacity = _capacity(self.capacity * length / experts, length)
        weights, tokens = jax.lax.top_k(jnp.swapaxes(masked, 1, 2), capacity)
        full = weights >= 0  # others are padding
        tokens = jnp.where(full, tokens, length)

        def covered(tokens: jax.Array) -> jax.Array:
            seen = jnp.zeros(length, jnp.float32)
            return jnp.sum(seen.at[tokens.reshape(-1)].set(1, mode="drop"))

        count = jnp.sum(real, axis=1, dtype=jnp.float32)
        columns = (
            count,
            jnp.zeros_like(count),
            _squares(logits, real),
            count,
            count - jax.vmap(covered)(tokens),
        )
        loads = jnp.sum(full, axis=2, dtype=jnp.float32)
        sums = jnp.concatenate([jnp.stack(columns, axis=1), loads], axis=1)
        return Slots(tokens, jnp.where(full, weights, 0)), sums


def _capacity(share: float, length: int) -> int:
    """Slots of an expert in a row: its share, rounded up, at most one for each token."""
    return min(length, max(1, math.ceil(share)))


def _squares(logits: jax.Array, real: jax.Array) -> jax.Array:
    """Sums over rows of log(sum of exp(logits))^2 (ST-MoE: Zoph et al. 2022, arXiv:2202.08906)."""
    return jnp.sum(jnp.where(real, jnp.square(jax.nn.logsumexp(logits, axis=2)), 0), axis=1)
