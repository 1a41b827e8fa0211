"""Pages of a model on the devices, and the calls that read and extend them, in few shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import PartitionSpec

from lmjax.models import TransformerConfig
from lmjax.models.empty_cache import make_pages
from lmjax.parallel import Layout
from lmjax.serving.active import ActiveRequest
from lmjax.serving.forward import NewTokens
from lmjax.serving.settings import FEWEST, EngineSettings, bucket, buckets
from lmjax.serving.weights import ServedWeights

NARROWEST = 128  # tokens of the shortest table of pages


class PageRunner:
    """Runs requests over the pages of the cache.

    Shapes are rounded up to a few: rows, columns, and pages of a row's table. Each is compiled
    once.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layout: Layout,
        settings: EngineSettings,
        at_once: bool = False,
    ):
        """Makes the pages.

        Args:
          config, layout, settings: of the model and its engine.
          at_once: each text is read in one call.
        """
        page, most = settings.page, settings.pages
        if config.max_length is not None:
            most = min(most, -(-config.max_length // page))
        self._pages = make_pages(config, layout, settings.pages, page, settings.cache)
        self._page = page
        self._rows = (1, *buckets(4, settings.slots, 2))
        self._widths = buckets(min(most, -(-NARROWEST // page)), most, 2)
        self._at_once = at_once
        chunk = settings.chunk
        if at_once:
            chunk = max(chunk, most * page)
        self._columns = (1, *buckets(FEWEST, chunk, 2))
        self.chunk = chunk
        self.capacity = most * page

    def fits(self, rows: int, longest: int) -> bool:
        """Returns whether so many texts, the longest of so many tokens, are read in one call.

        Padded to one length they are no more than a chunk.
        """
        if self._at_once or rows > self._rows[-1] or longest > self.chunk:
            return rows == 1
        return bucket(self._rows, rows) * bucket(self._columns, longest) <= self.chunk

    def extend(
        self,
        active: Sequence[ActiveRequest],
        tokens: Sequence[Sequence[int]] | jax.Array,
        columns: int | None = None,
        every: bool = False,
        weights: ServedWeights | None = None,
        shift: int = 0,
        prefix: bool = False,
    ) -> jax.Array:
        """Adds tokens to the cache of requests of the same weights; the requests do not change.

        Args:
          active: the requests.
          tokens: of each, that follow its cached ones; its pages have room for them. As an array
            on the devices: [rows], one of each, and behind them padding, as `OpenStep.chosen` has.
          columns: shape of the call; None: the smallest that fits.
          every: see `PagedForward.extend`.
          weights: that read them; None: those of the requests.
          shift: the tokens follow so many more than the cached ones; below 0, fewer.
          prefix: see `PagedForward.extend`.

        Returns:
          Logits of the requests, then of rows of padding.
        """
        weights = active[0].weights if weights is None else weights
        new = self.arranged(active, tokens, columns, shift)
        given = weights.params, self._pages, new
        logits, self._pages = weights.forward.extend(*given, every=every, prefix=prefix)
        return logits

    def arranged(
        self,
        active: Sequence[ActiveRequest],
        tokens: Sequence[Sequence[int]] | jax.Array,
        columns: int | None = None,
        shift: int = 0,
    ) -> NewTokens:
        """The tokens of a call in the smallest shape that fits."""
        chosen = isinstance(tokens, jax.Array)
        counts = [1] * len(active) if chosen else [len(added) for added in tokens]
        width = bucket(self._widths, max(len(one.pages) for one in active))
        columns = columns or bucket(self._columns, max(counts))
        new = NewTokens.empty(bucket(self._rows, len(active)), columns, width)
        for row, (one, count) in enumerate(zip(active, counts)):
            if not chosen:
                new.tokens[row, :count] = tokens[row]
            new.counts[row] = count
            new.lengths[row] = max(one.cached + shift, 0)
            new.prompt_lengths[row] = len(one.request.tokens)
            new.table[row, : len(one.pages)] = np.asarray(one.pages, np.int32)
        # From the host and from the devices alike, so that both have one compiled program.
        found = tokens if chosen else new.tokens if columns > 1 else new.tokens[:, 0]
        everywhere = jax.NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
        return dataclasses.replace(new, tokens=jax.device_put(found, everywhere))
