"""The feed-forward layer of a block: plain or gated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from lmjax.config import UserError, config
from lmjax.models.linear import Builder

Activation = Literal["gelu_tanh", "gelu", "relu", "silu"]


def activate(name: Activation, x: jax.Array) -> jax.Array:
    """Applies the named activation; `gelu_tanh` is GPT's approximation, `gelu` the exact one."""
    if name == "gelu_tanh":
        return jax.nn.gelu(x, approximate=True)
    if name == "gelu":
        return jax.nn.gelu(x, approximate=False)
    return {"relu": jax.nn.relu, "silu": jax.nn.silu}[name](x)


@config
class FeedForwardConfig:
    """Two dense layers with an activation between them."""

    # Whether the layer is called with facts about its rows too (`lmjax.models.experts`).
    reads_rows: ClassVar[bool] = False

    size: int = 3072  # width of the hidden layer
    activation: Activation = "gelu_tanh"  # what lies between the layers
    bias: bool = True  # biases on all dense layers

    def validate(self) -> None:
        """Raise UserError for a layer without width."""
        if self.size < 1:
            raise UserError(f"feed_forward.size={self.size}: must be 1 or more")

    @property
    def auxiliary_sums(self) -> int:
        """Number of sums that a layer measures in training (`Auxiliary.attach`)."""
        return 0

    def measures(self, sums: Float[Array, "layers sums"]) -> dict[str, Float[Array, ""]]:
        """Metrics from the sums of a batch; "auxiliary_loss" is added to the loss."""
        return {}

    @property
    def architecture(self) -> FeedForwardConfig:
        """The config without settings that change no output, only how it is trained."""
        return self

    def uses(self, path: Sequence[str]) -> float:
        """Part of the parameter at this path that a token uses, on average."""
        return 1.0

    def build(self, builder: Builder) -> nnx.Module:
        """The layer of this config."""
        return FeedForward(self, builder)


@config
class GatedFeedForwardConfig(FeedForwardConfig):
    """Gated feed-forward (Shazeer 2020): activation(x . gate) * (x . up), then down."""

    activation: Activation = "silu"  # of the gate
    bias: bool = False  # biases on all dense layers

    def build(self, builder: Builder) -> nnx.Module:
        """The layer of this config."""
        return GatedFeedForward(self, builder)


class FeedForward(nnx.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: FeedForwardConfig, builder: Builder):
        self.config = config
        embed, mlp = (("embed", builder.hidden),), (("mlp", config.size),)
        self.up = builder.linear(embed, mlp, bias=config.bias, kind="feed_forward")
        self.down = builder.linear(mlp, embed, bias=config.bias, kind="residual")

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        return self.down(activate(self.config.activation, self.up(x)))


class GatedFeedForward(FeedForward):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config: GatedFeedForwardConfig, builder: Builder):
        super().__init__(config, builder)
        axes = self.up.inputs, self.up.outputs
        self.gate = builder.linear(*axes, bias=config.bias, kind="feed_forward")

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        return self.down(activate(self.config.activation, self.gate(x)) * self.up(x))
