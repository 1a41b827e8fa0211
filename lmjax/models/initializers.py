"""How parameters are drawn at the start of training."""

from __future__ import annotations

import abc
import math
from typing import Literal

import jax

from lmjax.config import config

Kind = Literal["embedding", "positions", "weight", "residual"]


@config
class Initializer(abc.ABC):
    """Base of the initialisation schemes."""

    @abc.abstractmethod
    def draw(self, kind: Kind, num_layers: int) -> jax.nn.initializers.Initializer:
        """The initializer of one kind of matrix in a model of `num_layers` layers."""


@config
class Normal(Initializer):
    """Normal with one standard deviation for all matrices; biases 0, norm scales 1."""

    std: float = 0.02  # standard deviation of every matrix
    scale_residual: bool = False  # divide that of the residual projections by sqrt(2 layers)
    positions_std: float | None = None  # of the learned position table; None: std

    def draw(self, kind: Kind, num_layers: int) -> jax.nn.initializers.Initializer:
        """GPT-2's rule (Radford et al. 2019, section 2.3) when `scale_residual` is set."""
        if kind == "positions" and self.positions_std is not None:
            return jax.nn.initializers.normal(self.positions_std)
        if kind == "residual" and self.scale_residual:
            return jax.nn.initializers.normal(self.std / math.sqrt(2 * num_layers))
        return jax.nn.initializers.normal(self.std)
