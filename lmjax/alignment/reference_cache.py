"""Log-probabilities of answers under a reference policy, computed once and kept on disk."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from lmjax.alignment.document_values import everywhere, values_of_documents
from lmjax.alignment.preference_objective import score
from lmjax.config import to_json
from lmjax.console import RunLog, Stopwatch
from lmjax.data.cache import cache_errors_told, cache_folder
from lmjax.data.documents import digest
from lmjax.data.hashes import FileHashes
from lmjax.data.store import TokenStore
from lmjax.evaluation.held_out import HeldOut
from lmjax.files import replacing
from lmjax.interop.beginning import files_of_parameters
from lmjax.interop.folder import read_params
from lmjax.models import TransformerConfig, abstract
from lmjax.objectives import Example
from lmjax.parallel import Layout
from lmjax.training.feed import TextFeed

FORMAT = 1  # of what is computed; files of another are made anew
FOLDER = "reference"  # in the cache


def with_reference(
    feed: TextFeed, model: TransformerConfig, folder: str, layout: Layout, log: RunLog
) -> TextFeed:
    """The feed with the reference's log-probability as a further label of every answer.

    They are read from the cache (data.cache) where the same model has scored the same answers, cut
    to the same length, before; otherwise the model is read, and given up when it has scored them.

    Args:
      feed: comparisons for `PreferencePairs`.
      model: config of the reference.
      folder: that its parameters are read from.
      layout: of the mesh that is set.
      log: for what was done.

    Raises:
      UserError: the model cannot be read, or the cache cannot be written.
    """
    watch, data = Stopwatch(), feed.prepared.data
    cache = cache_folder(data.cache)
    with log.phase("reading the reference") as report:
        hashes = FileHashes(cache / "hashes", report)(list(map(str, files_of_parameters(folder))))
    # Every rounding of these numbers is theirs: the model's settings, rows and their lengths.
    given = feed.length, feed.objective.slots, feed.objective.keeps_begin, data.long_documents
    mark = digest(str(FORMAT), to_json(model), *hashes, *map(str, given))
    scorer = _Scorer(feed, model, folder, layout)

    def labelled(store: TokenStore) -> TokenStore:
        text = store.manifest
        key = digest(mark, text.source, text.tokenizer, text.split, str(text.held_out))
        path = cache / FOLDER / f"{key}.npy"
        if not _on_all(_is_whole(path, store)):
            with log.phase("the reference scores the answers"), cache_errors_told(path):
                _write(path, scorer.score(store))
        return TokenStore(store.folder, str(path))

    stores = {
        kind: {name: labelled(store) for name, store in getattr(feed.prepared, kind).items()}
        for kind in ("train", "held_out")
    }
    how = f"computed in {cache / FOLDER}" if scorer.has_scored else f"from {cache / FOLDER}"
    log.fact("reference", f"log-probabilities under {folder}, {how}", watch.seconds())
    return dataclasses.replace(feed, prepared=dataclasses.replace(feed.prepared, **stores))


class _Scorer:
    """Scores of a reference, which is read when the first store is scored."""

    def __init__(self, feed: TextFeed, model: TransformerConfig, folder: str, layout: Layout):
        self.sets = HeldOut(
            stores={},
            objective=feed.objective,
            layout=layout,
            length=feed.length,
            vocab_size=model.vocab_size,
            batch_size=feed.batch_size,
            lexicon=feed.lexicon,
            reader=feed.prepared.reader,
        )
        self.model, self.folder = model, folder
        self.has_scored = False
        self._compute: Callable[[Example], Array] | None = None

    def score(self, store: TokenStore) -> Float[np.ndarray, "documents"]:
        """Log-probability of each answer of a store."""
        if self._compute is None:
            params = read_params(self.folder, self.model, self.sets.layout)
            compiled = log_probabilities_of_pairs(self.model, self.sets.layout)
            self._compute = lambda example: compiled(params, example)
        self.has_scored = True
        return values_of_documents(self.sets, store, self._compute)


def log_probabilities_of_pairs(
    model: TransformerConfig, layout: Layout
) -> Callable[[dict, Example], Float[Array, "rows 2"]]:
    """Compiled function of parameters and an example of `PreferencePairs`."""
    return functools.partial(_log_probabilities, model, layout)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _log_probabilities(
    model: TransformerConfig, layout: Layout, params: dict, example: Example
) -> Float[Array, "rows 2"]:
    reference, targets = nnx.merge(abstract(model, layout)[0], params), example.targets
    sides = zip(example.inputs, (targets.chosen, targets.rejected), strict=True)
    found = [score(reference, batch, side).log_probs for batch, side in sides]
    return everywhere(jnp.stack(found, axis=1))


def _is_whole(path: Path, store: TokenStore) -> bool:
    """Returns whether a file has a number for each of the store's documents."""
    try:
        found = np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        return False
    return found.shape == (store.manifest.documents,) and found.dtype == np.float32


def _on_all(found: bool) -> bool:
    """Returns whether all processes have found it: otherwise they compute it together."""
    if jax.process_count() == 1:
        return found
    return bool(np.all(multihost_utils.process_allgather(np.array(found))))


def _write(path: Path, values: Float[np.ndarray, "documents"]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.save(file, values)
