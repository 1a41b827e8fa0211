"""Positions, in the two places where they act: on the embeddings, and in attention."""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lmjax.config import UserError, config
from lmjax.models.batch import Batch
from lmjax.models.embedding import Embedding
from lmjax.models.linear import Builder


@config
class EmbeddingPositions(abc.ABC):
    """Base of the positions that are added to the token embeddings."""

    @abc.abstractmethod
    def build(self, length: int, builder: Builder) -> nnx.Module:
        """The module that gives what is added to the embeddings of a `Batch`.

        Args:
          length: of the longest sequence.
          builder: what every module is built with.
        """


@config
class LearnedPositions(EmbeddingPositions):
    """A learned table with one row a position, added to the token embeddings."""

    offset: int = 0  # rows before that of position 0, which no token uses (OPT has 2)

    def build(self, length: int, builder: Builder) -> PositionTable:
        """See `EmbeddingPositions.build`."""
        return PositionTable(self.offset, length, builder)


@config
class BlockPositions(EmbeddingPositions):
    """GLM's two learned tables (Du et al. 2022, arXiv:2103.10360, section 2.1.2), added up.

    One has a row for each position of a text whose spans are masks, the other for each place in
    a span; each has one row more than the longest sequence has tokens.
    """

    def build(self, length: int, builder: Builder) -> BlockPositionTables:
        """See `EmbeddingPositions.build`."""
        return BlockPositionTables(length + 1, builder)


class PositionTable(Embedding):
    """The rows of `LearnedPositions`."""

    def __init__(self, offset: int, length: int, builder: Builder):
        self.offset = offset
        super().__init__(None, length + offset, builder.hidden, "positions", builder)

    def __call__(self, batch: Batch) -> Float[Array, "batch seq embed"]:
        """The row of each token's position."""
        return self.lookup(batch.positions + self.offset)


class BlockPositionTables(nnx.Module):
    """The rows of `BlockPositions`."""

    def __init__(self, length: int, builder: Builder):
        self.text = Embedding(None, length, builder.hidden, "positions", builder)
        self.block = Embedding(None, length, builder.hidden, "positions", builder)

    def __call__(self, batch: Batch) -> Float[Array, "batch seq embed"]:
        """The sum of two rows for each token."""
        return self.text(batch.positions) + self.block(within_blocks(batch))


def within_blocks(batch: Batch) -> Int[Array, "batch seq"]:
    """The block positions of a batch: 0 where it has no spans."""
    if batch.block_positions is None:
        return jnp.zeros_like(batch.positions)
    return batch.block_positions


class Pairs(NamedTuple):
    """The queries and keys of a batch of rows.

    Attributes:
      num_heads: of the queries.
      queries, keys: how many there are.
      first: the place of the first query, counted in keys.
      causal: whether queries see no later keys.
    """

    num_heads: int
    queries: int
    keys: int
    first: Int[Array, ""] | int
    causal: bool


Bias = Float[Array, "#batch heads #queries #keys"]


@config
class AttentionPositions:
    """Base of the positions that act in attention: on queries and keys, or on their scores."""

    def tables(self, batch: Batch, lengths: Int[Array, "batch"], head_dim: int) -> Any:
        """What all layers need of the positions, computed once for them.

        Args:
          batch: its positions, and what else says where tokens stand.
          lengths: tokens of each row's text when it was first read.
          head_dim: width of a head.
        """
        return None

    def rotate(
        self, x: Float[Array, "batch seq heads head_dim"], tables: Any
    ) -> Float[Array, "batch seq heads head_dim"]:
        """Queries or keys with their positions in them."""
        return x

    biased: ClassVar[bool] = False  # whether `bias` gives something

    def build(self, num_heads: int, builder: Builder) -> nnx.Module | None:
        """What the positions learn, once for all layers; None: nothing."""
        return None

    def bias(self, learned: nnx.Module | None, pairs: Pairs) -> Bias | None:
        """What is added to the scores, the same in every layer and row; None: nothing."""
        return None


@config
class ALiBi(AttentionPositions):
    """Attention with linear biases (Press et al. 2022, arXiv:2108.12409), for causal attention.

    Scores fall by the head's slope with every token between query and key. For heads that are no
    power of two, slopes of the next one are put in between, as BLOOM and Baichuan do.
    """

    biased: ClassVar[bool] = True

    def bias(self, learned: None, pairs: Pairs) -> Bias:
        """slope (j - last key): a row's softmax does not see what all its scores have in common."""
        distance = jnp.arange(pairs.keys, dtype=jnp.float32) - (pairs.keys - 1)
        return (alibi_slopes(pairs.num_heads)[:, None] * distance)[None, :, None, :]


def alibi_slopes(num_heads: int) -> Float[np.ndarray, "heads"]:
    """2^(-8 i / p) for i = 1..p, p the largest power of two; then every other one of 2 p heads."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-4 * (2 * k + 1) / power) for k in range(num_heads - power)]
    return np.array(slopes, np.float32)


@config
class RelativeBuckets(AttentionPositions):
    """T5's relative positions (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

    Scores have a learned number added for each head and bucket of distances between key and query.
    Half of the buckets are for single distances, the others grow logarithmically. Where attention
    is causal all are for keys before the query; else half of them are for keys behind it.
    """

    buckets: int = 32  # numbers of each head
    max_distance: int = 128  # from there on all distances are in one bucket
    biased: ClassVar[bool] = True

    def validate(self) -> None:
        """Raise UserError for buckets that leave none to distances that grow."""
        if self.buckets < 4 or self.buckets % 4:
            raise UserError(f"buckets={self.buckets}: must be a multiple of 4")
        if self.max_distance <= self.buckets // 2:
            raise UserError(
                f"max_distance={self.max_distance}: must be above half the {self.buckets} buckets"
            )

    def build(self, num_heads: int, builder: Builder) -> BucketTable:
        """See `AttentionPositions.build`."""
        return BucketTable(self, num_heads, builder)

    def bias(self, learned: BucketTable, pairs: Pairs) -> Bias:
        """See `AttentionPositions.bias`."""
        places = pairs.first + jnp.arange(pairs.queries)
        return learned(self.bucket(jnp.arange(pairs.keys) - places[:, None], pairs.causal))

    def bucket(self, distance: Int[Array, "..."], causal: bool) -> Int[Array, "..."]:
        """The bucket of each distance, which is above 0 for keys behind the query."""
        count = self.buckets if causal else self.buckets // 2
        behind = 0 if causal else jnp.where(distance > 0, count, 0)
        distance = jnp.maximum(-distance, 0) if causal else jnp.abs(distance)
        exact = count // 2
        growth = (count - exact) / math.log(self.max_distance / exact)
        far = exact + jnp.log(jnp.maximum(distance, exact) / exact) * growth
        far = jnp.minimum(far.astype(jnp.int32), count - 1)
        return behind + jnp.where(distance < exact, distance, far)


class BucketTable(nnx.Module):
    """The numbers of `RelativeBuckets`."""

    def __init__(self, config: RelativeBuckets, num_heads: int, builder: Builder):
        self.layout = builder.layout
        axes = ((None, config.buckets), ("heads", num_heads))
        self.table = builder.parameter(axes, "relative", fan_in=builder.hidden)

    def __call__(self, buckets: Int[Array, "queries keys"]) -> Bias:
        """The number of each head for each pair."""
        table = jnp.swapaxes(self.table[...], 0, 1)
        shape = (table.shape[0], *buckets.shape)
        spec = self.layout.spec("heads", None, None, shape=shape)
        return table.at[:, buckets].get(out_sharding=spec)[None]


@config
class RotaryScaling(abc.ABC):
    """Base of the ways to stretch rotary positions beyond the length of training."""

    def validate(self) -> None:
        """Raise UserError for a factor or a length that is none."""
        for name in ("factor", "length"):
            if (number := getattr(self, name, 1)) <= 0:
                raise UserError(f"{name}={number}: must be above 0")

    @abc.abstractmethod
    def frequencies(
        self, base: float, dims: int, lengths: Int[Array, "batch"]
    ) -> Float[Array, "#batch pairs"]:
        """Radians a token of each pair of dimensions; of each row where they depend on it."""

    def magnitude(self) -> float:
        """What queries and keys are multiplied with."""
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

    length: int = 2048  # tokens that need no stretching: the length of training

    def frequencies(
        self, base: float, dims: int, lengths: Int[Array, "batch"]
    ) -> Float[Array, "batch pairs"]:
        """See `RotaryScaling.frequencies`."""
        doublings = jnp.ceil(jnp.log2(lengths / self.length) + 1)
        factor = jnp.maximum(2.0**doublings - 1, 1.0)
        return rotary_frequencies(base * factor[:, None] ** (dims / (dims - 2)), dims)


@config
class YaRNScaling(RotaryScaling):
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate slow pairs, leave fast ones alone."""

    factor: float = 4.0  # how much longer texts may be
    length: int = 2048  # the length of training
    fast: float = 32.0  # pairs that turn more often than this in `length` stay as they are
    slow: float = 1.0  # pairs that turn less often than this are interpolated
    attention: float | None = None  # magnitude of queries and keys; none: 0.1 ln(factor) + 1

    def frequencies(self, base: float, dims: int, lengths: Int[Array, "batch"]) -> jax.Array:
        """See `RotaryScaling.frequencies`."""

        def pair(turns: float) -> float:  # the pair that turns so often in the length of training
            return dims * math.log(self.length / (turns * 2 * math.pi)) / (2 * math.log(base))

        first = max(math.floor(pair(self.fast)), 0)
        last = min(math.ceil(pair(self.slow)), dims - 1)
        pairs = jnp.arange(dims // 2, dtype=jnp.float32)
        interpolated = jnp.clip((pairs - first) / max(last - first, 0.001), 0, 1)
        usual = rotary_frequencies(base, dims)
        return usual * (1 - interpolated) + usual / self.factor * interpolated

    def magnitude(self) -> float:
        """See `RotaryScaling.magnitude`."""
        return 0.1 * math.log(self.factor) + 1 if self.attention is None else self.attention


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

    def tables(self, batch: Batch, lengths: Int[Array, "batch"], head_dim: int) -> Rotation:
        """Cosines and sines of each position's angles."""
        dims = int(head_dim * self.fraction)
        magnitude = 1.0
        if self.scaling is None:
            frequencies = rotary_frequencies(self.base, dims)
        else:
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
