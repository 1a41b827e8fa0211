"""Decoding with a key-value cache: prompts of different lengths in one batch, on any mesh."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from lmjax.config import UserError, replace
from lmjax.generation.decoder import Decoder
from lmjax.generation.prompts import (
    Prompt,
    check_prompts,
    prompt_batch,
    room,
    round_up,
    tokens_of,
    tokens_seen,
)
from lmjax.generation.sampling import Sampling
from lmjax.generation.weights import decoding_weights, layers_apart, stacked, turned
from lmjax.models import TransformerConfig, decoding_layout, merge_adapters
from lmjax.models.empty_cache import CacheKind
from lmjax.parallel import Layout, generation_layout

PACE = 0.2  # seconds between two pieces of a stream


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Continuation of a prompt.

    Attributes:
      tokens: without the prompt and without the stop token.
      log_probabilities: natural logarithm of the probability of each token in the model's own
        distribution: at temperature 1, without penalty, before any filter.
      stop: the stop token that ended it; None where it was cut off.
      stop_log_probability: of the stop token.
    """

    tokens: list[int]
    log_probabilities: list[float]
    stop: int | None = None
    stop_log_probability: float | None = None


class Generator:
    """A model ready to continue token sequences.

        generator = Generator(config, params)
        rows = generator.generate(prompts, Sampling(temperature=0.8), max_tokens=100)

    A mesh must be set, the one that the parameters lie on. Each shape (number of prompts, and the
    power of two above the longest prompt and above `max_tokens`) is compiled once for a config: a
    generator of other parameters compiles nothing anew.
    """

    def __init__(
        self,
        config: TransformerConfig,
        params: dict,
        layout: Layout | None = None,
        unstack: bool | None = None,
        merge: bool = True,
        cache: CacheKind | None = None,
    ):
        """Takes parameters as `initialize`, a checkpoint or `interop` gives them.

        Args:
          config: the model.
          params: its parameters, cut over the mesh in any way, stacked or layer by layer.
          layout: how to cut batches, activations and parameters, and the order of the axes of
            `params`; None is `generation_layout()`.
          unstack: keep the parameters of each layer apart and compile each layer by itself; None:
            see `layers_apart`.
          merge: make weights anew in float32 with what adapters add to them, which is fastest;
            False: apply the adapters beside the weights. Those take no further memory then, unless
            they are cast or unstacked.
          cache: what keys and values are kept in: int8 or fp8, which take less memory and are less
            exact; None: what is computed in.
        """
        if merge:
            params, config = merge_adapters(params, config)
        self.config = config
        unstack = layers_apart() if unstack is None else unstack
        given = generation_layout() if layout is None else layout
        self.layout = dataclasses.replace(given, outputs_first=False)
        decoded = decoding_layout(config, given) if unstack else self.layout
        self.weights = decoding_weights(config, params, given, decoded, unstack)
        config = replace(config, unroll=0) if unstack else config
        self.decoder = Decoder(config, decoded, cache)

    @property
    def params(self) -> dict:
        """The parameters as the model has them, in the compute dtype where it only casts them.

        On a CPU they are made anew at each call: `weights` is what decoding reads.
        """
        return stacked(turned(self.config, self.weights, self.decoder.layout, self.layout))

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
        columns: int | None = None,
    ) -> list[Continuation]:
        """Continuations of each prompt, `samples` rows of the first, then those of the second, ...

        See `stream`, which this is all of at once.

        Args:
          prompts, sampling, max_tokens, stop_tokens, samples, sources: as there.
          columns: of the batch of prompts, at least their tokens; None: the next power of two.
        """
        found = [Continuation([], []) for _ in range(len(prompts) * samples)]
        stops: dict[int, tuple[int, float]] = {}
        settings = sampling, max_tokens, stop_tokens, max_tokens, samples
        for part in self._parts(prompts, *settings, sources, columns):
            for number, (row, new) in enumerate(zip(found, part, strict=True)):
                row.tokens.extend(new.tokens)
                row.log_probabilities.extend(new.log_probabilities)
                if new.stop is not None:
                    stops[number] = new.stop, new.stop_log_probability
        return [
            Continuation(row.tokens, row.log_probabilities, *stops.get(number, ()))
            for number, row in enumerate(found)
        ]

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
        self, prompts, sampling, max_tokens, stop_tokens, interval, samples, sources, columns=None
    ) -> Iterator[list[Continuation]]:
        """New tokens of each row, as they are decoded; see `stream`."""
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
        decoding = self.decoder.start(
            self.weights,
            self.put_on_devices(prompt_batch(prompts, sources, columns)),
            self.put_on_devices(budget),
            self.put_on_devices(sampling.seed + np.arange(len(budget), dtype=np.uint32)),
            self.put_on_devices(seen),
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
            part, stops, ended = new_tokens(tokens, done, budget, ended, stop_tokens)
            rows = log_probabilities.tolist()
            yield [
                Continuation(new, row[: len(new)], stop, None if stop is None else row[len(new)])
                for new, row, stop in zip(part, rows, stops, strict=True)
            ]
            if ended.all():
                return
            begin, done = time.monotonic(), count
            decoding = self.decoder.go_on(
                self.weights, decoding, np.int32(count + step), **settings
            )
            decoding.count.block_until_ready()
            if interval is None:  # what is the same for every token is computed once a step
                step = max(1, min(2 * step, round(step * PACE / (time.monotonic() - begin))))

    def put_on_devices(self, tree: Any) -> Any:
        """Numpy arrays whose first axis is the batch, on the devices."""

        def put(a: np.ndarray) -> jax.Array:
            spec = self.layout.spec("batch", *(None,) * (a.ndim - 1), shape=a.shape)
            return jax.device_put(a, jax.NamedSharding(jax.sharding.get_mesh(), spec))

        return jax.tree.map(put, tree)


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
) -> tuple[list[list[int]], list[int | None], Bool[np.ndarray, "batch"]]:
    """New tokens of each row, the stop tokens among what follows them, and which rows have ended.

    Args:
      columns: the newest columns of decoded tokens.
      seen: number of columns before them.
      budget: most tokens of each row.
      ended: rows that had ended before.
      stop_tokens: ids that end a row, and are no part of it.
    """
    part: list[list[int]] = []
    stops: list[int | None] = []
    ended = ended.copy()
    for row, tokens in enumerate(columns.tolist()):
        if ended[row]:
            part.append([])
            stops.append(None)
            continue
        kept = tokens[: budget[row] - seen]
        stop = next((i for i, token in enumerate(kept) if token in stop_tokens), None)
        ended[row] = stop is not None or seen + len(kept) >= budget[row]
        part.append(kept[:stop])
        stops.append(None if stop is None else kept[stop])
    return part, stops, ended
