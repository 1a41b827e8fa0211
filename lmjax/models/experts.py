"""Mixtures of experts: feed-forward layers of which each token uses a few."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lmjax.config import UserError, config, replace
from lmjax.models.auxiliary import Auxiliary
from lmjax.models.expert_exchange import ExpertExchange, StoredMatrix, axes_of
from lmjax.models.feed_forward import Activation, FeedForwardConfig, GatedFeedForwardConfig
from lmjax.models.initializers import Kind
from lmjax.models.linear import Axes, Builder
from lmjax.models.quantized import QuantizedWeight
from lmjax.models.routing import SUMS, Router, TopKRouter
from lmjax.parallel.random import draw_rows

JITTER = 0x717E  # what is folded into the key of the layer, whose dropout takes the key itself


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutedRows:
    """Facts about the rows of activations that a layer routes.

    Attributes:
      real: which tokens are no padding.
      key: of the router's jitter; None: there is none.
      auxiliary: takes the auxiliary losses and measures; None: there are none.
      whole: whether every token is to be computed, whatever the capacity. Texts are continued so:
        what a token gives must not depend on how many are read at once.
    """

    real: Bool[Array, "batch seq"]
    key: PRNGKeyArray | None = None
    auxiliary: Auxiliary | None = None
    whole: bool = dataclasses.field(default=False, metadata={"static": True})


@config
class ExpertsConfig(FeedForwardConfig):
    """Mixture of experts: several feed-forward layers, of which a router chooses some by token."""

    reads_rows: ClassVar[bool] = True

    activation: Activation = "silu"  # between the layers of an expert; of its gate
    bias: bool = False  # biases on the dense layers of experts
    gated: bool = True  # experts are gated (Shazeer 2020)
    experts: int = 8  # experts of each layer
    router: Router = TopKRouter()  # which experts a token uses
    shared: FeedForwardConfig | None = None  # one more that all tokens use; none: there is none

    def validate(self) -> None:
        """Raise UserError for numbers that cannot be meant."""
        FeedForwardConfig.validate(self)
        if self.experts < 1:
            raise UserError(f"feed_forward.experts={self.experts}: must be 1 or more")
        self.router.check(self.experts)
        if self.shared is not None and self.shared.reads_rows:
            raise UserError("feed_forward.shared: all tokens use it, so it has no router")

    @property
    def dense(self) -> FeedForwardConfig:
        """A layer like one expert, which all tokens use."""
        kind = GatedFeedForwardConfig if self.gated else FeedForwardConfig
        return kind(size=self.size, activation=self.activation, bias=self.bias)

    @property
    def architecture(self) -> ExpertsConfig:
        """See `FeedForwardConfig.architecture`."""
        return replace(self, router=self.router.architecture)

    @property
    def auxiliary_sums(self) -> int:
        """See `FeedForwardConfig.auxiliary_sums`."""
        return SUMS + self.experts

    def measures(self, sums: Float[Array, "layers sums"]) -> dict[str, Float[Array, ""]]:
        """See `FeedForwardConfig.measures`."""
        return self.router.measures(sums)

    def uses(self, path: Sequence[str]) -> float:
        """See `FeedForwardConfig.uses`."""
        return self.router.uses(self.experts) / self.experts if "experts" in path else 1.0

    def build(self, builder: Builder) -> nnx.Module:
        """The layer of this config."""
        return Experts(self, builder)


class Experts(nnx.Module):
    """Sum over the experts of a token of weight * expert(x), plus the shared expert of x."""

    def __init__(self, config: ExpertsConfig, builder: Builder):
        self.config, self.layout, self.dtype = config, builder.layout, builder.dtype
        exact = dataclasses.replace(builder, dtype="float32")
        inputs, outputs = (("embed", builder.hidden),), ((None, config.experts),)
        self.router = exact.linear(inputs, outputs, bias=False)
        self.experts = ExpertWeights(config, builder)
        self.shared = nnx.data(None)
        if config.shared is not None:
            self.shared = config.shared.build(builder)

    def __call__(
        self, x: Float[Array, "batch seq embed"], rows: RoutedRows
    ) -> Float[Array, "batch seq embed"]:
        """The layer's output, 0 for padding and dropped tokens but for the shared expert's.

        Raises:
          UserError: texts are continued, and experts choose among tokens of a whole text.
        """
        router, layout = self.config.router, self.layout
        if rows.whole and not isinstance(router, TopKRouter):
            raise UserError(
                f"feed_forward.router={type(router).__name__}: experts choose among the tokens of a"
                " whole text, so the model cannot continue one"
            )
        logits = layout.reshard(self.logits(x, rows.key), "batch", None, None)
        real = layout.reshard(rows.real, "batch", None)
        x = layout.reshard(x.astype(self.dtype), "batch", "seq", None)
        spec = layout.spec("batch", "seq", None, shape=x.shape)
        # Where the rows are whole on each device, so are weights along `embed`.
        divided = set(layout.axes("embed")) <= set(axes_of(spec[0]))
        matrices = self.experts.matrices(whole=not divided)
        exchange = ExpertExchange.on_mesh(self.config, layout, self.dtype, spec, matrices)
        run = exchange.whole if rows.whole or not router.drops else exchange.within_capacity
        with jax.named_scope("experts"):
            out, sums = exchange.mapped(run, spec)(x, logits, real, matrices)
        if self.shared is not None:
            out = out + self.shared(x)
        if rows.auxiliary is None:
            return out
        total = jnp.sum(sums, axis=0)
        return rows.auxiliary.attach(out, router.loss(total), total)

    def logits(
        self, x: Float[Array, "batch seq embed"], key: PRNGKeyArray | None
    ) -> Float[Array, "batch seq experts"]:
        """The router's logits in float32, of jittered activations where there is a key."""
        x, jitter = x.astype(jnp.float32), self.config.router.jitter
        if key is not None and jitter:
            key = jax.random.fold_in(key, JITTER)
            bounds = {"minval": 1 - jitter, "maxval": 1 + jitter}
            draw = functools.partial(jax.random.uniform, key, **bounds)
            x = x * draw_rows(draw, x.shape, jax.typeof(x).sharding.spec)
        with jax.named_scope("router"), jax.default_matmul_precision("highest"):
            return self.router(x)


class ExpertWeights(nnx.Module):
    """Weights of the dense layers of all experts, stacked."""

    def __init__(self, config: ExpertsConfig, builder: Builder):
        embed, mlp = (("embed", builder.hidden),), (("mlp", config.size),)
        count, bias = config.experts, config.bias
        self.up = ExpertMatrix(count, embed, mlp, bias, "feed_forward", builder)
        self.down = ExpertMatrix(count, mlp, embed, bias, "residual", builder)
        self.gate = nnx.data(None)
        if config.gated:
            self.gate = ExpertMatrix(count, embed, mlp, bias, "feed_forward", builder)

    def matrices(self, whole: bool) -> dict[str, StoredMatrix]:
        """Their arrays by the names of the layers; see `ExpertMatrix.stored`."""
        layers = {"up": self.up, "gate": self.gate, "down": self.down}
        return {name: layer.stored(whole) for name, layer in layers.items() if layer is not None}


class ExpertMatrix(nnx.Module):
    """Weight [experts, inputs, outputs] and bias [experts, outputs] of one dense layer."""

    def __init__(
        self, count: int, inputs: Axes, outputs: Axes, bias: bool, kind: Kind, builder: Builder
    ):
        experts, layout = (("experts", count),), builder.layout
        self.layout, self.stack, self.inputs, self.outputs = layout, experts, inputs, outputs
        fan_in = inputs[0][1]
        self.weight: nnx.Param | QuantizedWeight = builder.parameter(
            experts + inputs + outputs, kind, fan_in
        )
        self.bias = nnx.data(None)
        if bias:
            names, shape = zip(*(experts + outputs))
            self.bias = nnx.Param(
                jnp.zeros(shape, jnp.float32), out_sharding=layout.spec(*names, shape=shape)
            )

    def stored(self, whole: bool) -> StoredMatrix:
        """Its arrays as they lie at rest, or gathered along `embed`."""
        weight, bias = self.weight, None if self.bias is None else self.bias[...]
        if isinstance(weight, QuantizedWeight):
            weight = weight.form.read(weight.stored(), whole)
        else:
            weight = weight[...]
        if whole:
            names = self.layout.gathered(*(name for name, _ in self.inputs + self.outputs))
            weight = self.layout.reshard(weight, "experts", *names)
            if bias is not None:
                bias = self.layout.reshard(bias, "experts", *names[len(self.inputs) :])
        return StoredMatrix(weight, bias)
