"""Kernels of the cross-entropy for TPU: logits are made tile by tile, used up, and forgotten.

Logits have the head's rows first: [rows, tokens]. What belongs to a token then is a row of lanes,
and sums over the vocabulary add whole registers; each of the 8 sublanes keeps sums of its own until
the last block. All logits are in base 2 (times log2 e), as the chip's exponential takes them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.cross_entropy.tpu_blocks import FORWARD_STRIP, STRIP
from pallas_kernels.pallas import pl, pltpu

LOG2E = math.log2(math.e)
LEAST = -1e30  # logit of a row that is no word: its exponential is exactly zero
NOWHERE = 2**30  # of no row
SUBLANES = 8


class LogitRequest(NamedTuple):
    """Static part of a call: scale and softcap of the logits, further results that are asked for.

    LogitBlocks may reach past the `rows` of the head.
    """

    scale: float
    softcap: float | None
    largest: bool
    mean: bool
    rows: int


def forward_body(request: LogitRequest, words, head, hidden, targets, *refs):
    """A block of rows and one of tokens: adds to the running sums of the tokens.

    Of each token it keeps the largest logit, the sum of exponentials relative to it, the target's
    logit, and if asked for the sum of exponential times logit and the row of the largest logit.
    """
    count = 3 + request.mean
    sums, found, kept, best = refs[0], refs[1], refs[2], refs[3]
    block, last = pl.program_id(1), pl.num_programs(1) - 1
    first = block * head.shape[0]

    @pl.when(block == 0)
    def _():
        kept[0] = jnp.full(kept.shape[1:], LEAST, jnp.float32)
        for n in range(1, count):
            kept[n] = jnp.zeros(kept.shape[1:], jnp.float32)
        best[...] = jnp.zeros(best.shape, jnp.int32)

    @pl.when(first < words[0])
    def _():
        tokens = hidden.shape[0]
        sublane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, tokens), 0)

        @_strips(head.shape[0], words[0] - first, FORWARD_STRIP)
        def _(strip, at):
            logits, _ = _logits(request, head[strip], hidden[...])
            row = _rows(logits.shape)
            before = first + at + sublane
            logits = jnp.where(row < words[0] - before, logits, LEAST)
            old = kept[0]
            top = jnp.maximum(old, jnp.max(logits, axis=0))
            if request.largest:
                here = jnp.min(jnp.where(logits == top, row, NOWHERE), axis=0) + before
                best[...] = jnp.where(top > old, here, best[...])
            exponential = jnp.exp2(logits - top)
            shrink = jnp.exp2(old - top)
            kept[0] = top
            kept[1] = kept[1] * shrink + jnp.sum(exponential, axis=0)
            kept[2] += jnp.sum(jnp.where(row == targets[...] - before, logits, 0.0), axis=0)
            if request.mean:
                kept[3] = kept[3] * shrink + jnp.sum(exponential * logits, axis=0)

    @pl.when(block == last)
    def _():
        top = jnp.max(kept[0], axis=0, keepdims=True)
        shrink = jnp.exp2(kept[0] - top)
        sums[0:1] = top
        sums[1:2] = jnp.sum(kept[1] * shrink, axis=0, keepdims=True)
        sums[2:3] = jnp.sum(kept[2], axis=0, keepdims=True)
        if request.mean:
            sums[3:4] = jnp.sum(kept[3] * shrink, axis=0, keepdims=True)
        if request.largest:
            having = jnp.where(kept[0] == top, best[...], NOWHERE)
            # Through floats: the smallest of integers across sublanes is none of the chip's.
            smallest = jnp.min(having.astype(jnp.float32), axis=0, keepdims=True)
            found[...] = smallest.astype(jnp.int32)
        else:
            found[...] = jnp.zeros(found.shape, jnp.int32)


class _Turns(NamedTuple):
    """The parts of the gradient of the tokens in HBM, and three buffers that they go through."""

    gradient: Any  # [cores, tokens, width]
    core: Any  # this one
    buffers: Any
    arrived: Any
    left: Any

    def at(self, part):
        """A part in HBM."""
        tokens = self.buffers.shape[1]
        return self.gradient.at[self.core, pl.ds(pl.multiple_of(part * tokens, tokens), tokens)]

    def read(self, part, slot):
        """The copy of a part into a buffer."""
        return pltpu.make_async_copy(self.at(part), self.buffers.at[slot], self.arrived.at[slot])

    def write(self, part, slot):
        """The copy of a buffer back into a part."""
        return pltpu.make_async_copy(self.buffers.at[slot], self.at(part), self.left.at[slot])

    def receive(self, step, block, blocks, part, parts) -> None:
        """Waits for a step's part, unless it is the first block's, and asks for the next one."""
        mine, other = jax.lax.rem(step, 3), jax.lax.rem(step + 1, 3)
        wraps = part + 1 == parts
        next_part = jnp.where(wraps, 0, part + 1)
        next_block = jnp.where(wraps, block + 1, block)

        @pl.when(step >= 2)
        def _():
            self.write(part, other).wait()  # of two steps ago; all are of one size

        # Of two parts it was on its way out until the wait.
        ahead = (next_block > 0) & (next_block < blocks) & (parts > 2)

        @pl.when(ahead)
        def _():
            self.read(next_part, other).start()

        @pl.when(block > 0)
        def _():
            if parts == 2:
                self.read(part, mine).start()
            self.read(part, mine).wait()


def fused_body(
    request: LogitRequest, words, head, hidden, ids, factors, d_head, d_hidden, *scratch
):
    """A block of rows, and of tokens inside it: adds to both gradients.

    That of the rows is kept in vector memory; that of the tokens is read from HBM and written back
    for each block of rows, in turn in three buffers: one arrives, one is added to, one leaves.
    """
    core, block, part = (pl.program_id(axis) for axis in range(3))
    blocks, parts = pl.num_programs(1), d_hidden.shape[1] // hidden.shape[0]
    total, buffers, *semaphores = scratch
    turns = _Turns(d_hidden, core, buffers, *semaphores)
    step, wraps = block * parts + part, part + 1 == parts
    # One part stays where it is, until the end.
    alone = parts == 1
    mine = 0 if alone else jax.lax.rem(step, 3)
    if not alone:
        turns.receive(step, block, blocks, part, parts)

    @pl.when(block == 0)
    def _():
        buffers[mine] = jnp.zeros(buffers.shape[1:], jnp.float32)

    first = (core * blocks + block) * head.shape[0]
    real = first < request.rows

    @pl.when((part == 0) & real)
    def _():
        total[...] = jnp.zeros(total.shape, jnp.float32)

    _clean(request, head, first)

    @pl.when(first < words[0])
    def _():

        @_strips(head.shape[0], words[0] - first, STRIP)
        def _(strip, at):
            gradient = _gradient(request, words, first + at, head[strip], hidden, ids, factors)
            total[strip] += _product(gradient, hidden[...], (1, 0))
            buffers[mine] += _product(gradient, head[strip], (0, 0))

    last = wraps & (block == blocks - 1)

    @pl.when(last if alone else step >= 0)
    def _():
        turns.write(part, mine).start()

    @pl.when(wraps & real)
    def _():
        d_head[...] = total[...].astype(d_head.dtype)

    @pl.when(last)
    def _():
        turns.write(part, mine).wait()
        if not alone:
            turns.write(part, jax.lax.rem(step + 2, 3)).wait()


def d_head_body(request: LogitRequest, words, head, hidden, ids, factors, d_head, total):
    """A block of rows, and of tokens inside it: adds to the gradient of the rows."""
    part, last = pl.program_id(1), pl.num_programs(1) - 1
    first = pl.program_id(0) * head.shape[0]

    @pl.when(part == 0)
    def _():
        total[...] = jnp.zeros(total.shape, jnp.float32)

    @pl.when(first < words[0])
    def _():

        @_strips(head.shape[0], words[0] - first, STRIP)
        def _(strip, at):
            gradient = _gradient(request, words, first + at, head[strip], hidden, ids, factors)
            total[strip] += _product(gradient, hidden[...], (1, 0))

    @pl.when(part == last)
    def _():
        d_head[...] = total[...].astype(d_head.dtype)


def d_hidden_body(request: LogitRequest, words, head, hidden, ids, factors, d_hidden, total):
    """A block of tokens, and of rows inside it: adds to the gradient of the tokens."""
    block, last = pl.program_id(1), pl.num_programs(1) - 1
    first = block * head.shape[0]

    @pl.when(block == 0)
    def _():
        total[...] = jnp.zeros(total.shape, jnp.float32)

    _clean(request, head, first)

    @pl.when(first < words[0])
    def _():

        @_strips(head.shape[0], words[0] - first, STRIP)
        def _(strip, at):
            gradient = _gradient(request, words, first + at, head[strip], hidden, ids, factors)
            total[...] += _product(gradient, head[strip], (0, 0))

    @pl.when(block == last)
    def _():
        d_hidden[...] = total[...].astype(d_hidden.dtype)


def _clean(request: LogitRequest, head, first) -> None:
    """Writes zeros where the head has ended inside the block: memory there may hold NaN."""
    rest = request.rows % head.shape[0]
    if rest:

        @pl.when(first + head.shape[0] > request.rows)
        def _():
            head[rest:] = jnp.zeros((head.shape[0] - rest, head.shape[1]), head.dtype)


def _gradient(request: LogitRequest, words, first, strip, hidden, ids, factors):
    """Gradient of a strip of logits before the scale is applied to it, in the dtype of hidden.

    ids: rows of the target and of the largest logit; factors: log2 of the sum of exponentials, and
    the weights of the share, of the target, of share times logit, and of the largest logit.
    """
    tokens = hidden.shape[0]
    logits, gain = _logits(request, strip, hidden[...])
    row = _rows(logits.shape)
    sublane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, tokens), 0)
    weight = factors[1:2]
    if request.mean:
        weight = weight + factors[3:4] * logits
    share = jnp.exp2(logits - factors[0:1])
    gradient = share * weight + jnp.where(row == ids[0:1] - first - sublane, factors[2:3], 0.0)
    if request.largest:
        gradient += jnp.where(row == ids[1:2] - first - sublane, factors[4:5], 0.0)
    if gain is not None:
        gradient *= gain
    left = words[0] - first - sublane
    gradient = jnp.where(row < left, gradient, 0.0)
    return gradient.reshape(strip.shape[0], tokens).astype(hidden.dtype)


def _logits(request: LogitRequest, strip, hidden):
    """Logits [rows / 8, 8, tokens] in base 2, and the derivative of the softcap or None."""
    logits = _product(strip, hidden, (1, 1)).reshape(-1, SUBLANES, hidden.shape[0])
    if request.softcap is None:
        return logits * (request.scale * LOG2E), None
    bent = jnp.tanh(logits * (request.scale / request.softcap))
    return bent * (request.softcap * LOG2E), 1 - bent * bent


def _product(one, other, axes: tuple[int, int]):
    """Product in float32 over an axis of each, of float32 in the precision that jax is set to."""
    # Products of bfloat16 are exact; Mosaic refuses to be asked for more.
    exact = jax.lax.Precision.DEFAULT if one.dtype == jnp.bfloat16 else None
    contraction = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(
        one, other, contraction, precision=exact, preferred_element_type=jnp.float32
    )


def _rows(shape):
    """Row of each logit in its strip, less its sublane."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0) * SUBLANES


def _strips(rows: int, words, largest: int):
    """Runs a function for each strip of a block that has words.

    It takes the strip's rows and the number of the first.
    """

    def run(body) -> None:
        size = math.gcd(rows, largest)

        def one(n, _):
            at = pl.multiple_of(n * size, size)
            body(pl.ds(at, size), at)

        count = jax.lax.shift_right_logical(words + size - 1, size.bit_length() - 1)
        jax.lax.fori_loop(0, jnp.minimum(count, rows // size), one, None)

    return run
