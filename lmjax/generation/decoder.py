"""The device part of decoding: compiled once for a config, with the weights as an argument."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from lmjax.config import UserError
from lmjax.generation.sampling import choose, first_largest, penalised
from lmjax.generation.weights import stacked
from lmjax.models import (
    Batch,
    Cache,
    TransformerConfig,
    abstract,
    make_cache,
)
from lmjax.models.batch import last_tokens
from lmjax.models.empty_cache import CacheKind
from lmjax.parallel import Layout
from pallas_kernels.manual_axes import on_each_device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """State of a batch's decoding.

    Attributes:
      cache: keys and values of everything but the newest token.
      token: the newest token of each row.
      tokens: what was decoded so far, from the left; whole on every device.
      log_probabilities: of `tokens`, as in `Continuation`.
      seen: which tokens a row has, the prompt's included; None where nothing depends on it.
      count: number of columns of `tokens` in use.
      done: rows that go on no more; their later columns mean nothing.
      budget: how many tokens each row may have.
      seeds: each row's source of randomness.
    """

    cache: Cache
    token: Int[Array, "batch"]
    tokens: Int[Array, "batch slots"]
    log_probabilities: Float[Array, "batch slots"]
    seen: Bool[Array, "batch vocab"] | None
    count: Int[Array, ""]
    done: Bool[Array, "batch"]
    budget: Int[Array, "batch"]
    seeds: UInt32[Array, "batch"]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Decodes with a cache. Equal decoders share what is compiled.

    Attributes:
      config: of the model, as it is run.
      layout: how batches, activations and parameters are cut over the mesh that is set.
      cache: what keys and values are kept in; see `make_pages`.
    """

    config: TransformerConfig
    layout: Layout
    cache: CacheKind | None = None

    @functools.partial(
        jax.jit, static_argnums=0, static_argnames=("slots", "samples", "top_k", "greedy")
    )
    def start(
        self, params, prompt: Batch, budget, seeds, seen, *, slots: int, samples: int, **settings
    ) -> Decoding:
        """Runs the prompts, padded to one length, and decodes their rows' first tokens."""
        batch, length = prompt.tokens.shape
        logits, cache = self.prefill(params, prompt, length=length + slots)
        if samples > 1:
            rows = jnp.repeat(jnp.arange(batch), samples)
            cache = cache.take(self.layout, rows)
            logits = self.layout.take(logits, rows)
        decoding = Decoding(
            cache=cache,
            token=jnp.zeros_like(cache.lengths),
            tokens=jnp.zeros((batch * samples, slots), jnp.int32),
            log_probabilities=jnp.zeros((batch * samples, slots), jnp.float32),
            seen=seen,
            count=jnp.zeros((), jnp.int32),
            done=budget < 1,
            budget=budget,
            seeds=seeds,
        )
        return self._append(decoding, logits, **settings)

    @functools.partial(
        jax.jit, static_argnums=0, static_argnames=("top_k", "greedy"), donate_argnames="decoding"
    )
    def go_on(self, params, decoding: Decoding, until, **settings) -> Decoding:
        """Decodes until `until` tokens a row are there, or all rows are done."""

        def going_on(decoding: Decoding) -> Bool[Array, ""]:
            return (decoding.count < until) & ~jnp.all(decoding.done)

        def step(decoding: Decoding) -> Decoding:
            logits, cache = self.next(params, decoding.cache, decoding.token, ~decoding.done)
            return self._append(dataclasses.replace(decoding, cache=cache), logits, **settings)

        return jax.lax.while_loop(going_on, step, decoding)

    @functools.partial(jax.jit, static_argnums=0, static_argnames="length")
    def prefill(
        self, params: dict, prompts: Batch, length: int | None = None
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Runs prompts.

        Args:
          params: as `Generator.weights`.
          prompts: rows padded to one length, on either side.
          length: most tokens that a row of the cache can hold; None: those of the batch, enough for
            rows that are inserted into another cache.

        Returns:
          Logits after each prompt, and the cache that holds them.

        Raises:
          UserError: a length below that of the batch.
        """
        batch, columns = prompts.tokens.shape
        if length is not None and length < columns:
            raise UserError(f"length={length}: the batch has {columns} columns")
        cache = make_cache(self.config, self.layout, batch, length or columns, kind=self.cache)
        return self.logits(params, prompts, cache)

    def free_rows(self, rows: int, length: int, source: int | None = None) -> Cache:
        """A cache of free rows, which prompts are inserted into; see `make_cache`."""
        cache = make_cache(self.config, self.layout, rows, length, source, kind=self.cache)
        return dataclasses.replace(cache, empty=False)

    def insert(self, cache: Cache, slots: Sequence[int], rows: Cache) -> Cache:
        """Puts prefilled rows into rows of a cache, whatever these held; others go on unchanged.

        Args:
          cache: the rows that are being decoded. It is used up: only what is returned counts.
          slots: numbers of its rows, one for each of `rows`.
          rows: of `prefill`.

        Raises:
          UserError: numbers of no row, or of one twice; rows that do not fit.
        """
        count, given = len(cache.lengths), list(slots)
        if len(given) != len(rows.lengths):
            raise UserError(f"{len(rows.lengths)} rows to insert, but {len(given)} slots for them")
        if len(set(given)) < len(given) or any(not 0 <= slot < count for slot in given):
            raise UserError(f"slots={given}: give different numbers from 0 to {count - 1}")
        return self._insert(cache, np.array(given, np.int32), rows)

    @functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
    def _insert(self, cache: Cache, slots, rows: Cache) -> Cache:
        return cache.put(slots, rows)

    @functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
    def step(
        self,
        params: dict,
        cache: Cache,
        tokens: Int[Array, "batch"],
        going: Bool[Array, "batch"] | None = None,
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Adds one token to each row.

        What a row gives depends on no other row. The caller ends a row before it has more tokens
        than `Cache.capacity`, or than the model's context.

        Args:
          params: as `Generator.weights`.
          cache: of the tokens before. It is used up: only what is returned counts.
          tokens: the next of each row; of rows that do not go on, any.
          going: rows that go on; the others stay as they are, and their logits mean nothing. None:
            all that are not free.

        Returns:
          Logits after the tokens, and the cache that holds them.
        """
        going = cache.lengths > 0 if going is None else self.layout.reshard(going, "batch")
        return self.next(params, cache, self.layout.reshard(tokens, "batch"), going)

    def logits(
        self, params: dict, batch: Batch, cache: Cache
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Logits after each row's last token, of the real vocabulary, whole rows; traceable."""
        model = nnx.merge(abstract(self.config, self.layout)[0], stacked(params))
        hidden, cache = model(batch, cache)
        hidden = last_tokens(batch.segments, hidden)[:, None]
        logits = self.layout.reshard(model.logits(hidden)[:, 0], "batch", None)
        return logits[:, : self.config.vocab_size], cache

    def next(
        self, params: dict, cache: Cache, tokens: Int[Array, "batch"], going: Bool[Array, "batch"]
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Logits after one more token of each row that goes on; traceable."""
        batch = cache.newest.next().batch(tokens, going.astype(jnp.int32))
        return self.logits(params, batch, cache)

    def _append(
        self, decoding: Decoding, logits, *, stop_tokens, greedy, repetition_penalty, **filters
    ) -> Decoding:
        """Chooses the next token of every row and takes note of it."""

        def local(logits, seen, seeds, count, penalty, filters):
            wanted = logits if seen is None else penalised(logits, seen, penalty)
            if greedy:
                token = first_largest(wanted).astype(jnp.int32)
            else:
                keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), count))(seeds)
                token = choose(wanted, keys, top_k=top_k, **filters)
            chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
            return token, chosen - jax.nn.logsumexp(logits, axis=-1)

        top_k = filters.pop("top_k")  # a number of columns, so no array
        spec = self.layout.spec("batch", shape=logits.shape[:1])
        if spec[0] is not None:  # each device chooses for its own rows
            local = on_each_device(local, spec)
        token, log_probability = local(
            logits, decoding.seen, decoding.seeds, decoding.count, repetition_penalty, filters
        )

        def note(columns, new):
            column = (jnp.zeros((), jnp.int32), decoding.count)
            new = self.layout.reshard(new, None)[:, None]
            return jax.lax.dynamic_update_slice(columns, new, column)

        seen = decoding.seen
        if seen is not None:
            seen = seen | (jnp.arange(seen.shape[1]) == token[:, None])
        count = decoding.count + 1
        stopped = jnp.any(token[:, None] == stop_tokens[None], axis=1)
        done = decoding.done | stopped | (count >= decoding.budget)
        return dataclasses.replace(
            decoding,
            token=token,
            tokens=note(decoding.tokens, token),
            log_probabilities=note(decoding.log_probabilities, log_probability),
            seen=seen,
            count=count,
            done=done,
        )
