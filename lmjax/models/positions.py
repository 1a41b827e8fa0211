"""Positions, in the two places where they act: on the embeddings, and in attention."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lmjax.config import UserError, config
from lmjax.models.batch import Batch
from lmjax.models.embedding import Embedding
from lmjax.models.linear import Builder
from pallas_kernels.attention import BucketBias, DistanceBias, LinearBias


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


@config
class AttentionPositions:
    """Base of the positions that act in attention: on queries and keys, or on their scores."""

    def tables(self, batch: Batch, lengths: Int[Array, "batch"], head_dim: int) -> Any:
        """Tables of the positions for all layers, computed once.

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

    @property
    def by_length(self) -> bool:
        """Returns whether keys depend on the length of the text that they were read with."""
        return False

    def build(self, num_heads: int, builder: Builder) -> nnx.Module | None:
        """Module of the positions' learned parameters, one for all layers; None: there are none."""
        return None

    def bias(self, learned: nnx.Module | None, num_heads: int, causal: bool) -> DistanceBias | None:
        """Bias that is added to the scores of every layer; None: none."""
        return None

    def check_heads(self, num_heads: int) -> None:
        """Raises UserError for positions of another number of heads."""
        return

    def of_heads(self, heads: Sequence[int], num_heads: int) -> AttentionPositions:
        """Positions of a model that has only these of its heads left."""
        return self


@config
class ALiBi(AttentionPositions):
    """Attention with linear biases (Press et al. 2022, arXiv:2108.12409), for causal attention.

    Scores fall by the head's slope with every token between query and key. For heads that are no
    power of two, slopes of the next one are put in between, as BLOOM and Baichuan do.
    """

    biased: ClassVar[bool] = True

    # of each head; none: by their number. A model that lost heads keeps those of the others
    slopes: tuple[float, ...] | None = None

    def bias(self, learned: None, num_heads: int, causal: bool) -> LinearBias:
        """See `AttentionPositions.bias`."""
        return LinearBias(jnp.asarray(self.head_slopes(num_heads)))

    def head_slopes(self, num_heads: int) -> Float[np.ndarray, "heads"]:
        """Slope of each head."""
        if self.slopes is None:
            return alibi_slopes(num_heads)
        return np.array(self.slopes, np.float32)

    def check_heads(self, num_heads: int) -> None:
        """See `AttentionPositions.check_heads`."""
        if self.slopes is not None and len(self.slopes) != num_heads:
            raise UserError(
                f"attention.positions.slopes has {len(self.slopes)} numbers for"
                f" num_heads={num_heads}"
            )

    def of_heads(self, heads: Sequence[int], num_heads: int) -> ALiBi:
        """See `AttentionPositions.of_heads`."""
        return ALiBi(slopes=tuple(self.head_slopes(num_heads)[list(heads)].tolist()))


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
        if self.buckets < 4:
            raise UserError(f"buckets={self.buckets}: must be 4 or more")
        if self.max_distance <= self.buckets // 2:
            raise UserError(
                f"max_distance={self.max_distance}: must be above half the {self.buckets} buckets"
            )

    def build(self, num_heads: int, builder: Builder) -> BucketTable:
        """See `AttentionPositions.build`."""
        return BucketTable(self, num_heads, builder)

    def bias(self, learned: BucketTable, num_heads: int, causal: bool) -> BucketBias:
        """See `AttentionPositions.bias`."""
        return BucketBias(jnp.swapaxes(learned.table[...], 0, 1), self.max_distance, causal)


class BucketTable(nnx.Module):
    """The numbers of `RelativeBuckets`."""

    def __init__(self, config: RelativeBuckets, num_heads: int, builder: Builder):
        axes = ((None, config.buckets), ("heads", num_heads))
        self.table = builder.parameter(axes, "relative", fan_in=builder.hidden)
