"""Rollouts: replies that a policy samples, and the examples that it learns from."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from lmjax.alignment.kl import ESTIMATORS, Estimator
from lmjax.alignment.log_probabilities import log_probabilities
from lmjax.alignment.masks import keep
from lmjax.alignment.policy_losses import MOST
from lmjax.alignment.policy_objective import SampledTargets, target_states, values_of
from lmjax.alignment.reward_functions import Reply
from lmjax.alignment.rewards import token_rewards
from lmjax.alignment.row_packing import RowPacking, Rows, best_fit
from lmjax.config import replace
from lmjax.data.chat.messages import ChatFormat
from lmjax.data.tokenizers import Tokenizer
from lmjax.generation.generator import Continuation, Generator
from lmjax.generation.prompts import prefix_row, round_closely
from lmjax.generation.sampling import Sampling
from lmjax.generation.stream import TextStream
from lmjax.models import Batch, TransformerConfig, abstract
from lmjax.models.batch import Array as AnyArray
from lmjax.objectives import Example, TokenTargets
from lmjax.parallel import Layout, axis_size
from lmjax.training.feed import RolloutRequest
from lmjax.training.gradients import count_microbatches
from lmjax.training.placement import fitting_size, own_rows, to_devices


class Rollout(NamedTuple):
    """A request, what the policy wrote, and the reply that this is."""

    request: RolloutRequest
    continuation: Continuation
    reply: Reply


class RolloutRows(NamedTuple):
    """Requests and replies as rows of tokens, from the left; lengths say what is what.

    Attributes:
      tokens: of the request, of its reply with the token that ends it, and padding.
      request_lengths: tokens of each request.
      reply_lengths: tokens of each reply, its end included.
    """

    tokens: Int[np.ndarray, "rows length"]
    request_lengths: Int[np.ndarray, "rows"]
    reply_lengths: Int[np.ndarray, "rows"]


def sample_replies(
    generator: Generator,
    tokenizer: Tokenizer,
    template: ChatFormat | None,
    requests: Sequence[RolloutRequest],
    sampling: Sampling,
    length: int,
    seed: int,
    samples: int = 1,
    prefix: bool = False,
) -> list[Rollout]:
    """Samples replies to each request, every one with a seed of its own.

    Args:
      generator: the policy.
      tokenizer: of the policy.
      template: chat format of the requests, which says what ends a reply; None: the end of a text.
      requests: texts to go on from.
      sampling: how tokens are drawn.
      length: most tokens of a reply, the one that ends it included.
      seed: of the first reply; each has the next one.
      samples: replies to each request, which follow one another.
      prefix: requests are read from both sides; see `TextGenerator.reads_prefix`.
    """
    read = prefix_row if prefix else list
    prompts = [read(request.tokens) for request in requests]
    stops = [tokenizer.end] if template is None else template.stop_tokens(tokenizer)
    strings = () if template is None else template.stop_strings
    longest = max(len(request.tokens) for request in requests)
    settings = replace(sampling, seed=seed), length, stops, samples, None, round_closely(longest)
    asked = [request for request in requests for _ in range(samples)]
    found = []
    for request, new in zip(asked, generator.continuations(prompts, *settings), strict=True):
        new, text, ended = _until_string(new, tokenizer, strings)
        end = [] if new.stop is None else [new.stop]
        tokens = [*request.tokens, *new.tokens, *end]
        reply = Reply(request.text, text, ended, request.metadata, tokens)
        found.append(Rollout(request, new, reply))
    return found


def _until_string(
    new: Continuation, tokenizer: Tokenizer, strings: Sequence[str]
) -> tuple[Continuation, str, bool]:
    """A continuation up to the token that completes a stop string, its text, and if it has ended.

    The text ends before the string.
    """
    text = tokenizer.decode(new.tokens)
    if not any(string in text for string in strings):
        return new, text, new.stop is not None
    stream, text, count = TextStream(tokenizer, strings, at_start=True), "", 0
    while not stream.stopped and count < len(new.tokens):
        text += stream.add(new.tokens[count : count + 1])
        count += 1
    if not stream.stopped:
        return new, text + stream.rest(), new.stop is not None
    return Continuation(new.tokens[:count], new.log_probabilities[:count]), text, True


def make_rows(rollouts: Sequence[Rollout], length: int) -> RolloutRows:
    """Rows of `length` tokens, one for each rollout."""
    tokens = np.zeros((len(rollouts), length), np.int32)
    for row, rollout in zip(tokens, rollouts, strict=True):
        written = rollout.reply.tokens[:length]
        row[: len(written)] = written
    sizes = np.array([len(one.reply.tokens) for one in rollouts], np.int32)
    requests = np.array([len(one.request.tokens) for one in rollouts], np.int32)
    return RolloutRows(tokens, requests, np.minimum(sizes, length) - requests)


def make_example(
    rows: RolloutRows,
    policy: Float[np.ndarray, "rows length"] | None,
    reference: Float[np.ndarray, "rows length"],
    advantages: Float[np.ndarray, "rows length"],
    critic: tuple[Float[np.ndarray, "rows length"], Float[np.ndarray, "rows length"]] | None = None,
    sampled: Float[np.ndarray, "rows length"] | None = None,
) -> Example:
    """Example for `ClippedPolicy`.

    Args:
      rows: requests and replies.
      policy: log-probability of the next token at each position under the policy that sampled;
        None: it is the one that is trained.
      reference: likewise under the reference.
      advantages: of the next token at each position.
      critic: values and returns there; None without a critic.
      sampled: log-probabilities there as the sampler gave them, for a metric.
    """
    batch, targets = inputs_of(rows)
    values = critic or (None, None)
    found = SampledTargets(targets, policy, advantages, reference, *values, sampled)
    return Example(batch, found)


def inputs_of(rows: RolloutRows) -> tuple[Batch, TokenTargets]:
    """Inputs, and the next token at each position with weight 1 where the policy wrote it."""
    index = np.arange(rows.tokens.shape[1], dtype=np.int32)
    first, end = rows.request_lengths, rows.request_lengths + rows.reply_lengths
    batch = Batch(
        tokens=rows.tokens,
        positions=np.broadcast_to(index, rows.tokens.shape).copy(),
        segments=(index < end[:, None]).astype(np.int32),
    )
    following = np.roll(rows.tokens, -1, axis=1)
    following[:, -1] = 0
    written = (index + 1 >= first[:, None]) & (index + 1 < end[:, None])
    return batch, TokenTargets(following, written.astype(np.float32))


def divergence_rewards(
    rows: RolloutRows,
    scores: Float[np.ndarray, "rows"],
    policy: Float[np.ndarray, "rows length"],
    reference: Float[np.ndarray, "rows length"],
    beta: Float[jax.Array, ""],
    estimator: Estimator = "k1",
) -> tuple[Float[jax.Array, "rows length"], Float[jax.Array, ""]]:
    """Rewards of the tokens of replies, and the mean over replies of their divergence in nats.

    Each token costs beta times the estimate of its divergence, and the last one has the score, be
    it the token that ends the reply or that at which it was cut off; see `token_rewards`.

    Args:
      rows: requests and replies.
      scores: of the replies.
      policy, reference: log-probability of the next token at each position.
      beta: price of a nat.
      estimator: of the divergence of a token; see `lmjax.alignment.kl`.
    """
    mask = inputs_of(rows)[1].weights > 0
    return _token_rewards(scores.astype(np.float32), policy, reference, mask, beta, estimator)


@functools.partial(jax.jit, static_argnames="estimator")
def _token_rewards(scores, policy, reference, mask, beta, estimator):
    kl = keep(ESTIMATORS[estimator](policy, reference), mask)
    return token_rewards(scores, kl, mask, beta), jnp.mean(jnp.sum(kl, axis=1))


class Scores(NamedTuple):
    """Log-probabilities of sampled tokens, and values of a critic.

    Attributes:
      log_probs: log-probability of the next token at each position.
      values: of its critic there; None where it has none.
    """

    log_probs: Float[AnyArray, "rows length"]
    values: Float[AnyArray, "rows length"] | None


class Scorer:
    """Log-probabilities and values of sampled tokens, as the objective computes them."""

    def __init__(self, model: TransformerConfig, layout: Layout, temperature: float, critic: bool):
        self.vocab_size, self.layout = model.vocab_size, layout
        self._compute = functools.partial(_scores, model, layout, temperature, critic)

    def score(self, params: dict, rows: RolloutRows, packing: Rows, most: int) -> Scores:
        """Scores of the next token at each position in numpy, `most` tokens at a time."""
        return _in_parts(self._compute, params, rows, packing, most, self.layout, self.vocab_size)


class ValueScorer:
    """Values of sampled tokens under a critic that is a model of its own."""

    def __init__(self, model: TransformerConfig, layout: Layout):
        self.vocab_size, self.layout = model.vocab_size, layout
        self._compute = functools.partial(_values, model, layout)

    def score(
        self, params: dict, rows: RolloutRows, packing: Rows, most: int
    ) -> Float[np.ndarray, "rows length"]:
        """Value at each position in numpy, `most` tokens at a time."""
        return _in_parts(self._compute, params, rows, packing, most, self.layout, self.vocab_size)


# Models of one config share what is compiled.


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _scores(
    model: TransformerConfig,
    layout: Layout,
    temperature: float,
    critic: bool,
    params: dict,
    example: Example,
) -> Scores:
    """See `Scorer`."""
    policy = nnx.merge(abstract(model, layout)[0], params)
    hidden = target_states(policy, example.inputs)
    values = values_of(policy, hidden, example.inputs) if critic else None
    tokens = example.targets.tokens
    return _whole(Scores(log_probabilities(policy, hidden, tokens, temperature), values))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _values(
    model: TransformerConfig, layout: Layout, params: dict, example: Example
) -> Float[jax.Array, "rows length"]:
    """See `ValueScorer`."""
    critic = nnx.merge(abstract(model, layout)[0], params)
    hidden = target_states(critic, example.inputs)
    return _whole(values_of(critic, hidden, example.inputs))


def _in_parts(
    compute: Callable[[dict, Example], Any],
    params: dict,
    rows: RolloutRows,
    packing: Rows,
    most: int,
    layout: Layout,
    vocab_size: int,
) -> Any:
    """Results of `compute` in numpy, in equal parts of at most `most` tokens, padding included."""
    example, found = packed(Example(*inputs_of(rows)), packing), []
    # Of the rows that a process has of a part, none is left over.
    unit = row_multiple(layout) // axis_size(*layout.axes("batch"))
    most_units = most // packing.length // unit
    size = packing.rows // count_microbatches(packing.rows // unit, most_units, layout)
    for first in range(0, packing.rows, size):
        part = jax.tree.map(lambda a, first=first: a[first : first + size], example)
        found.append(compute(params, to_devices(own_rows(part), layout, vocab_size)))
    length = rows.tokens.shape[1]
    return jax.tree.map(
        lambda *parts: packing.unpack(np.concatenate(parts), length), *jax.device_get(found)
    )


def pack_rows(batch: Batch, length: int, layout: Layout, most: int) -> RowPacking:
    """Places for texts that have a row each: packed where that makes fewer tokens.

    Packed rows have room for two of the longest texts, where a microbatch may be so long: the
    longer a row, the less of it is left empty, and the more attention costs where no kernel leaves
    out what is hidden. They can be cut into as many microbatches as rows of one text would be, so
    that never more are needed, and other rows beside them can be cut likewise.

    Args:
      batch: numpy arrays, a text from the left of each row.
      length: most tokens of a text.
      layout: of the mesh that is set, which shares the rows.
      most: tokens of a microbatch, padding included.
    """
    sizes = np.sum(batch.segments > 0, axis=1)
    alone = RowPacking.one_each(sizes, batch.tokens.shape[1])
    parts = -(-len(sizes) * length // most)
    multiple = row_multiple(layout)
    if most >= 2 * length * multiple:
        length *= 2
    row, first, slot = best_fit(sizes, length, MOST)
    needed = int(np.max(row, initial=0)) + 1
    rows = fitting_size(needed, len(sizes), parts * multiple)
    if rows * length >= alone.rows * alone.length:
        return alone
    return RowPacking(sizes, row, first, slot, rows, length)


def row_multiple(layout: Layout) -> int:
    """Rows of which devices and processes have equal shares."""
    return math.lcm(axis_size(*layout.axes("batch")), jax.process_count())


def packed(example: Example, packing: Rows) -> Example:
    """An example of one text a row, whose targets are numbers of tokens, packed."""
    return Example(packing.pack_batch(example.inputs), jax.tree.map(packing.pack, example.targets))


def _whole(scores: Any) -> Any:
    """Scores with all rows on every device, so that each process can read them."""
    return jax.tree.map(lambda a: jax.reshard(a, PartitionSpec()), scores)


def sampled_log_probs(
    rollouts: Sequence[Rollout], rows: RolloutRows
) -> Float[np.ndarray, "rows length"]:
    """Log-probability of the next token at each position as the sampler gave it; 0 elsewhere.

    It is that of temperature 1.
    """
    found = np.zeros(rows.tokens.shape, np.float32)
    sizes = zip(rows.request_lengths, rows.reply_lengths, strict=True)
    for row, one, (first, size) in zip(found, rollouts, sizes, strict=True):
        new = one.continuation
        end = [] if new.stop_log_probability is None else [new.stop_log_probability]
        own = [*new.log_probabilities, *end][:size]
        row[first - 1 : first - 1 + len(own)] = own
    return found
