"""Changes of texts in training, drawn anew in every step: left out, swapped, other words."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from lmjax.config import UserError, config
from lmjax.models.batch import Batch
from lmjax.models.transformer import Transformer
from lmjax.objectives.refilling import fill_blanks, fill_masks
from lmjax.objectives.row_changes import (
    Tokens,
    is_listed,
    shortened,
    sorted_rows,
    swapped,
    types_of,
    uniform,
)

SHARES = "refill", "synonyms", "swap", "deletion"


@config
class Augmentation:
    """Changes of the tokens of texts in training, as a function of the seed and the step.

    In this order: some tokens are hidden and filled again by a masked model or by one that fills
    blanks (GLM), some are replaced by near ones, some change positions, some are left out unless
    none would stay (Wei and Zou 2019, arXiv:1901.11196, with tokens for words; the refilling of Wu
    et al. 2019, arXiv:1812.06705). Special tokens stay.
    """

    deletion: float = 0.0  # share of the tokens that is left out
    swap: float = 0.0  # share of the tokens that change positions with each other
    synonyms: float = 0.0  # share that is replaced by near rows of the model's own embedding
    nearest: int = 10  # number of near tokens that one is drawn from
    refill: float = 0.0  # share that is hidden, and filled with what another model draws
    # folder of that model, a masked one or one that fills blanks, with the same tokenizer
    refill_with: str | None = None
    mask: str = "[MASK]"  # its special token for what is hidden
    special: tuple[int, ...] = ()  # their ids; a job fills them in from its tokenizer
    mask_id: int | None = None  # id of the mask, likewise
    # id of the token that begins what fills a blank, likewise; none: the model is a masked one
    start_id: int | None = None

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        for name in SHARES:
            if not 0 <= (share := getattr(self, name)) < 1:
                raise UserError(f"augmentation.{name}={share}: must be 0 or more, and below 1")
        if self.nearest < 1:
            raise UserError(f"augmentation.nearest={self.nearest}: must be 1 or more")
        if (self.refill > 0) != (self.refill_with is not None):
            raise UserError(
                "augmentation: give refill and refill_with, the folder of the model that fills, or"
                " none of the two"
            )

    def apply(
        self,
        model: Transformer,
        batch: Batch,
        key: PRNGKeyArray,
        filler: Any = None,
    ) -> Batch:
        """The batch with its texts changed; one text, or pair of texts, is a row.

        Args:
          model: the model that is trained, whose embedding says which tokens are near.
          batch: tokens from position 0 on, padded behind.
          key: of the step.
          filler: the model of `refill_with`, a `Transformer`; needed where `refill` is above 0.
        """
        layout, keys = model.layout, jax.random.split(key, len(SHARES))
        # Rows are sorted, so each lies on one device meanwhile.
        batch = jax.tree.map(lambda a: layout.reshard(a, "batch", None), batch)
        tokens = batch.tokens
        if self.refill:
            chosen = self._choose(batch, tokens, self.refill, keys[0])
            tokens = self._refilled(filler, batch, tokens, chosen, keys[0])
        if self.synonyms:
            tokens = self._replaced(model, batch, tokens, keys[1])
        if self.swap:
            chosen = self._choose(batch, tokens, self.swap, keys[2])
            tokens = swapped(tokens, chosen, types_of(batch), keys[2])
        batch = dataclasses.replace(batch, tokens=tokens)
        if self.deletion:
            chosen = self._choose(batch, tokens, self.deletion, keys[3])
            stays = self._is_free(batch, tokens) & ~chosen
            batch = shortened(batch, chosen & jnp.any(stays, axis=1, keepdims=True))
        return jax.tree.map(lambda a: layout.reshard(a, "batch", "seq"), batch)

    def _is_free(self, batch: Batch, tokens: Tokens) -> Bool[Array, "batch seq"]:
        """Mask of the tokens of a text that are not special."""
        special = jnp.asarray(self.special or (-1,), tokens.dtype)
        return (batch.segments > 0) & jnp.all(tokens[..., None] != special, axis=2)

    def _choose(
        self, batch: Batch, tokens: Tokens, share: float, key: PRNGKeyArray
    ) -> Bool[Array, "batch seq"]:
        """Mask of the tokens that are drawn, each by itself."""
        return self._is_free(batch, tokens) & (uniform(key, tokens) < share)

    def _refilled(
        self,
        filler: Any,
        batch: Batch,
        tokens: Tokens,
        chosen: Bool[Array, "batch seq"],
        key: PRNGKeyArray,
    ) -> Tokens:
        """The tokens with those that are chosen drawn by the model of `refill_with`."""
        batch, key = dataclasses.replace(batch, tokens=tokens), jax.random.fold_in(key, 1)
        if self.start_id is None:
            return fill_masks(filler, batch, chosen, self.mask_id, self.special, key)
        return fill_blanks(filler, batch, chosen, self.mask_id, self.start_id, self.special, key)

    def _replaced(
        self, model: Transformer, batch: Batch, tokens: Tokens, key: PRNGKeyArray
    ) -> Tokens:
        """The tokens with some replaced by one of the `nearest` rows by cosine, but themselves.

        As many columns of each row are looked at as the share of the longest text takes, so that
        the product with the embedding is as small as that.
        """
        free, draws = self._is_free(batch, tokens), uniform(key, tokens)
        wanted = jnp.round(jnp.sum(free, axis=1, keepdims=True) * self.synonyms)
        most = max(1, round(tokens.shape[1] * self.synonyms))
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        index = jnp.zeros_like(tokens) + index
        order = jnp.where(free, draws, 2.0)
        _, column, token = (a[:, :most] for a in sorted_rows(order, index, tokens))
        near = self._neighbours(model, token, jax.random.fold_in(key, 1))
        used = jnp.arange(most)[None] < wanted
        # One of a row's columns is a token's own: a sum over them is a scatter on any mesh.
        hit = (column[:, None] == index[:, :, None]) & used[:, None]
        return jnp.where(jnp.any(hit, axis=2), jnp.sum(jnp.where(hit, near[:, None], 0), 2), tokens)

    def _neighbours(
        self, model: Transformer, token: Int[Array, "batch some"], key: PRNGKeyArray
    ) -> Int[Array, "batch some"]:
        """One of the nearest tokens of each, all of them as likely."""
        layout = model.layout
        table = jax.lax.stop_gradient(layout.reshard(model.embedding.table[...], None, None))
        square = jnp.sum(jnp.square(table), axis=1, keepdims=True)
        table = table * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
        rows = layout.spec("batch", None, None, shape=(*token.shape, table.shape[0]))
        own = table.at[token].get(out_sharding=rows)
        near = jnp.einsum("bkd,vd->bkv", own, table, out_sharding=rows)
        id_ = jnp.arange(table.shape[0])
        barred = is_listed(self.special, len(table)) | (id_ >= model.config.vocab_size)
        near = jnp.where(barred | (id_ == token[..., None]), -2.0, near)
        found = []
        for _ in range(min(self.nearest, model.config.vocab_size - 1)):
            best = jnp.argmax(near, axis=2)
            found.append(best)
            near = jnp.where(id_ == best[..., None], -2.0, near)
        chosen = jnp.floor(uniform(key, token) * len(found)).astype(jnp.int32)
        one = sum(jnp.where(chosen == n, best, 0) for n, best in enumerate(found))
        return one.astype(token.dtype)
