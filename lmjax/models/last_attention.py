"""Queries, keys and values of a model's last layer, noted as the model runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from lmjax.models.attention import Attention, Tables
from lmjax.models.executor import Blocks
from lmjax.models.transformer import Transformer
from pallas_kernels.attention import Mask


@dataclasses.dataclass(frozen=True)
class AttendedHeads:
    """All that the self-attention of a layer compares, positions already in it.

    Attributes:
      query: of each head.
      keys: of each head, or of each group of heads.
      values: likewise.
      mask: the keys that each query sees.
    """

    query: Float[Array, "batch seq heads head_dim"]
    keys: Float[Array, "batch seq kv_heads head_dim"]
    values: Float[Array, "batch seq kv_heads head_dim"]
    mask: Mask


class _Recorder:
    """Stands in a block in place of its attention, and takes note of the heads."""

    def __init__(self, layer: Attention, found: list[AttendedHeads]):
        self.layer, self.found = layer, found

    def __call__(
        self, x: jax.Array, mask: Mask, tables: Tables, cache: None, key: PRNGKeyArray | None
    ) -> tuple[jax.Array, None]:
        # The layer computes them too; compiled, that is one computation.
        self.found.append(AttendedHeads(*self.layer.heads(x, tables), mask))
        return self.layer(x, mask, tables, cache, key)


@contextlib.contextmanager
def last_heads(model: Transformer) -> Iterator[list[AttendedHeads]]:
    """Adds the last layer's heads to the list, each time that the model runs in the block.

    The layers before it run as they would. Of an encoder and a decoder it is the decoder's layer.

    Args:
      model: whose layers are all of one kind, without a cache.
    """
    executor, done = model.executor, 0
    found: list[AttendedHeads] = []

    def run(blocks: Blocks, x: Any, mask: Mask, tables: Tables, cache: None) -> tuple[Any, None]:
        nonlocal done
        size = len(blocks.windows)
        done += size
        if done < model.config.num_layers:
            return executor(blocks, x, mask, tables, cache)
        done = 0
        if size > 1:
            x, _ = executor(blocks.part(0, size - 1), x, mask, tables, cache)
        last = blocks.part(size - 1, size)
        own = last.params, last.keys, last.dropout, last.auxiliary
        params, key, rate, auxiliary = jax.tree.map(lambda a: a[0], own)
        block = last.block(params, key, rate, auxiliary)
        object.__setattr__(block, "attention", _Recorder(block.attention, found))
        return block(x, dataclasses.replace(mask, window=last.windows[0]), tables, None, key)

    model.executor = run
    try:
        yield found
    finally:
        model.executor = executor
