"""Hidden tokens of texts, drawn anew by a masked model or by one that fills blanks."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lmjax.models import abstract, make_cache
from lmjax.models.batch import Batch
from lmjax.models.transformer import Transformer
from lmjax.objectives.row_changes import Tokens, is_listed, shortened, sorted_rows, uniform
from lmjax.parallel import generation_layout


def fill_masks(
    filler: Any,
    batch: Batch,
    hidden: Bool[Array, "batch seq"],
    mask: int,
    special: tuple[int, ...],
    key: PRNGKeyArray,
) -> Tokens:
    """The tokens of a batch with those that are hidden drawn by a masked model, each by itself.

    Args:
      filler: the model, an encoder with a head of words.
      batch: whole rows.
      hidden: tokens that it does not see.
      mask: id of the token that it sees there.
      special: ids that are never drawn.
      key: of the draws.
    """
    seen = dataclasses.replace(batch, tokens=jnp.where(hidden, mask, batch.tokens))
    states, _ = filler(seen)
    return jnp.where(hidden, draw(filler.logits(states), special, key), batch.tokens)


def fill_blanks(
    filler: Transformer,
    batch: Batch,
    hidden: Bool[Array, "batch seq"],
    mask: int,
    start: int,
    special: tuple[int, ...],
    key: PRNGKeyArray,
) -> Tokens:
    """The tokens of a batch with those that are hidden drawn by a model that fills blanks.

    Each run of hidden tokens is a blank, one mask in the text that the model sees. The blanks are
    filled from left to right, each in sight of those before it (Du et al. 2022, arXiv:2103.10360,
    section 2.1), with as many tokens as were hidden: no blank ends by the model's own choice.

    Args:
      filler: the model, with a head of words.
      batch: whole rows, from position 0 on.
      hidden: tokens that it does not see.
      mask: id of the token that stands for a blank.
      start: id of the token that begins what fills a blank.
      special: ids that are never drawn.
      key: of the draws.
    """
    filler, (rows, size) = _with_whole_rows(filler), batch.tokens.shape
    plan = plan_blanks(hidden)
    text = jnp.where(hidden, mask, batch.tokens)
    text = shortened(dataclasses.replace(batch, tokens=text, token_types=None), plan.left_out)
    zeros = jnp.zeros_like(text.tokens)
    text = dataclasses.replace(text, ranks=zeros, block_positions=zeros)
    # A blank adds its start to the tokens that it hides, and takes one for its mask.
    _, cache = filler(text, make_cache(filler.config, filler.layout, rows, 2 * size + 1))
    index, most = jnp.arange(size), jnp.max(plan.count)

    def step(state):
        number, tokens, cache = state
        here, following = (plan.at(number + more) for more in (0, 1))
        own = jnp.sum(jnp.where(index == here.column[:, None], tokens, 0), axis=1)
        one = Batch(
            tokens=jnp.where(here.is_token > 0, own, start)[:, None],
            positions=here.position[:, None],
            segments=(number < plan.count).astype(jnp.int32)[:, None],
            block_positions=here.block_position[:, None],
        )
        states, cache = filler(one, cache)
        drawn = draw(filler.logits(states), special, jax.random.fold_in(key, number))
        written = (index == following.column[:, None]) & (following.is_token > 0)[:, None]
        written &= (number + 1 < plan.count)[:, None]
        tokens = jnp.where(written, filler.layout.reshard(drawn, "batch", None), tokens)
        return number + 1, tokens, cache

    # What follows the last token of all blanks is no matter.
    state = jnp.zeros((), jnp.int32), batch.tokens, cache
    return jax.lax.while_loop(lambda state: state[0] + 1 < most, step, state)[1]


def _with_whole_rows(model: Transformer) -> Transformer:
    """The same model on the same devices, with each row on one part of them, as a cache needs."""
    graph, _ = abstract(model.config, generation_layout())
    return nnx.merge(graph, nnx.split(model)[1])


def draw(
    logits: Float[Array, "batch seq vocab"], special: tuple[int, ...], key: PRNGKeyArray
) -> Tokens:
    """Tokens of the distributions with these logits, none of them special, without gradients."""
    logits = jax.lax.stop_gradient(logits)
    logits = jnp.where(is_listed(special, logits.shape[-1]), -jnp.inf, logits)
    noise = -jnp.log(-jnp.log(uniform(key, logits, tiny=True)))
    return jnp.argmax(logits + noise, axis=2).astype(jnp.int32)


class BlankInputs(NamedTuple):
    """Inputs of a model that fills the blanks of each row, one after another.

    Attributes:
      column: of the token that is the input, or that follows it.
      is_token: 1 for such a token, 0 for the start of a blank.
      position: of the blank's mask in the text that is left.
      block_position: from 1 on in each blank.
    """

    column: Int[Array, "batch *inputs"]
    is_token: Int[Array, "batch *inputs"]
    position: Int[Array, "batch *inputs"]
    block_position: Int[Array, "batch *inputs"]


@dataclasses.dataclass(frozen=True)
class BlankPlan:
    """Blanks of rows, and the order in which they are filled.

    Attributes:
      left_out: the tokens of each blank but the first, for which its mask stands.
      inputs: of each row, those of its own first.
      count: inputs of each row.
    """

    left_out: Bool[Array, "batch seq"]
    inputs: BlankInputs
    count: Int[Array, "batch"]

    def at(self, number: Int[Array, ""]) -> BlankInputs:
        """The input with this number in each row."""
        return BlankInputs(
            *(jax.lax.dynamic_index_in_dim(a, number, 1, False) for a in self.inputs)
        )


def plan_blanks(hidden: Bool[Array, "batch seq"]) -> BlankPlan:
    """The blanks that runs of hidden tokens are: for each a start, then its tokens."""
    begins = hidden & ~jnp.pad(hidden[:, :-1], ((0, 0), (1, 0)))
    size, zeros = hidden.shape[1], jnp.zeros_like(hidden, jnp.int32)
    index = zeros + jnp.arange(size, dtype=jnp.int32)
    position = jnp.cumsum(~hidden | begins, axis=1, dtype=jnp.int32) - 1
    inside = index - jax.lax.cummax(jnp.where(begins, index, -1), axis=1)
    starts = BlankInputs(index, zeros, position, zeros + 1)
    tokens = BlankInputs(index, zeros + 1, position, inside + 2)
    both = [jnp.concatenate(pair, axis=1) for pair in zip(starts, tokens, strict=True)]
    used = jnp.concatenate([begins, hidden], axis=1)
    order = jnp.where(used, 2 * both[0] + both[1], 2 * size)
    _, *inputs = sorted_rows(order.astype(jnp.float32), *both)
    count = jnp.sum(used, axis=1, dtype=jnp.int32)
    return BlankPlan(hidden & ~begins, BlankInputs(*inputs), count)
