"""The batch: one dataclass for every model family, and the attention mask that follows from it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from lmjax.config import UserError
from pallas_kernels.attention import Branches, Mask

# On the host, on the devices, or only shapes.
Array = jax.Array | np.ndarray | jax.ShapeDtypeStruct


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of a model, as numpy arrays on the host and as sharded jax arrays on devices.

    Attributes:
      tokens: input token ids.
      positions: position of each token in its document; what position embeddings see.
      segments: which document of the row a token belongs to, from 1; 0 is padding. Attention
        stays within a segment.
      ranks: a token sees those of its segment whose rank is not above its own; None: ranks are
        places in the row, which is causal attention. A bidirectional part has one rank.
      block_positions: GLM's second position, 0 outside of the spans and 1, 2, ... inside of each;
        None: 0 everywhere.
      token_types: BERT's sentence of each token, 0 or 1; XLNet's.
      encoder: what the encoder reads, where the model has one; the rest is the decoder's.
      branches: how columns are divided into shared ones and branches, texts that go on from what
        the shared ones hold of their segment, as replies to a request; None: they are not.
    """

    tokens: Int[Array, "*batch seq"]
    positions: Int[Array, "*batch seq"]
    segments: Int[Array, "*batch seq"]
    ranks: Int[Array, "*batch seq"] | None = None
    block_positions: Int[Array, "*batch seq"] | None = None
    token_types: Int[Array, "*batch seq"] | None = None
    encoder: Batch | None = None
    branches: Branches | None = dataclasses.field(default=None, metadata={"static": True})

    def mask(self, causal: bool, window: int | None = None) -> Mask:
        """The attention mask of this batch's tokens among themselves."""
        return Mask(
            causal=causal,
            window=window,
            query_segments=self.segments,
            key_segments=self.segments,
            query_ranks=self.ranks,
            key_ranks=self.ranks,
            branches=self.branches,
        )

    def behind(self, columns: Shaped[Array, "batch seq *rest"]) -> Shaped[Array, "batch own *rest"]:
        """Columns of the branches; all where there are none."""
        return columns if self.branches is None else columns[:, self.branches.shared :]


def plain_batch(tokens: Int[Array, "batch seq"]) -> Batch:
    """A batch of whole, unpacked rows: positions 0, 1, ..., one segment."""
    tokens = np.asarray(tokens)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(tokens=tokens, positions=positions, segments=np.ones(tokens.shape, np.int32))


def check_tokens(batch: Batch, vocab_size: int, whose: str = "") -> None:
    """Raises UserError for a token that is not among the ids 0 to vocab_size - 1.

    Compiled programs read the last row of a table for such an id, or NaN, without an error, so the
    host asks before a batch goes to the devices.

    Args:
      batch: numpy arrays; its encoder is checked too.
      vocab_size: number of tokens of the model, without padding.
      whose: "encoder." for the message about an encoder's batch.
    """
    index = first_outside(batch.tokens, vocab_size)
    if index is not None:
        raise UserError(
            f"{whose}tokens{list(index)} of the batch is {batch.tokens[index]}; the model has the "
            f"tokens 0 to {vocab_size - 1}"
        )
    if batch.encoder is not None:
        check_tokens(batch.encoder, vocab_size, "encoder.")


def first_outside(
    ids: Int[np.ndarray, "..."], vocab_size: int, counted: np.ndarray | None = None
) -> tuple[int, ...] | None:
    """Index of the first id outside of 0 to vocab_size - 1; None where there is none.

    Ids that are not `counted` are left out.
    """
    if not ids.size or (np.min(ids) >= 0 and np.max(ids) < vocab_size):
        return None
    outside = (ids < 0) | (ids >= vocab_size)
    if counted is not None:
        outside &= counted
    return next((tuple(index) for index in np.argwhere(outside)[:1].tolist()), None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenPosition:
    """Positions of one token of each row.

    Attributes:
      position: as in `Batch`.
      block_position: as in `Batch`.
    """

    position: Int[Array, "batch"]
    block_position: Int[Array, "batch"]

    def next(self) -> TokenPosition:
        """Positions of the token after it: in a span the second position moves, else the first."""
        inside = (self.block_position > 0).astype(np.int32)
        return TokenPosition(self.position + 1 - inside, self.block_position + inside)

    def batch(self, tokens: Int[Array, "batch"], segments: Int[Array, "batch"]) -> Batch:
        """A batch of these tokens alone."""
        return Batch(
            tokens=tokens[:, None],
            positions=self.position[:, None],
            segments=segments[:, None],
            block_positions=self.block_position[:, None],
        )


def last_position(batch: Batch) -> TokenPosition:
    """Positions of each row's last token that is not padding; block positions may all be 0."""
    block = batch.block_positions
    block = jnp.zeros_like(batch.positions) if block is None else block
    positions, block = (last_tokens(batch.segments, a) for a in (batch.positions, block))
    return TokenPosition(positions, block)


def last_tokens(
    segments: Int[Array, "batch seq"], values: Shaped[Array, "batch seq *rest"]
) -> Shaped[Array, "batch *rest"]:
    """The value of each row's last token that is not padding; zeros where there is none."""
    if segments.shape[1] == 1:
        return values[:, 0]
    real = segments != 0
    chosen = real & (jnp.cumsum(real[:, ::-1], axis=1)[:, ::-1] == 1)
    chosen = chosen.reshape(*segments.shape, *(1 for _ in values.shape[2:]))
    return jnp.sum(jnp.where(chosen, values, 0), axis=1, dtype=values.dtype)
