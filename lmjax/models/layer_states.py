"""The residual stream of a model behind some of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float, PRNGKeyArray

from lmjax.models.batch import Batch
from lmjax.models.executor import Blocks
from lmjax.models.transformer import Transformer


def layer_states(
    model: Transformer, batch: Batch, layers: Sequence[int], key: PRNGKeyArray | None = None
) -> tuple[Float[Array, "batch seq width"], list[Float[Array, "batch seq embed"]]]:
    """The hidden states of a batch, and what some layers give, before any final norm.

    The blocks are run in parts, each a program of its own.

    Args:
      model: of an encoder and a decoder the decoder's layers are told.
      batch: what it reads.
      layers: numbers of layers, rising; 1 is the first.
      key: for dropout; None drops nothing.
    """
    executor, found, done = model.executor, [], 0

    def run(blocks: Blocks, x: Any, mask: Any, tables: Any, cache: None) -> tuple[Any, None]:
        nonlocal done
        size, first = len(blocks.windows), 0
        for last in [n - done for n in layers if done < n <= done + size]:
            x, _ = executor(blocks.part(first, last), x, mask, tables, cache)
            found.append(x)
            first = last
        if first < size:
            x, _ = executor(blocks.part(first, size), x, mask, tables, cache)
        done += size
        return x, None

    model.executor = run
    try:
        hidden, _ = model(batch, key=key)
    finally:
        model.executor = executor
    return hidden, found
