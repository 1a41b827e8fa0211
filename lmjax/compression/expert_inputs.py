"""Inputs of the dense layers of each expert: those of the tokens that are routed to it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lmjax.compression.input_moments import InputMoments
from lmjax.models.experts import Experts, RoutedRows
from lmjax.models.feed_forward import activate
from lmjax.models.routing import TopKRouter

Path = tuple[str, ...]


class ExpertsRecorder:
    """Stands in a block in place of a mixture of experts, and takes note of each expert's inputs.

    Its moments have a first axis of experts. Where experts choose among tokens, nothing is noted.
    """

    def __init__(self, layer: Experts, path: Path, found: dict[Path, InputMoments]):
        self.layer, self.path, self.found = layer, path, found

    def __call__(
        self, x: Float[Array, "batch seq embed"], rows: RoutedRows
    ) -> Float[Array, "batch seq embed"]:
        layer = self.layer
        if isinstance(layer.config.router, TopKRouter):
            choices, _ = layer.config.router.choose(layer.logits(x, None), rows.real)
            numbers = jnp.arange(layer.config.experts)
            chosen = jnp.any(choices.experts[..., None] == numbers, axis=2)
            for name, moments in expert_moments(layer, x, chosen).items():
                self.found[(*self.path, "experts", name)] = moments
        return layer(x, rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def expert_moments(
    layer: Experts, x: Float[Array, "batch seq embed"], chosen: Bool[Array, "batch seq experts"]
) -> dict[str, InputMoments]:
    """Moments of the inputs of each expert's layers by name, with a first axis of experts.

    One expert after another computes all tokens; those that did not choose it count nothing.

    Args:
      layer: the mixture, whose weights are float32.
      x: what it reads.
      chosen: which experts each token is routed to.
    """
    everywhere = jax.sharding.PartitionSpec()
    x, chosen = jax.reshard(x, everywhere), jax.reshard(chosen, everywhere)
    tokens = x.astype(jnp.float32).reshape(-1, x.shape[2])
    matrices = {
        name: jax.tree.map(lambda a: jax.reshard(a, everywhere), (matrix.weight, matrix.bias))
        for name, matrix in layer.experts.matrices(whole=True).items()
        if name != "down"
    }

    def one(given: tuple) -> tuple[InputMoments, InputMoments]:
        own, mask = given

        def product(name: str) -> jax.Array:
            weight, bias = own[name]
            y = jnp.matmul(tokens, weight, precision="highest")
            return y if bias is None else y + bias

        gated, activation = layer.config.gated, layer.config.activation
        hidden = activate(activation, product("gate" if gated else "up"))
        hidden = hidden * product("up") if gated else hidden
        return InputMoments.of(tokens, 1, mask), InputMoments.of(hidden, 1, mask)

    read, made = jax.lax.map(one, (matrices, chosen.reshape(len(tokens), -1).T))
    return {name: read for name in matrices} | {"down": made}
