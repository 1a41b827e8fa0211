"""Device part of scoring: log-probabilities of tokens behind contexts that share a cache.

A context is run once, whatever number of continuations it has: each of them reads the context's
keys and values. Logits are made where a token is scored, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lmjax.generation.decoder import Decoder
from lmjax.generation.weights import stacked
from lmjax.models import Batch, Cache, abstract, make_cache
from lmjax.models.batch import last_tokens
from lmjax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class LikelihoodProgram:
    """Scores tokens. Equal programs share what is compiled.

    Attributes:
      decoder: the model as it is run, and how it is cut over the mesh that is set.
    """

    decoder: Decoder

    def contexts(
        self, params: dict, batch: Batch, targets, cache: Cache | None, *, length: int, rows: int
    ) -> tuple[Float[Array, "rows choices"], Int[Array, "rows"], Cache]:
        """Runs contexts.

        Args:
          params: as `Generator.weights`.
          batch: contexts, padded on the right; rows of padding may be among them.
          targets: first tokens of the continuations of each row [rows, choices].
          cache: one row of what all contexts begin with, which the batch lacks; or None.
          length: most tokens of a row of the new cache, where none is given.
          rows: number of rows.

        Returns:
          Log-probability of each target, the likeliest token, and the cache.
        """
        last, cache = self._last(params, batch, cache, length=length, rows=rows)
        found, best = self._scores(params, last[None], targets[None])
        return found[0], best[0], cache

    @functools.partial(jax.jit, static_argnums=0, static_argnames="length")
    def prefix(self, params: dict, batch: Batch, *, length: int) -> Cache:
        """The cache of one row that others begin with, which has room for `length` tokens."""
        cache = make_cache(self.decoder.config, self.decoder.layout, 1, length)
        return self._model(params)(batch, cache)[1]

    def behind(
        self, params: dict, cache: Cache, owners, batch: Batch, at, targets
    ) -> tuple[Float[Array, "groups tokens"], Int[Array, "groups tokens"]]:
        """Runs continuations behind their contexts.

        Args:
          params: as `Generator.weights`.
          cache: of `contexts`; it stays as it is.
          owners: number of the context's row, for each row of the batch.
          batch: continuations, padded on the right.
          at: of the tokens that are scored, the place in the batch before them, counted along its
            rows one after another [groups, tokens].
          targets: these tokens.

        Returns:
          Log-probability of each target, and the likeliest token there.
        """
        hidden = self._behind(params, cache, owners, batch)
        return self._in_groups(params, hidden, at, targets)

    def whole(
        self, params: dict, batch: Batch, at, targets
    ) -> tuple[Float[Array, "groups tokens"], Int[Array, "groups tokens"]]:
        """Runs whole rows without a cache; see `behind`."""
        return self._in_groups(params, self._whole(params, batch), at, targets)

    # The model and the scores of its states are compiled apart: the latter have many sizes, and
    # the former take long.

    @functools.partial(jax.jit, static_argnums=0, static_argnames=("length", "rows"))
    def _last(self, params, batch, cache, *, length, rows):
        """The state behind each context, and the cache; see `contexts`."""
        layout = self.decoder.layout
        if cache is None:
            cache = make_cache(self.decoder.config, layout, rows, length)
        else:
            cache = cache.take(layout, jnp.zeros(rows, jnp.int32))
        hidden, cache = self._model(params)(batch, cache)
        return jax.reshard(last_tokens(batch.segments, hidden), PartitionSpec()), cache

    @functools.partial(jax.jit, static_argnums=0)
    def _behind(self, params, cache, owners, batch):
        """States of continuations, those of a row after those of the row before."""
        cache = cache.take(self.decoder.layout, owners)
        return _flat(self._model(params)(batch, cache)[0])

    @functools.partial(jax.jit, static_argnums=0)
    def _whole(self, params, batch):
        """States of whole rows; see `_behind`."""
        return _flat(self._model(params)(batch)[0])

    def _in_groups(self, params, hidden, at, targets):
        """Log-probabilities and likeliest tokens at some of the states."""
        found, best = self._scores(params, self._taken(hidden, at), targets[..., None])
        return found[..., 0], best

    @functools.partial(jax.jit, static_argnums=0)
    def _taken(self, hidden, at):
        """States before targets: in a program of its own, which is compiled fast for many sizes."""
        return self.decoder.layout.take(hidden, at.reshape(-1)).reshape(*at.shape, -1)

    @functools.partial(jax.jit, static_argnums=0)
    def _scores(self, params, states, targets):
        """Log-probabilities of targets [groups, tokens, choices], and the likeliest tokens.

        Args:
          params: as `Generator.weights`.
          states: hidden state before each target [groups, tokens, width].
          targets: tokens.
        """
        model, vocabulary = self._model(params), self.decoder.config.vocab_size

        def group(given):
            states, wanted = given
            logits = model.logits(states[:, None])[:, 0]
            logits = jax.reshard(logits, PartitionSpec())[:, :vocabulary].astype(jnp.float32)
            chosen = jnp.take_along_axis(logits, wanted, axis=1)
            # Passes that XLA's CPU compiler makes fast: `logsumexp` and `argmax` take three times
            # as long, a third of the product before them.
            top = jnp.max(logits, axis=1, keepdims=True)
            total = jnp.sum(jnp.exp(logits - top), axis=1, keepdims=True)
            first = jnp.where(logits == top, jnp.arange(vocabulary), vocabulary)
            best = jnp.min(first, axis=1).astype(jnp.int32)
            return chosen - top - jnp.log(total), best

        return jax.lax.map(group, (states, targets))

    def _model(self, params: dict) -> Transformer:
        graph, _ = abstract(self.decoder.config, self.decoder.layout)
        return nnx.merge(graph, stacked(params))


def _flat(hidden: Float[Array, "rows columns width"]) -> Float[Array, "states width"]:
    """States of all rows on every device."""
    return jax.reshard(hidden, PartitionSpec()).reshape(-1, hidden.shape[-1])
