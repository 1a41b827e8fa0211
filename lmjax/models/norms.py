"""Normalisation layers; statistics are always taken in float32."""

from __future__ import annotations

import abc

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lmjax.config import UserError, config


@config
class NormConfig(abc.ABC):
    """Base of the normalisations."""

    epsilon: float = 1e-5  # added to the variance

    def validate(self) -> None:
        """Raise UserError for an epsilon that would leave a negative variance."""
        if self.epsilon < 0:
            raise UserError(f"norm.epsilon={self.epsilon}: must be 0 or more")

    @abc.abstractmethod
    def build(self, size: int) -> nnx.Module:
        """The layer over a last axis of `size`."""


@config
class LayerNormConfig(NormConfig):
    """Layer normalisation (Ba et al. 2016): subtract the mean, divide by the deviation."""

    bias: bool = True  # add a learned bias

    def build(self, size: int) -> LayerNorm:
        """The layer over a last axis of `size`."""
        return LayerNorm(self, size)


@config
class RMSNormConfig(NormConfig):
    """Root-mean-square normalisation (Zhang and Sennrich 2019): no mean, no bias."""

    unit_offset: bool = False  # multiply by 1 + scale, the scale starting at 0 (Gemma)

    def build(self, size: int) -> RMSNorm:
        """The layer over a last axis of `size`."""
        return RMSNorm(self, size)


class LayerNorm(nnx.Module):
    """scale (x - mean) / sqrt(variance + epsilon) + bias."""

    def __init__(self, config: LayerNormConfig, size: int):
        self.config = config
        self.scale = nnx.Param(jnp.ones(size, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32)) if config.bias else nnx.data(None)

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        out = centred * jax.lax.rsqrt(variance + self.config.epsilon) * self.scale[...]
        if self.bias is not None:
            out = out + self.bias[...]
        return out.astype(x.dtype)


class RMSNorm(nnx.Module):
    """scale x / sqrt(mean(x^2) + epsilon)."""

    def __init__(self, config: RMSNormConfig, size: int):
        self.config = config
        self.scale = nnx.Param(jnp.full(size, 0.0 if config.unit_offset else 1.0, jnp.float32))

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.square(wide).mean(-1, keepdims=True)
        out = wide * jax.lax.rsqrt(mean_square + self.config.epsilon)
        scale = 1 + self.scale[...] if self.config.unit_offset else self.scale[...]
        return (out * scale).astype(x.dtype)
