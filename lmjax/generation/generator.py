"""Decoding with a key-value cache: prompts of different lengths in one batch, on any mesh."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from lmjax.config import UserError, replace
from lmjax.generation.prompts import (
    Prompt,
    check_prompts,
    prompt_batch,
    room,
    round_up,
    tokens_of,
    tokens_seen,
)
from lmjax.generation.sampling import Sampling, choose, penalised
from lmjax.generation.unstacked import (
    layers_apart,
    light,
    placed,
    stacked,
    unstacked,
)
from lmjax.models import (
    Batch,
    Cache,
    Place,
    TransformerConfig,
    abstract,
    last_place,
    make_cache,
)
from lmjax.parallel import Layout, generation_layout

PACE = 0.2  # seconds between two pieces of a stream


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What follows a prompt.

    Attributes:
      tokens: without the prompt and without the stop token.
      log_probabilities: natural logarithm of the probability of each token in the model's own
        distribution: at temperature 1, without penalty, before any filter.
    """

    tokens: list[int]
    log_probabilities: list[float]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Where a batch's decoding stands.

    Attributes:
      cache: keys and values of everything but the newest token.
      token: the newest token of each row.
      place: where it stands in the row's text.
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
    place: Place
    tokens: Int[Array, "batch slots"]
    log_probabilities: Float[Array, "batch slots"]
    seen: Bool[Array, "batch vocab"] | None
    count: Int[Array, ""]
    done: Bool[Array, "batch"]
    budget: Int[Array, "batch"]
    seeds: UInt32[Array, "batch"]


class Generator:
    """A model ready to continue token sequences.

        generator = Generator(config, params)
        rows = generator.generate(prompts, Sampling(temperature=0.8), max_tokens=100)

    A mesh must be set, the one that the parameters lie on. Each shape (number of prompts, and the
    power of two above the longest prompt and above `max_tokens`) is compiled once.
    """

    def __init__(
        self,
        config: TransformerConfig,
        params: dict,
        layout: Layout | None = None,
        unstack: bool | None = None,
    ):
        """Takes parameters as `initialize`, a checkpoint or `interop` gives them.

        Args:
          config: the model.
          params: its parameters, cut over the mesh in any way, stacked or layer by layer.
          layout: how to cut batches, activations and parameters; None is `generation_layout()`.
          unstack: keep the parameters of each layer apart and compile each layer by itself; None:
            see `layers_apart`.
        """
        self.config = config
        unstack = layers_apart() if unstack is None else unstack
        self.layout = generation_layout() if layout is None else layout
        self._run_as = replace(config, unroll=0) if unstack else config
        self._graph, shapes = abstract(self._run_as, self.layout)
        self.weights = placed(light(config, params if unstack else stacked(params)), shapes)
        if unstack:
            self.weights["blocks"] = unstacked(self.weights["blocks"], config.num_layers)
        self._start = jax.jit(
            self._prefill, static_argnames=("slots", "samples", "top_k", "greedy")
        )
        self._continue = jax.jit(
            self._decode, static_argnames=("top_k", "greedy"), donate_argnums=1
        )

    @property
    def params(self) -> dict:
        """The parameters as the model has them, in the compute dtype where it only casts them.

        On a CPU they are stacked anew at each call: `weights` is what decoding reads.
        """
        return stacked(self.weights)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        max_tokens: int = 100,
        stop_tokens: Sequence[int] = (),
        samples: int = 1,
        sources: Sequence[Sequence[int]] | None = None,
    ) -> list[list[int]]:
        """The tokens of `continuations`, which says the rest."""
        found = self.continuations(prompts, sampling, max_tokens, stop_tokens, samples, sources)
        return [row.tokens for row in found]

    def continuations(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        max_tokens: int = 100,
        stop_tokens: Sequence[int] = (),
        samples: int = 1,
        sources: Sequence[Sequence[int]] | None = None,
    ) -> list[Continuation]:
        """What follows each prompt, `samples` rows of the first, then those of the second, ...

        See `stream`, which this is all of at once.
        """
        found = [Continuation([], []) for _ in range(len(prompts) * samples)]
        settings = sampling, max_tokens, stop_tokens, max_tokens, samples
        for part in self._parts(prompts, *settings, sources):
            for row, new in zip(found, part):
                row.tokens.extend(new.tokens)
                row.log_probabilities.extend(new.log_probabilities)
        return found

    def stream(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        max_tokens: int = 100,
        stop_tokens: Sequence[int] = (),
        interval: int | None = None,
        samples: int = 1,
        sources: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[list[list[int]]]:
        """Yields the new tokens of each row as they are decoded.

        A row ends before a stop token, after `max_tokens`, or when the model's context is full. It
        does not depend on the other rows: row i draws with seed `sampling.seed + i`, and gives the
        same tokens alone.

        Args:
          prompts: token ids, at least one a row, or a row of a batch (`lmjax.models.blank_row`).
          sampling: how tokens are chosen; None is `Sampling()`.
          max_tokens: most tokens of a row.
          stop_tokens: ids that end a row.
          interval: tokens that are decoded between two yields; None: as many as take a fifth of a
            second, which costs less than one at a time.
          samples: rows that continue each prompt; those of a prompt stand together.
          sources: what the encoder reads, one text for each prompt, if the model has an encoder;
            prompts are then what the decoder begins with, such as T5's token 0.

        Raises:
          UserError: an empty prompt or source, one longer than the context, or with ids that the
            model does not have; no samples; sources for a model without an encoder, or none for
            one with it.
        """
        settings = sampling, max_tokens, stop_tokens, interval, samples
        for part in self._parts(prompts, *settings, sources):
            yield [row.tokens for row in part]

    def _parts(
        self, prompts, sampling, max_tokens, stop_tokens, interval, samples, sources
    ) -> Iterator[list[Continuation]]:
        """What each row has gained, as it is decoded; see `stream`."""
        texts = list(map(tokens_of, prompts))
        check_prompts(self.config, texts, sources)
        if samples < 1:
            raise UserError(f"samples={samples}: must be 1 or more")
        if not prompts or max_tokens < 1:
            return
        sampling = Sampling() if sampling is None else sampling
        settings = sampling.arguments(stop_tokens)
        budget = [room(self.config, len(text), max_tokens) for text in texts]
        budget = np.repeat(np.array(budget, np.int32), samples)
        seen = None
        if sampling.repetition_penalty != 1:
            seen = np.repeat(tokens_seen(texts, self.config.vocab_size), samples, axis=0)
        decoding = self._start(
            self.weights,
            self.place(prompt_batch(prompts, sources)),
            self.place(budget),
            self.place(sampling.seed + np.arange(len(budget), dtype=np.uint32)),
            self.place(seen),
            slots=round_up(max_tokens),
            samples=samples,
            **settings,
        )
        done, step, ended = 0, interval or 1, np.zeros(len(budget), bool)
        while True:
            count = int(decoding.count)
            tokens = np.asarray(decoding.tokens)[:, done:count]
            log_probabilities = np.asarray(decoding.log_probabilities)[:, done:count]
            require_numbers(log_probabilities[~ended])
            part, ended = new_tokens(tokens, done, budget, ended, stop_tokens)
            rows = log_probabilities.tolist()
            yield [Continuation(new, row[: len(new)]) for new, row in zip(part, rows)]
            if ended.all():
                return
            begin, done = time.monotonic(), count
            decoding = self._continue(self.weights, decoding, np.int32(count + step), **settings)
            decoding.count.block_until_ready()
            if interval is None:  # what is the same for every token is computed once a step
                step = max(1, min(2 * step, round(step * PACE / (time.monotonic() - begin))))

    def place(self, tree: Any) -> Any:
        """Numpy arrays whose first axis is the batch, on the devices."""

        def put(a: np.ndarray) -> jax.Array:
            spec = self.layout.spec("batch", *(None,) * (a.ndim - 1), shape=a.shape)
            return jax.device_put(a, jax.NamedSharding(jax.sharding.get_mesh(), spec))

        return jax.tree.map(put, tree)

    def _prefill(
        self, params, prompt: Batch, budget, seeds, seen, *, slots: int, samples: int, **settings
    ) -> Decoding:
        """Runs the prompts, left-padded to one length, and decodes their rows' first tokens."""
        batch, length = prompt.tokens.shape
        logits, cache = self.prefill(params, prompt, length + slots)
        place = last_place(prompt)
        if samples > 1:
            rows = jnp.repeat(jnp.arange(batch), samples)
            cache = cache.take(self.layout, rows)
            logits = self.layout.take(logits, rows)
            place = jax.tree.map(lambda a: self.layout.take(a, rows), place)
        decoding = Decoding(
            cache=cache,
            token=jnp.zeros_like(place.position),
            place=place,
            tokens=jnp.zeros((batch * samples, slots), jnp.int32),
            log_probabilities=jnp.zeros((batch * samples, slots), jnp.float32),
            seen=seen,
            count=jnp.zeros((), jnp.int32),
            done=budget < 1,
            budget=budget,
            seeds=seeds,
        )
        return self._append(decoding, logits, **settings)

    def _decode(self, params, decoding: Decoding, until, **settings) -> Decoding:
        """Decodes until `until` tokens a row are there, or all rows are done."""

        def going_on(decoding: Decoding) -> Bool[Array, ""]:
            return (decoding.count < until) & ~jnp.all(decoding.done)

        def step(decoding: Decoding) -> Decoding:
            batch = decoding.place.batch(decoding.token, jnp.where(decoding.done, 0, 1))
            logits, cache = self.logits(params, batch, decoding.cache)
            return self._append(dataclasses.replace(decoding, cache=cache), logits, **settings)

        return jax.lax.while_loop(going_on, step, decoding)

    def prefill(
        self, params: dict, prompt: Batch, length: int
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Logits after each prompt, and a cache of `length` slots that holds them; traceable."""
        cache = make_cache(self._run_as, self.layout, prompt.tokens.shape[0], length)
        return self.logits(params, prompt, cache)

    def logits(
        self, params: dict, batch: Batch, cache: Cache
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Logits after each row's last token, of the real vocabulary, whole rows; traceable."""
        model = nnx.merge(self._graph, stacked(params))
        hidden, cache = model(batch, cache)
        logits = self.layout.place(model.logits(hidden[:, -1:])[:, 0], "batch", None)
        return logits[:, : self.config.vocab_size], cache

    def _append(
        self, decoding: Decoding, logits, *, stop_tokens, greedy, repetition_penalty, **filters
    ) -> Decoding:
        """Chooses the next token of every row and takes note of it."""

        def local(logits, seen, seeds, count, penalty, filters):
            wanted = logits if seen is None else penalised(logits, seen, penalty)
            if greedy:
                token = jnp.argmax(wanted, axis=-1).astype(jnp.int32)
            else:
                keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), count))(seeds)
                token = choose(wanted, keys, top_k=top_k, **filters)
            chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
            return token, chosen - jax.nn.logsumexp(logits, axis=-1)

        top_k = filters.pop("top_k")  # a number of columns, so no array
        spec = self.layout.spec("batch", shape=logits.shape[:1])
        if spec[0] is not None:  # each device chooses for its own rows
            local = jax.shard_map(local, out_specs=spec)
        token, log_probability = local(
            logits, decoding.seen, decoding.seeds, decoding.count, repetition_penalty, filters
        )

        def note(columns, new):
            column = (jnp.zeros((), jnp.int32), decoding.count)
            new = self.layout.place(new, None)[:, None]
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
            place=jax.tree.map(
                lambda last, next: jnp.where(done, last, next),
                decoding.place,
                decoding.place.next(),
            ),
            tokens=note(decoding.tokens, token),
            log_probabilities=note(decoding.log_probabilities, log_probability),
            seen=seen,
            count=count,
            done=done,
        )


def require_numbers(log_probabilities: Float[np.ndarray, "..."]) -> None:
    """Raises UserError for NaN, which a model gives whose parameters are no numbers."""
    if np.isnan(log_probabilities).any():
        raise UserError(
            "the model gives no probabilities (NaN): its parameters hold what is no number, or "
            "overflow in its dtype"
        )


def new_tokens(
    columns: Int[np.ndarray, "batch new"],
    seen: int,
    budget: Int[np.ndarray, "batch"],
    ended: Bool[np.ndarray, "batch"],
    stop_tokens: Sequence[int],
) -> tuple[list[list[int]], Bool[np.ndarray, "batch"]]:
    """What each row has gained, and which rows have ended.

    Args:
      columns: the newest columns of decoded tokens.
      seen: number of columns before them.
      budget: most tokens of each row.
      ended: rows that had ended before.
      stop_tokens: ids that end a row, and are no part of it.
    """
    part: list[list[int]] = []
    ended = ended.copy()
    for row, tokens in enumerate(columns.tolist()):
        if ended[row]:
            part.append([])
            continue
        kept = tokens[: budget[row] - seen]
        stop = next((i for i, token in enumerate(kept) if token in stop_tokens), None)
        ended[row] = stop is not None or seen + len(kept) >= budget[row]
        part.append(kept[:stop])
    return part, ended
