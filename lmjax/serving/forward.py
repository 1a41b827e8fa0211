"""The model over pages: more tokens of some rows, compiled once for each shape."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lmjax.generation.weights import stacked
from lmjax.models import Batch, TransformerConfig, abstract
from lmjax.models.batch import last_tokens
from lmjax.models.paged_cache import CachePages, PagedRows
from lmjax.parallel import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewTokens:
    """Tokens that are added to some rows.

    Attributes:
      tokens: of each row, from the left; [rows] where no row has more than one.
      counts: how many they are; 0: the row is padding.
      lengths: tokens of each row before.
      prompt_lengths: tokens of each row's text when it was first read.
      table: each row's pages.
    """

    tokens: Int[np.ndarray | Array, "rows *new"]
    counts: Int[np.ndarray | Array, "rows"]
    lengths: Int[np.ndarray | Array, "rows"]
    prompt_lengths: Int[np.ndarray | Array, "rows"]
    table: Int[np.ndarray | Array, "rows row_pages"]

    @classmethod
    def empty(cls, rows: int, new: int, width: int) -> NewTokens:
        """Rows of padding, to be filled in."""
        numbers = (np.zeros(rows, np.int32) for _ in range(3))
        return cls(np.zeros((rows, new), np.int32), *numbers, np.zeros((rows, width), np.int32))


@dataclasses.dataclass(frozen=True)
class PagedForward:
    """Runs a model over pages. Equal ones share what is compiled.

    Attributes:
      config: of the model, as it is run.
      layout: how it is cut over the mesh that is set.
    """

    config: TransformerConfig
    layout: Layout

    @functools.partial(
        jax.jit, static_argnums=0, static_argnames=("every", "prefix"), donate_argnames="pages"
    )
    def extend(
        self,
        params: dict,
        pages: CachePages,
        new: NewTokens,
        *,
        every: bool = False,
        prefix: bool = False,
    ) -> tuple[Float[Array, "rows *new vocab"], CachePages]:
        """Adds tokens to rows.

        Args:
          params: as `Generator.weights`.
          pages: with the tokens before. They are used up: only what is returned counts.
          new: the tokens. The pages that they go to are the rows' own.
          every: return the logits after each token; else after each row's last one.
          prefix: the rows are whole texts, whose prompts see themselves both ways; see `PrefixLM`.

        Returns:
          Logits of the real vocabulary, those of padding without meaning; and the pages.
        """
        layout = self.layout
        tokens = new.tokens.reshape(len(new.counts), -1)
        column = jnp.arange(tokens.shape[1])
        real = column < new.counts[:, None]
        positions = jnp.where(real, new.lengths[:, None] + column, 0)
        in_prompt = positions < new.prompt_lengths[:, None]
        batch = Batch(
            tokens=tokens,
            positions=positions,
            segments=real.astype(jnp.int32),
            ranks=jnp.where(in_prompt, 0, positions) if prefix else None,
            block_positions=jnp.zeros_like(tokens),
        )
        batch = jax.tree.map(lambda a: layout.reshard(a, "batch", None), batch)
        rows = PagedRows(pages, new.table, new.lengths, new.prompt_lengths, empty=prefix)
        model = nnx.merge(abstract(self.config, layout)[0], stacked(params))
        hidden, rows = model(batch, rows)
        if not every:
            hidden = last_tokens(batch.segments, hidden)[:, None]
        logits = layout.reshard(model.logits(hidden), "batch", None, None)
        logits = logits[..., : self.config.vocab_size]
        return (logits if every else logits[:, 0]), rows.pages
