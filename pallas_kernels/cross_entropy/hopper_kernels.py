"""Kernels of the cross-entropy for Hopper: a tile of logits in registers, and what is made of it.

Two warpgroups compute a tile of [128 tokens, 128 rows of the head] each, while a third one copies.
Logits are in base 2 (times log2 e).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.hopper.compat import load, transposed
from pallas_kernels.pallas import pl, plgpu

LOG2E = math.log2(math.e)
LEAST = -1e30  # logit of a row that is no word: its exponential is exactly zero
TOKENS, ROWS = 128, 128  # of a warpgroup's tile
WIDTH = 64  # of hidden and head that are multiplied at a time
COMPUTING, STAGES = 2, 4


def wrapped() -> tuple[Any, ...]:
    """Layout in shared memory of what the tensor cores read."""
    return plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)


class TileRequest(NamedTuple):
    """Static part of a call: scale and softcap of the logits, the mean, what Pallas interprets."""

    scale: float
    softcap: float | None
    mean: bool
    interpret: Any


def sums(request: TileRequest, hidden, head, targets, words):
    """Sums over the rows of each tile, [3 or 4, tiles of rows, tokens] float32.

    Of each token the largest logit of the tile, the sum of exponentials relative to it, the
    target's logit, and if asked for the sum of exponential times logit.
    """
    shape = 3 + request.mean, head.shape[0] // ROWS, hidden.shape[0]
    inputs = {"targets": targets, "words": words}
    out = jax.ShapeDtypeStruct(shape, jnp.float32, **_varying(hidden))
    return _launch(request, _sums_of_tile, hidden, head, inputs, out, {})


def _sums_of_tile(request: TileRequest, tile, refs, at) -> None:
    logits, hit, word = tile
    label = jnp.sum(jnp.where(hit, logits, _full(request, logits.shape, 0.0)), axis=1)
    logits = jnp.where(word, logits, _full(request, logits.shape, LEAST))
    top = jnp.max(logits, axis=1)
    exponential = jnp.exp2(logits - _columns(top, logits.shape))
    values = [top, jnp.sum(exponential, axis=1), label]
    if request.mean:
        values.append(jnp.sum(exponential * logits, axis=1))
    for n, value in enumerate(values):
        refs["out"][n, at.block, at.tokens] = value


def gradients(request: TileRequest, hidden, head, targets, words, factors):
    """Gradients of the logits of a part of the head, [tokens, rows] in the dtype of hidden.

    factors: log2 of the sum of exponentials, and the weights of the share, of the target and of
    share times logit, [4, tokens].
    """

    inputs = {"targets": targets, "words": words, "factors": factors}
    shape = hidden.shape[0], head.shape[0]
    out = jax.ShapeDtypeStruct(shape, hidden.dtype, **_varying(hidden))
    scratch = {"result": _matrix((COMPUTING, TOKENS, ROWS), hidden.dtype)}
    return _launch(request, _gradients_of_tile, hidden, head, inputs, out, scratch)


def _gradients_of_tile(request: TileRequest, tile, refs, at) -> None:
    logits, hit, word = tile

    def factor(n):
        return _columns(_load(request, refs["factors"].at[n, at.tokens]), logits.shape)

    weight = factor(1)
    if request.mean:
        weight = weight + factor(3) * logits
    nothing = _full(request, logits.shape, 0.0)
    gradient = jnp.exp2(logits - factor(0)) * weight + jnp.where(hit, factor(2), nothing)
    if request.softcap is not None:  # from the logits, so that registers need not keep it
        bent = logits * (1 / (request.softcap * LOG2E))
        gradient *= 1.0 - bent * bent
    result = refs["result"].at[at.group]
    result[...] = jnp.where(word, gradient, nothing).astype(result.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result, refs["out"].at[at.tokens, at.rows])
    plgpu.wait_smem_to_gmem(0)


class _At(NamedTuple):
    group: Any
    block: Any
    tokens: Any
    rows: Any


def _launch(request: TileRequest, use: Callable, hidden, head, inputs, out, scratch):
    """Runs `use` on every tile of logits.

    It takes (logits, masks of the target and of words), the memory by name, and the part of it that
    is this tile's.
    """
    steps = hidden.shape[1] // WIDTH
    stages = min(STAGES - len(scratch), steps)
    scratch = {
        "a": _matrix((stages, COMPUTING * TOKENS, WIDTH), hidden.dtype),
        "b": _matrix((stages, ROWS, WIDTH), hidden.dtype),
        "ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages),
        **scratch,
    }
    names = "hidden", "head", *inputs, "out", *scratch

    def body(*given):
        refs = dict(zip(names, given, strict=True))
        block, part = lax.axis_index("rows"), lax.axis_index("tokens")
        group = lax.axis_index("wg")
        first = block * ROWS

        @pl.when(group == COMPUTING)
        def _():
            _register_limit(request, 56, "decrease")
            _copy(refs, steps, stages, part, block)

        @pl.when(group < COMPUTING)
        def _():
            _register_limit(request, 224, "increase")
            logits = _product(request, refs, steps, stages, group)
            tokens = pl.ds((part * COMPUTING + group) * TOKENS, TOKENS)
            at = _At(group, block, tokens, pl.ds(block * ROWS, ROWS))
            row = _laid_out(request, lax.broadcasted_iota(jnp.int32, logits.shape, 1))
            hit = row == _columns(_load(request, refs["targets"].at[tokens]) - first, row.shape)
            word = row < refs["words"][0] - first
            use(request, (_bend(request, logits), hit, word), refs, at)

    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=tuple(scratch.values()),
        grid=(hidden.shape[0] // (COMPUTING * TOKENS), head.shape[0] // ROWS),
        grid_names=("tokens", "rows"),
        num_threads=COMPUTING + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **({"interpret": request.interpret} if request.interpret else {}),
    )(hidden, head, *inputs.values())


def _copy(refs, steps: int, stages: int, part, block) -> None:
    """Brings hidden and head to shared memory, step by step."""

    def step(k, _):
        slot = lax.rem(k, jnp.int32(stages))

        @pl.when(k >= stages)
        def _():
            plgpu.barrier_wait(refs["free"].at[slot])

        columns, ready = pl.ds(k * WIDTH, WIDTH), refs["ready"].at[slot]
        tokens = pl.ds(part * COMPUTING * TOKENS, COMPUTING * TOKENS)
        plgpu.copy_gmem_to_smem(refs["hidden"].at[tokens, columns], refs["a"].at[slot], ready)
        rows = pl.ds(block * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(refs["head"].at[rows, columns], refs["b"].at[slot], ready)

    lax.fori_loop(0, steps, step, None)

    def drain(k, _):
        plgpu.barrier_wait(refs["free"].at[lax.rem(k, jnp.int32(stages))])

    lax.fori_loop(steps - stages, steps, drain, None)


def _product(request: TileRequest, refs, steps: int, stages: int, group):
    """hidden head^T of a warpgroup's tile, float32."""
    mine = pl.ds(group * TOKENS, TOKENS)

    def operands(k):
        slot = lax.rem(k, jnp.int32(stages))
        plgpu.barrier_wait(refs["ready"].at[slot])
        return slot, refs["a"].at[slot, mine], refs["b"].at[slot]

    if request.interpret:

        def add(k, total):
            slot, a, b = operands(k)
            a, b = a[...].astype(jnp.float32), b[...].astype(jnp.float32)
            plgpu.barrier_arrive(refs["free"].at[slot])
            return total + jnp.dot(a, b.T)

        return lax.fori_loop(0, steps, add, jnp.zeros((TOKENS, ROWS), jnp.float32))

    def scope(total):
        def step(k, _):
            _, a, b = operands(k)
            plgpu.wgmma(total, a, transposed(b))
            plgpu.wgmma_wait(1)

            @pl.when(k > 0)
            def _():
                plgpu.barrier_arrive(refs["free"].at[lax.rem(k - 1, jnp.int32(stages))])

        lax.fori_loop(0, steps, step, None)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(refs["free"].at[(steps - 1) % stages])
        return total[...]

    return pl.run_scoped(scope, plgpu.ACC((TOKENS, ROWS), jnp.float32))


def _bend(request: TileRequest, logits):
    """Logits in base 2, after the scale and the softcap."""
    if request.softcap is None:
        return logits * (request.scale * LOG2E)
    bent = jnp.tanh(logits * (request.scale / request.softcap))
    return bent * (request.softcap * LOG2E)


def _load(request: TileRequest, reference):
    """A vector of a number for each token of a tile."""
    if request.interpret:
        return reference[...]
    return load(reference, plgpu.Layout.WGMMA.reduce(1))


def _columns(vector, shape):
    """A number for each token, repeated along the rows of the head."""
    return lax.broadcast_in_dim(vector, shape, [0])


def _full(request: TileRequest, shape, value):
    return _laid_out(request, jnp.full(shape, value, jnp.float32))


def _laid_out(request: TileRequest, array):
    return array if request.interpret else plgpu.layout_cast(array, plgpu.Layout.WGMMA)


def _register_limit(request: TileRequest, count: int, action: str) -> None:
    if not request.interpret:
        plgpu.set_max_registers(count, action=action)


def _matrix(shape, dtype):
    """Shared memory of matrices in the order that the tensor cores read."""
    return plgpu.SMEM(shape, dtype, transforms=wrapped() if dtype.itemsize == 2 else ())


def _varying(array) -> dict[str, Any]:
    """Type of an output that varies over mesh axes as an array does."""
    return {"manual_axis_type": jax.typeof(array).manual_axis_type}
