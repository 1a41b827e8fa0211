"""Initializers of parameters."""

from __future__ import annotations

import abc
import math
from typing import Literal

import jax

from lmjax.config import config

# "head": an untied one; "query", "value": of attention; "relative": T5's table of buckets;
# "feed_forward": its first matrices; "residual": the last matrix of a sublayer.
Kind = Literal[
    "embedding",
    "positions",
    "head",
    "weight",
    "query",
    "value",
    "relative",
    "feed_forward",
    "residual",
]


@config
class Initializer(abc.ABC):
    """Base of the initialisation schemes."""

    @abc.abstractmethod
    def draw(self, kind: Kind, num_layers: int, fan_in: int) -> jax.nn.initializers.Initializer:
        """The initializer of one kind of matrix.

        Args:
          kind: what the matrix is for.
          num_layers: of the model.
          fan_in: numbers that each output is summed from; of a table, its width.
        """


@config
class Normal(Initializer):
    """Normal with one standard deviation for all matrices; biases 0, norm scales 1."""

    std: float = 0.02  # standard deviation of every matrix
    scale_residual: bool = False  # divide that of the residual projections by sqrt(2 layers)
    positions_std: float | None = None  # of the learned position table; None: std
    truncated: bool = False  # draw again what is more than two `std` away (BERT)
    # An untied head uniform within 1 / sqrt(hidden) (Kaiming with a = sqrt(5); Baichuan 2).
    uniform_head: bool = False

    def draw(self, kind: Kind, num_layers: int, fan_in: int) -> jax.nn.initializers.Initializer:
        """GPT-2's rule (Radford et al. 2019, section 2.3) when `scale_residual` is set."""
        if kind == "positions" and self.positions_std is not None:
            return jax.nn.initializers.normal(self.positions_std)
        if kind == "residual" and self.scale_residual:
            return jax.nn.initializers.normal(self.std / math.sqrt(2 * num_layers))
        if kind == "head" and self.uniform_head:
            bound = 1 / math.sqrt(fan_in)
            return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        if self.truncated:
            return jax.nn.initializers.truncated_normal(self.std)
        return jax.nn.initializers.normal(self.std)


@config
class FanIn(Initializer):
    """Normal with standard deviation 1 / sqrt(inputs); embeddings 1 (PaLM, section 5)."""

    query_scale: float = 1.0  # of the queries' deviation (T5, which does not scale the scores)

    def draw(self, kind: Kind, num_layers: int, fan_in: int) -> jax.nn.initializers.Initializer:
        """See `Initializer.draw`."""
        if kind == "embedding":
            return jax.nn.initializers.normal(1.0)
        scale = self.query_scale if kind == "query" else 1.0
        return jax.nn.initializers.normal(scale * fan_in**-0.5)


@config
class DeepNormXavier(Initializer):
    """GLM-130B's (Zeng et al. 2022, arXiv:2210.02414, section 2.1), for `DeepNorm`.

    Xavier-normal with a gain of 1 / sqrt(2 layers) for values, outputs and feed-forward layers.
    """

    std: float = 0.0052  # standard deviation of all other matrices

    def draw(self, kind: Kind, num_layers: int, fan_in: int) -> jax.nn.initializers.Initializer:
        """See `Initializer.draw`."""
        if kind not in ("value", "feed_forward", "residual"):
            return jax.nn.initializers.normal(self.std)

        def xavier(key, shape, dtype):
            fan_out = math.prod(shape) // fan_in
            std = math.sqrt(2 / (fan_in + fan_out)) / math.sqrt(2 * num_layers)
            return std * jax.random.normal(key, shape, dtype)

        return xavier
