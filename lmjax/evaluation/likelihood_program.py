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
from lmjax.models.cache import last_tokens
from lmjax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class LikelihoodProgram:
    """Scores tokens. Equal programs share what is compiled.

    Attributes:
      decoder: the model as it is run, and how it is cut over the mesh that is set.
    """

    decoder: Decoder

    @functools.partial(jax.jit, static_argnums=0, static_argnames=("length", "rows"))
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
        layout = self.decoder.layout
        if cache is None:
            cache = make_cache(self.decoder.config, layout, rows, length)
        else:
            cache = cache.take(layout, jnp.zeros(rows, jnp.int32))
        hidden, cache = self._model(params)(batch, cache)
        last = last_tokens(batch.segments, hidden)
        columns = jnp.arange(rows)[None]
        found, best = self._scored(params, last, columns, targets[None])
        return found[0], best[0], cache

    @functools.partial(jax.jit, static_argnums=0, static_argnames="length")
    def prefix(self, params: dict, batch: Batch, *, length: int) -> Cache:
        """The cache of one row that others begin with, which has room for `length` tokens."""
        cache = make_cache(self.decoder.config, self.decoder.layout, 1, length)
        return self._model(params)(batch, cache)[1]

    @functools.partial(jax.jit, static_argnums=0)
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
        cache = cache.take(self.decoder.layout, owners)
        hidden, _ = self._model(params)(batch, cache)
        return self._in_groups(params, hidden, at, targets)

    @functools.partial(jax.jit, static_argnums=0)
    def whole(
        self, params: dict, batch: Batch, at, targets
    ) -> tuple[Float[Array, "groups tokens"], Int[Array, "groups tokens"]]:
        """Runs whole rows without a cache; see `behind`."""
        hidden, _ = self._model(params)(batch)
        return self._in_groups(params, hidden, at, targets)

    def _in_groups(self, params, hidden, at, targets):
        """Log-probabilities and likeliest tokens at columns of rows of hidden states."""
        flat = jax.reshard(hidden, PartitionSpec()).reshape(-1, hidden.shape[-1])
        found, best = self._scored(params, flat, at, targets[..., None])
        return found[..., 0], best

    def _scored(self, params, hidden, at, targets):
        """Log-probabilities of targets [groups, tokens, choices], and the likeliest tokens.

        Args:
          params: as `Generator.weights`.
          hidden: hidden states [states, width].
          at: number of the state before each target [groups, tokens].
          targets: tokens.
        """
        layout, model = self.decoder.layout, self._model(params)
        hidden, vocabulary = jax.reshard(hidden, PartitionSpec()), self.decoder.config.vocab_size

        def group(given):
            rows, wanted = given
            logits = model.logits(layout.take(hidden, rows)[:, None])[:, 0]
            logits = jax.reshard(logits, PartitionSpec())[:, :vocabulary]
            chosen = jnp.take_along_axis(logits, wanted, axis=1)
            chosen = chosen - jax.nn.logsumexp(logits, axis=1, keepdims=True)
            return chosen, jnp.argmax(logits, axis=1).astype(jnp.int32)

        return jax.lax.map(group, (at, targets))

    def _model(self, params: dict) -> Transformer:
        graph, _ = abstract(self.decoder.config, self.decoder.layout)
        return nnx.merge(graph, stacked(params))
