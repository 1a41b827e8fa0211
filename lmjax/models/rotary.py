"""Rotary positions, and what scales them to texts longer than those of training."""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmjax.config import UserError, config
from lmjax.models.batch import Batch
from lmjax.models.positions import AttentionPositions, within_blocks


@config
class RotaryScaling(abc.ABC):
    """Base of the ways to stretch rotary positions beyond the length of training."""

    # Whether `frequencies` is told the lengths of the texts as they grow, not as they began.
    grows: ClassVar[bool] = False
    # Whether `frequencies` depends on these lengths at all.
    by_length: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise UserError for a factor or a length that is none."""
        for name in ("factor", "length"):
            if (number := getattr(self, name, 1)) <= 0:
                raise UserError(f"{name}={number}: must be above 0")

    @abc.abstractmethod
    def frequencies(
        self, base: float, dims: int, lengths: Int[Array, "batch"]
    ) -> Float[Array, "#batch pairs"]:
        """Radians a token of each pair of dimensions; of each row where they depend on it.

        Args:
          base: see `Rotary`.
          dims: of a head that are rotated.
          lengths: of each row's text, when it was first read; where the scaling `grows`, now.
        """

    def magnitude(self) -> float:
        """Factor of queries and keys."""
        return 1.0


@config
class LinearScaling(RotaryScaling):
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595): positions / factor."""

    factor: float = 2.0  # how much longer texts may be

    def frequencies(self, base: float, dims: int, lengths: Int[Array, "batch"]) -> jax.Array:
        """See `RotaryScaling.frequencies`."""
        return rotary_frequencies(base, dims) / self.factor


@config
class NTKScaling(RotaryScaling):
    """A larger base for a fixed factor ("NTK-aware"): slow pairs stretch, fast ones hardly."""

    factor: float = 2.0  # base grows by factor^(dims / (dims - 2))

    def frequencies(self, base: float, dims: int, lengths: Int[Array, "batch"]) -> jax.Array:
        """See `RotaryScaling.frequencies`."""
        return rotary_frequencies(base * self.factor ** (dims / (dims - 2)), dims)


@config
class DynamicNTKScaling(RotaryScaling):
    """Qwen's: the factor is 1 up to `length`, 3 up to twice that, 7 up to four times, ...

    It follows from the length of each row's text when it was first read, and stays while the text
    is continued from the cache (Bai et al. 2023, arXiv:2309.16609, section 2.3).
    """

    by_length: ClassVar[bool] = True
    length: int = 2048  # tokens that need no stretching: the length of training

    def frequencies(
        self, base: float, dims: int, lengths: Int[Array, "batch"]
    ) -> Float[Array, "batch pairs"]:
        """See `RotaryScaling.frequencies`."""
        doublings = jnp.ceil(jnp.log2(lengths / self.length) + 1)
        factor = jnp.maximum(2.0**doublings - 1, 1.0)
        return rotary_frequencies(base * factor[:, None] ** (dims / (dims - 2)), dims)


@config
class DynamicScaling(RotaryScaling):
    """Dynamic NTK as transformers has it: the base grows with every token beyond `length`.

    Keys that a cache holds keep the rotation of the length that their text had then, as there.
    """

    grows: ClassVar[bool] = True
    by_length: ClassVar[bool] = True
    factor: float = 2.0  # the base grows by (factor n / length - factor + 1)^(dims / (dims - 2))
    length: int = 2048  # tokens that need no stretching: the length of training

    def frequencies(
        self, base: float, dims: int, lengths: Int[Array, "batch"]
    ) -> Float[Array, "batch pairs"]:
        """See `RotaryScaling.frequencies`."""
        longer = jnp.maximum(lengths, self.length) / self.length
        growth = self.factor * longer - (self.factor - 1)
        return rotary_frequencies(base * growth[:, None] ** (dims / (dims - 2)), dims)


@config
class LongRoPEScaling(RotaryScaling):
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a factor for each pair, found by search.

    Texts of up to `length` tokens have one set of factors, longer ones the other; a text that grows
    beyond it while it is continued changes there, and what a cache holds does not.
    """

    grows: ClassVar[bool] = True
    by_length: ClassVar[bool] = True
    short: tuple[float, ...] = ()  # what the angles of each pair are divided by
    long: tuple[float, ...] = ()  # the same for texts beyond `length`
    length: int = 4096  # tokens of the longest text with the short factors
    attention: float = 1.0  # magnitude of queries and keys

    def frequencies(
        self, base: float, dims: int, lengths: Int[Array, "batch"]
    ) -> Float[Array, "batch pairs"]:
        """See `RotaryScaling.frequencies`. UserError where there is no factor for each pair."""
        if not len(self.short) == len(self.long) == dims // 2:
            raise UserError(
                f"short has {len(self.short)} factors and long {len(self.long)}: must be"
                f" {dims // 2}, one for each pair of dimensions of a head"
            )
        beyond = (lengths > self.length)[:, None]
        factors = jnp.where(beyond, jnp.array(self.long), jnp.array(self.short))
        return rotary_frequencies(base, dims) / factors

    def magnitude(self) -> float:
        """See `RotaryScaling.magnitude`."""
        return self.attention


@config
class YaRNScaling(RotaryScaling):
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate slow pairs, leave fast ones alone."""

    factor: float = 4.0  # how much longer texts may be
    length: int = 2048  # the length of training
    fast: float = 32.0  # pairs that turn more often than this in `length` stay as they are
    slow: float = 1.0  # pairs that turn less often than this are interpolated
    attention: float | None = None  # magnitude of queries and keys; none: 0.1 ln(factor) + 1
    truncate: bool = True  # bounds between the kinds of pairs are whole numbers

    def validate(self) -> None:
        """Raise UserError for bounds in the wrong order, and as every scaling."""
        RotaryScaling.validate(self)
        if not 0 < self.slow <= self.fast:
            raise UserError(
                f"slow={self.slow}, fast={self.fast}: slow must be above 0, at most fast"
            )

    def frequencies(self, base: float, dims: int, lengths: Int[Array, "batch"]) -> jax.Array:
        """See `RotaryScaling.frequencies`."""

        def pair(turns: float) -> float:  # the pair that turns so often in the length of training
            return dims * math.log(self.length / (turns * 2 * math.pi)) / (2 * math.log(base))

        first, last = pair(self.fast), pair(self.slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dims - 1)
        pairs = jnp.arange(dims // 2, dtype=jnp.float32)
        interpolated = jnp.clip((pairs - first) / (last - first or 0.001), 0, 1)
        usual = rotary_frequencies(base, dims)
        return usual * (1 - interpolated) + usual / self.factor * interpolated

    def magnitude(self) -> float:
        """See `RotaryScaling.magnitude`."""
        if self.attention is None:
            return 0.1 * math.log(max(self.factor, 1)) + 1
        return self.attention


@config
class Llama3Scaling(RotaryScaling):
    """LLaMA 3.1's (Dubey et al. 2024, arXiv:2407.21783): by wavelength, without a magnitude.

    Pairs that turn at least `fast` times in the length of training stay as they are, those that
    turn at most `slow` times are interpolated; between the two, the share of each follows from the
    number of turns, where YaRN's follows from the number of the pair.
    """

    factor: float = 8.0  # how much longer texts may be
    length: int = 8192  # the length of training
    fast: float = 4.0  # pairs that turn more often than this in `length` stay as they are
    slow: float = 1.0  # pairs that turn less often than this are interpolated

    def validate(self) -> None:
        """Raise UserError for bounds that leave nothing between them, and as every scaling."""
        RotaryScaling.validate(self)
        if not 0 < self.slow < self.fast:
            raise UserError(f"slow={self.slow}, fast={self.fast}: slow must be above 0, below fast")

    def frequencies(self, base: float, dims: int, lengths: Int[Array, "batch"]) -> jax.Array:
        """See `RotaryScaling.frequencies`."""
        usual = rotary_frequencies(base, dims)
        turns = usual * (self.length / (2 * math.pi))
        kept = jnp.clip((turns - self.slow) / (self.fast - self.slow), 0, 1)
        return usual * kept + usual / self.factor * (1 - kept)


def rotary_frequencies(base: Any, dims: int) -> Float[Array, "#batch pairs"]:
    """base^(-2 i / dims) for each pair i."""
    return jnp.atleast_2d(base ** -(jnp.arange(0, dims, 2, dtype=jnp.float32) / dims))


Rotation = tuple[Float[Array, "batch seq 1 pairs"], Float[Array, "batch seq 1 pairs"]]


def rotation(
    positions: Int[Array, "batch seq"], frequencies: Float[Array, "#batch pairs"]
) -> Rotation:
    """Cosines and sines of the angles of each position."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies[:, None, None]
    return jnp.cos(angles), jnp.sin(angles)


@config
class Rotary(AttentionPositions):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of queries and keys."""

    base: float = 10_000.0  # wavelengths grow from 2 pi to 2 pi base
    fraction: float = 1.0  # share of each head that is rotated, from its beginning
    interleaved: bool = False  # pairs (2i, 2i + 1); else (i, i + half)
    scaling: RotaryScaling | None = None  # for texts longer than those of training

    def validate(self) -> None:
        """Raise UserError for a base or a share that is none."""
        if self.base <= 0:
            raise UserError(f"base={self.base}: must be above 0")
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction={self.fraction}: must be above 0, at most 1")

    @property
    def by_length(self) -> bool:
        """See `AttentionPositions.by_length`."""
        return self.scaling is not None and self.scaling.by_length

    def tables(self, batch: Batch, lengths: Int[Array, "batch"], head_dim: int) -> Rotation:
        """Cosines and sines of each position's angles."""
        dims = int(head_dim * self.fraction)
        magnitude = 1.0
        if self.scaling is None:
            frequencies = rotary_frequencies(self.base, dims)
        else:
            if self.scaling.grows:
                lengths = jnp.max(batch.positions, axis=1) + 1
            frequencies = self.scaling.frequencies(self.base, dims, lengths)
            magnitude = self.scaling.magnitude()
        cos, sin = rotation(batch.positions, frequencies)
        return magnitude * cos, magnitude * sin

    def rotate(
        self, x: Float[Array, "batch seq heads head_dim"], tables: Rotation
    ) -> Float[Array, "batch seq heads head_dim"]:
        """Rotates each pair of x by its position's angle, in float32."""
        cos, sin = tables
        dims = 2 * cos.shape[-1]
        turned, rest = x[..., :dims].astype(jnp.float32), x[..., dims:]
        if self.interleaved:
            first, second = turned[..., ::2], turned[..., 1::2]
        else:
            first, second = jnp.split(turned, 2, axis=-1)
        first, second = first * cos - second * sin, second * cos + first * sin
        if self.interleaved:
            turned = jnp.stack([first, second], axis=-1).reshape(turned.shape)
        else:
            turned = jnp.concatenate([first, second], axis=-1)
        return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


@config
class BlockRotary(AttentionPositions):
    """Two rotations: half of each head by position, the other half by block position (ChatGLM-6B).

    Each half is rotated as `Rotary` rotates a whole head of its width.
    """

    base: float = 10_000.0  # wavelengths grow from 2 pi to 2 pi base

    def validate(self) -> None:
        """Raise UserError for a base that is none."""
        if self.base <= 0:
            raise UserError(f"base={self.base}: must be above 0")

    def tables(
        self, batch: Batch, lengths: Int[Array, "batch"], head_dim: int
    ) -> tuple[Rotation, Rotation]:
        """Cosines and sines of the angles of both positions."""
        frequencies = rotary_frequencies(self.base, head_dim // 2)
        return rotation(batch.positions, frequencies), rotation(within_blocks(batch), frequencies)

    def rotate(
        self, x: Float[Array, "batch seq heads head_dim"], tables: tuple[Rotation, Rotation]
    ) -> Float[Array, "batch seq heads head_dim"]:
        """Rotates each half of x by its own angles, in float32."""
        halves = zip(jnp.split(x, 2, axis=-1), tables)
        return jnp.concatenate([Rotary().rotate(*half) for half in halves], axis=-1)
