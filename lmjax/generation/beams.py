"""Beam search: the likeliest continuations instead of drawn ones."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lmjax.config import UserError
from lmjax.generation.decoder import Decoder
from lmjax.generation.generator import Generator, require_numbers
from lmjax.generation.prompts import (
    Prompt,
    check_prompts,
    prompt_batch,
    room,
    round_up,
    tokens_of,
)
from lmjax.models import Batch, Cache
from lmjax.parallel import Layout


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A continuation that beam search found.

    Attributes:
      tokens: without the prompt and without the end token.
      score: the sum of the log-probabilities of its tokens and of the end token, if it has one,
        divided by their number to the power of the length penalty.
    """

    tokens: list[int]
    score: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
    """State of a search; rows of the cache are the beams of the first prompt, and so on.

    All but the cache is whole on every device: it is small beside the model.

    Attributes:
      cache: keys and values of everything but each beam's newest token.
      beams: the running beams, from the left.
      sums: their log-probabilities, the best first; -inf where there is no beam.
      ended: the best hypotheses that have ended.
      lengths: number of their tokens, the end token included.
      scores: of them, the best first; -inf where there is none.
      count: number of tokens of the running beams.
      done: prompts that are searched no more.
      budget: how many tokens each prompt's hypotheses may have.
    """

    cache: Cache
    beams: Int[Array, "prompts beams slots"]
    sums: Float[Array, "prompts beams"]
    ended: Int[Array, "prompts beams slots"]
    lengths: Int[Array, "prompts beams"]
    scores: Float[Array, "prompts beams"]
    count: Int[Array, ""]
    done: Bool[Array, "prompts"]
    budget: Int[Array, "prompts"]


class BeamSearch:
    """Beam search with a model (Graves 2012, arXiv:1211.3711; length penalty as transformers').

        best = BeamSearch(generator)(prompts, beams=4, stop_tokens=[end])[0][0]

    In each step the best continuations of a prompt's beams are ranked together. Those among the
    first `beams` that end are kept apart, by score; the best that do not end run on. A prompt is
    done when it has `beams` ended hypotheses and no running one scores better as it stands, or
    when its tokens are used up: then the running ones count as ended.
    """

    def __init__(self, generator: Generator):
        """Each shape and number of beams is compiled once, as for `Generator`."""
        self.generator = generator

    def __call__(
        self,
        prompts: Sequence[Prompt],
        beams: int = 4,
        length_penalty: float = 1.0,
        max_tokens: int = 100,
        stop_tokens: Sequence[int] = (),
        sources: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Hypothesis]]:
        """The best hypotheses of each prompt, at most `beams`, the best first.

        Args:
          prompts: as for `Generator.stream`.
          beams: how many hypotheses are followed at once; 1 is greedy decoding.
          length_penalty: scores are divided by the length to this power: 0 takes the likeliest
            text, more than 0 helps long ones.
          max_tokens: most tokens of a hypothesis, its end token included; fewer where the model's
            context is full.
          stop_tokens: ids that end a hypothesis.
          sources: as for `Generator.stream`.

        Raises:
          UserError: no beams, a penalty that is no number, or a prompt that the model cannot
            continue.
        """
        check_search(beams, length_penalty)
        texts = list(map(tokens_of, prompts))
        check_prompts(self.generator.config, texts, sources)
        if not prompts or max_tokens < 1:
            return [[] for _ in prompts]
        budget = [room(self.generator.config, len(text), max_tokens) for text in texts]
        settings = {
            "stop_tokens": np.array(list(stop_tokens), np.int32),
            "length_penalty": np.float32(length_penalty),
        }
        decoder = BeamDecoder(self.generator.decoder)
        search = decoder.start(
            self.generator.weights,
            self.generator.put_on_devices(prompt_batch(prompts, sources)),
            np.array(budget, np.int32),
            slots=round_up(max_tokens),
            beams=beams,
            **settings,
        )
        search = decoder.finish(self.generator.weights, search, **settings)
        return hypotheses(search, stop_tokens)


@dataclasses.dataclass(frozen=True)
class BeamDecoder:
    """The device part of a search, compiled once for a config as `Decoder` is."""

    decoder: Decoder

    @property
    def layout(self) -> Layout:
        """The decoder's."""
        return self.decoder.layout

    @functools.partial(jax.jit, static_argnums=0, static_argnames=("slots", "beams"))
    def start(self, params, prompt: Batch, budget, *, slots: int, beams: int, **settings) -> Search:
        """Runs the prompts, and makes the first step of their beams."""
        count, length = prompt.tokens.shape
        rows = jnp.repeat(jnp.arange(count), beams)
        logits, cache = self.decoder.prefill(params, prompt, length=length + slots)
        shape = (count, beams)
        search = Search(
            cache=cache.take(self.layout, rows),
            beams=jnp.zeros((*shape, slots), jnp.int32),
            # All beams of a prompt are the same yet: one of them runs.
            sums=jnp.full(shape, -jnp.inf).at[:, 0].set(0.0),
            ended=jnp.zeros((*shape, slots), jnp.int32),
            lengths=jnp.zeros(shape, jnp.int32),
            scores=jnp.full(shape, -jnp.inf),
            count=jnp.zeros((), jnp.int32),
            done=budget < 1,
            budget=budget,
        )
        return self._extend(search, self.layout.take(logits, rows), **settings)

    @functools.partial(jax.jit, static_argnums=0, donate_argnames="search")
    def finish(self, params, search: Search, **settings) -> Search:
        """Searches until all prompts are done."""

        def step(search: Search) -> Search:
            newest = jnp.take(search.beams, search.count - 1, axis=2).reshape(-1)
            tokens = self.layout.reshard(newest, "batch")
            going = jnp.ones_like(tokens, bool)
            logits, cache = self.decoder.next(params, search.cache, tokens, going)
            return self._extend(dataclasses.replace(search, cache=cache), logits, **settings)

        return jax.lax.while_loop(lambda search: ~jnp.all(search.done), step, search)

    def _extend(self, search: Search, logits, *, stop_tokens, length_penalty) -> Search:
        """Ranks the continuations of all beams, and reorders everything by them."""
        prompts, beams = search.sums.shape
        log_probabilities = jax.nn.log_softmax(self.layout.reshard(logits, None, None))
        vocab = log_probabilities.shape[1]
        sums = search.sums[:, :, None] + log_probabilities.reshape(prompts, beams, vocab)
        # If all that can end do, so many leave `beams` that run on.
        ranked = min((1 + len(stop_tokens)) * beams, beams * vocab)
        sums, order = jax.lax.top_k(sums.reshape(prompts, -1), ranked)
        parent, token = order // vocab, order % vocab
        tokens = jnp.take_along_axis(search.beams, parent[:, :, None], axis=1)
        tokens = tokens.at[:, :, search.count].set(token)

        length = search.count + 1
        scores = sums / length.astype(jnp.float32) ** length_penalty
        last = (length >= search.budget)[:, None]
        ends = jnp.any(token[:, :, None] == stop_tokens, axis=2) | last
        enters = ends & (jnp.arange(ranked) < beams) & ~search.done[:, None]
        ended, lengths, scores = best(
            jnp.concatenate([search.scores, jnp.where(enters, scores, -jnp.inf)], axis=1),
            jnp.concatenate([search.ended, tokens], axis=1),
            jnp.concatenate([search.lengths, jnp.full_like(token, length)], axis=1),
            count=beams,
        )
        running, parent, sums = best(
            jnp.where(ends, -jnp.inf, sums), tokens, parent, count=min(beams, ranked)
        )
        rows = (parent + beams * jnp.arange(prompts)[:, None]).reshape(-1)
        hope = sums[:, 0] / length.astype(jnp.float32) ** length_penalty
        return dataclasses.replace(
            search,
            cache=search.cache.take(self.layout, rows),
            beams=running,
            sums=sums,
            ended=ended,
            lengths=lengths,
            scores=scores,
            count=length,
            done=search.done | last[:, 0] | (hope <= scores[:, -1]),
        )


def best(
    scores: Float[Array, "prompts given"],
    tokens: Int[Array, "prompts given slots"],
    numbers: Int[Array, "prompts given"],
    count: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, numbers and scores of the `count` best of each prompt, the best first."""
    scores, order = jax.lax.top_k(scores, count)
    tokens = jnp.take_along_axis(tokens, order[:, :, None], axis=1)
    return tokens, jnp.take_along_axis(numbers, order, axis=1), scores


def hypotheses(search: Search, stop_tokens: Sequence[int]) -> list[list[Hypothesis]]:
    """Hypotheses of a finished search, from the devices."""
    found = []
    ended, lengths, scores = (
        np.asarray(a).tolist() for a in (search.ended, search.lengths, search.scores)
    )
    require_numbers(np.array(scores))
    for prompt in zip(ended, lengths, scores):
        found.append([])
        for tokens, length, score in zip(*prompt):
            if score == -np.inf:
                break
            tokens = tokens[:length]
            found[-1].append(
                Hypothesis(tokens[:-1] if tokens[-1] in stop_tokens else tokens, score)
            )
    return found


def check_search(beams: int, length_penalty: float) -> None:
    """Raises UserError for settings that no search can have."""
    if beams < 1:
        raise UserError(f"beams={beams}: must be 1 or more")
    if not abs(length_penalty) < float("inf"):
        raise UserError(f"length_penalty={length_penalty}: must be a finite number")
