"""How a block puts norms, sublayers and the residual stream together."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar

import jax

from lmjax.config import config

Sublayer = Callable[[jax.Array], jax.Array]


@config
class Arrangement(abc.ABC):
    """Base of the arrangements."""

    final_norm: ClassVar[bool] = False

    @abc.abstractmethod
    def apply(self, x: jax.Array, norm: Sublayer, sublayer: Sublayer) -> jax.Array:
        """One sublayer's step of the residual stream."""


@config
class PreNorm(Arrangement):
    """x + f(norm(x)), and a norm after the last block (GPT-2, LLaMA)."""

    final_norm: ClassVar[bool] = True

    def apply(self, x: jax.Array, norm: Sublayer, sublayer: Sublayer) -> jax.Array:
        """x + f(norm(x))."""
        return x + sublayer(norm(x))


@config
class PostNorm(Arrangement):
    """norm(x + f(x)), as in the first Transformer and GPT-1."""

    def apply(self, x: jax.Array, norm: Sublayer, sublayer: Sublayer) -> jax.Array:
        """norm(x + f(x))."""
        return norm(x + sublayer(x))
