"""Rows for new tokens in a trained model's tables, as for Chinese on LLaMA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lmjax.config import UserError, replace
from lmjax.models.transformer import TransformerConfig


def extend_vocabulary(
    config: TransformerConfig,
    params: dict[str, Any],
    old_pieces: Sequence[Sequence[int]],
    how: Literal["mean", "pieces"] = "pieces",
) -> tuple[TransformerConfig, dict[str, Any]]:
    """A model with more tokens behind its vocabulary; it does the same with the old ones.

    A new token's row is the mean of the rows of its old pieces, in the token table and in the head
    (as Chinese-LLaMA did, arXiv:2304.08177), or with "mean" that of all old rows. A mesh must be
    set, the one that the parameters lie on. Neither averages of parameters nor optimizer state are
    extended: training starts anew.

    Args:
      config: of the model.
      params: nested dict with `embedding.table` and, if the head is not tied, `head.table`, of
        shape [padded_vocab, hidden]; it stays as it is.
      old_pieces: for each new token the old tokens that spell it, see `lmjax.data.old_pieces`; a
        token without any gets the mean of all old rows.
      how: "pieces" or "mean".

    Returns:
      The config with the larger vocab_size, and the parameters.

    Raises:
      UserError: an unknown `how`, a piece that is no old token, or tables of another size.
    """
    if how not in ("mean", "pieces"):
        raise UserError(f"how={how!r} is neither 'mean' nor 'pieces'")
    for number, pieces in enumerate(old_pieces):
        if bad := [piece for piece in pieces if not 0 <= piece < config.vocab_size]:
            raise UserError(
                f"old_pieces[{number}] names token {bad[0]}, but the old vocabulary has"
                f" {config.vocab_size} tokens"
            )
    larger = replace(config, vocab_size=config.vocab_size + len(old_pieces))
    if how == "mean":
        old_pieces = [()] * len(old_pieces)
    extended = dict(params)
    for name in ("embedding",) if config.tied_head else ("embedding", "head"):
        table = params[name]["table"]
        if table.shape[0] != config.padded_vocab:
            raise UserError(
                f"{name}.table has {table.shape[0]} rows; by the config it should have"
                f" {config.padded_vocab}"
            )
        rows = extend_table(table, config.vocab_size, old_pieces, larger.padded_vocab)
        extended[name] = params[name] | {"table": rows}
    if "head_bias" in params:
        column = params["head_bias"][:, None]
        rows = extend_table(column, config.vocab_size, old_pieces, larger.padded_vocab)
        extended["head_bias"] = rows[:, 0]
    return larger, extended


def extend_table(
    table: Float[Array, "old_rows embed"],
    vocab_size: int,
    old_pieces: Sequence[Sequence[int]],
    rows: int,
) -> Float[Array, "rows embed"]:
    """The first `vocab_size` rows, a mean for each new token, and zeros up to `rows`."""
    width = jax.typeof(table).sharding.spec[1]
    spec = PartitionSpec(None, width)
    old = jax.reshard(table, spec)[:vocab_size]
    longest = max(map(len, old_pieces), default=0)
    pieces = np.zeros((len(old_pieces), longest), np.int32)
    weights = np.zeros((len(old_pieces), longest, 1), np.float32)
    for number, tokens in enumerate(old_pieces):
        pieces[number, : len(tokens)] = tokens
        weights[number, : len(tokens)] = 1 / max(len(tokens), 1)
    # One column at a time: all rows of all pieces at once would not fit beside a large model.
    new = jnp.zeros((len(old_pieces), old.shape[1]), old.dtype, out_sharding=spec)
    for column in range(longest):
        new += weights[:, column] * old.at[pieces[:, column]].get(out_sharding=spec)
    spelt = np.array([[bool(tokens)] for tokens in old_pieces]).reshape(-1, 1)
    new = jnp.where(spelt, new, old.mean(axis=0, keepdims=True))
    padding = rows - vocab_size - len(old_pieces)
    extended = jnp.pad(jnp.concatenate([old, new]), ((0, padding), (0, 0)))
    return jax.reshard(extended, jax.typeof(table).sharding.spec)
