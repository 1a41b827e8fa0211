"""Numbers that a model gives the documents of a store, such as scores of compared answers."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lmjax.data.store import TokenStore
from lmjax.evaluation.held_out import HeldOut
from lmjax.objectives import Example

IN_FLIGHT = 2  # examples that the devices have before them


def values_of_documents(
    sets: HeldOut, store: TokenStore, compute: Callable[[Example], Float[Array, "rows slots"]]
) -> Float[np.ndarray, "documents"]:
    """A number of each document of a store of groups; NaN where no row that is read holds it.

    Args:
      sets: how rows are read and put on the devices; on several processes all of them compute.
      store: groups of documents.
      compute: compiled; gives a number of each slot, the same in all processes (`everywhere`).
    """
    reader = sets.rows(store)
    rows = np.arange(sets.count_rows(reader))
    found, pending = [], []
    for example in sets.examples(store):
        pending.append(compute(example))
        if len(pending) > IN_FLIGHT:  # examples of a large set have no room all at once
            found.append(jax.device_get(pending.pop(0)))
    found += jax.device_get(pending)
    is_there = ~np.isnan(reader.labels(rows, np.zeros_like(rows))[:, :, 0])
    values = np.full(store.manifest.documents, np.nan, np.float32)
    values[reader.documents(rows)] = np.concatenate(found)[: len(rows)][is_there]
    return values


def everywhere(values: Float[Array, "rows slots"]) -> Float[Array, "rows slots"]:
    """The values whole on every device, so that each process can read them."""
    return jax.reshard(values, PartitionSpec())
