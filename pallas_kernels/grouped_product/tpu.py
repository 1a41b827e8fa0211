"""Grouped product by kernels for TPU, forward and backward.

A grid step is a pair of a block of rows and a group that has rows in it, from a table that is made
of the sizes; inside it, strips of rows that the group has none of are left out.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.chips import KINDS
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.pallas import pl, pltpu
from pallas_kernels.target import target

LANES = 128
SIZES = (2048, 1024, 512, 256, 128)  # of blocks of columns
ROWS = (512, 256, 128)  # of blocks of rows
FIRST, LAST, BLOCK, GROUP = range(4)  # rows of the table of pairs: rows of the group in the block


class _Static(NamedTuple):
    rows: int
    strip: int  # rows that are multiplied at a time: as many as a matrix unit has
    vmem: int
    interpret: Any


def refusal(x, w) -> str | None:
    """Reason why the kernels cannot serve, or None if they can."""
    device = target()
    if device.platform != "tpu":
        return f"it needs a TPU and the device is a {device.platform}"
    if device.kind not in KINDS:
        return f"a {device.kind}, it knows {', '.join(KINDS)}"
    if x.dtype != w.dtype or x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtypes {x.dtype} and {w.dtype}, it takes two of bfloat16 or of float32"
    if _rows(device.kind, *w.shape[1:], x.dtype.itemsize) is None:
        return f"matrices of {w.shape[1:]}: their blocks do not fit the vector memory"
    return None


def grouped(
    x: Float[Array, "tokens in"], w: Float[Array, "groups in out"], sizes: Int[Array, "groups"]
) -> Float[Array, "tokens out"]:
    """x[t] w[group of t], zeros where t is of no group."""
    x, w, sizes = vary_alike((x, w, sizes))
    (tokens, width), out = x.shape, w.shape[2]
    device = target()
    rows = _rows(device.kind, width, out, x.dtype.itemsize)
    assert rows is not None, "refused above"
    strip = min(KINDS[device.kind].side, rows)
    rows = min(rows, _round_up(tokens, strip))
    static = _Static(rows, strip, _vmem(device.kind), device.interpret)
    more = [_round_up(width) - width, _round_up(out) - out]
    x = jnp.pad(x, ((0, _round_up(tokens, rows) - tokens), (0, more[0])))
    w = jnp.pad(w, ((0, 0), (0, more[0]), (0, more[1])))
    ends = jnp.minimum(jnp.cumsum(sizes.astype(jnp.int32)), tokens)
    return _grouped(static, x, w, ends)[:tokens, :out]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(static: _Static, x, w, ends):
    return _products(static, x, w, ends, contracted=0)


def _forward(static, x, w, ends):
    return _grouped(static, x, w, ends), (x, w, ends)


def _backward(static, saved, d_y):
    x, w, ends = saved
    return _products(static, d_y, w, ends, contracted=1), _weights(static, x, d_y, w, ends), None


_grouped.defvjp(_forward, _backward)


def _pairs(ends, tokens: int, rows: int, every: bool):
    """Table [4, pairs] of blocks of rows with a group that has rows there, and the number of pairs.

    In the order of the rows. Pairs after that number repeat the last one.

    Args:
        every: groups without rows have a pair too, in which they have none; without it the rows
            that are of no group have pairs, in which no group has rows.
    """
    groups = ends.shape[0]
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    if not every:  # one more group, of what is left
        starts = jnp.concatenate([starts, ends[-1:]])
        ends = jnp.concatenate([ends, jnp.full_like(ends[:1], tokens)])
    first = jnp.minimum(starts // rows, tokens // rows - 1)
    blocks = jnp.where(ends > starts, (ends - 1) // rows - first + 1, int(every))
    until = jnp.cumsum(blocks)
    pairs = tokens // rows + groups
    pair = jnp.minimum(jnp.arange(pairs, dtype=jnp.int32), until[-1] - 1)
    group = jnp.sum(until[None] <= pair[:, None], axis=1).astype(jnp.int32)
    block = first[group] + pair - (until - blocks)[group]
    table = jnp.stack([starts[group], ends[group], block, jnp.minimum(group, groups - 1)])
    if not every:
        none = group == groups
        table = table.at[LAST].set(jnp.where(none, table[FIRST], table[LAST]))
    return table, until[-1:]


def _strips(table, step, static: _Static, body) -> None:
    """Runs a function for each strip of the block with rows of the group: its rows, and whose."""
    block = table[BLOCK, step] * static.rows
    first = jnp.maximum(table[FIRST, step] - block, 0)
    last = jnp.minimum(table[LAST, step] - block, static.rows)
    size = static.strip

    def one(n, _):
        at = pl.multiple_of(n * size, size)
        row = at + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        body(pl.ds(at, size), (row >= first) & (row < last))

    shift = size.bit_length() - 1
    end = jnp.where(last > first, (last + size - 1) >> shift, first >> shift)
    jax.lax.fori_loop(first >> shift, end, one, None)


def _products_body(static: _Static, contracted: int, table, count, x, w, y):
    step = pl.program_id(1)
    before = table[BLOCK, jnp.maximum(step - 1, 0)]

    @pl.when((step == 0) | (table[BLOCK, step] != before))
    def _():
        y[...] = jnp.zeros(y.shape, y.dtype)

    def strip(rows, mine):
        product = _product(x[rows], w[0], (1, contracted))
        y[rows] = jnp.where(mine, product.astype(y.dtype), y[rows])

    @pl.when(step < count[0])
    def _():
        _strips(table, step, static, strip)


def _products(static: _Static, x, w, ends, contracted: int):
    """Rows of x by their group's matrix, over its axis `contracted`."""
    tokens, width = x.shape
    out = w.shape[2 - contracted]
    table, count = _pairs(ends, tokens, static.rows, every=False)
    size = _columns(static.vmem, static.rows, width, out, x.dtype.itemsize)
    block = (1, width, size) if contracted == 0 else (1, size, width)

    def matrix(column, step, table, _):
        at = table[GROUP, step]
        return (at, 0, column) if contracted == 0 else (at, column, 0)

    return _call(
        functools.partial(_products_body, static, contracted),
        static,
        "rows",
        (pl.cdiv(out, size), table.shape[1]),
        [
            pl.BlockSpec(
                (static.rows, width), lambda column, step, table, _: (table[BLOCK, step], 0)
            ),
            pl.BlockSpec(block, matrix),
        ],
        pl.BlockSpec(
            (static.rows, size), lambda column, step, table, _: (table[BLOCK, step], column)
        ),
        _like(x, (tokens, out), x.dtype),
        [],
        ("parallel", "arbitrary"),
    )(table, count, x, w)


def _weights_body(static: _Static, table, count, x, d_y, d_w, total):
    step, last = pl.program_id(2), pl.num_programs(2) - 1
    group = table[GROUP, step]

    @pl.when((step == 0) | (group != table[GROUP, jnp.maximum(step - 1, 0)]))
    def _():
        total[...] = jnp.zeros(total.shape, jnp.float32)

    def strip(rows, mine):
        left, right = (jnp.where(mine, block[rows], 0) for block in (x, d_y))
        total[...] += _product(left, right, (0, 0))

    @pl.when(step < count[0])
    def _():
        _strips(table, step, static, strip)

    @pl.when((step == last) | (group != table[GROUP, jnp.minimum(step + 1, last)]))
    def _():
        d_w[0] = total[...].astype(d_w.dtype)


def _weights(static: _Static, x, d_y, w, ends):
    """Of each group the sum over its rows of x^T d_y."""
    table, count = _pairs(ends, x.shape[0], static.rows, every=True)
    width, out = w.shape[1:]
    # Both as near to 1,024 as they can be: as much work as may be for each row that is read.
    left, right = min(1024, width), min(1024, out)
    while _weights_bytes(static.rows, left, right, x.dtype.itemsize) > static.vmem:
        left, right = (left // 2, right) if left > right else (left, right // 2)
    left, right = _round_up(left), _round_up(right)
    return _call(
        functools.partial(_weights_body, static),
        static,
        "weights",
        (pl.cdiv(width, left), pl.cdiv(out, right), table.shape[1]),
        [
            pl.BlockSpec((static.rows, left), lambda i, j, step, table, _: (table[BLOCK, step], i)),
            pl.BlockSpec(
                (static.rows, right), lambda i, j, step, table, _: (table[BLOCK, step], j)
            ),
        ],
        pl.BlockSpec((1, left, right), lambda i, j, step, table, _: (table[GROUP, step], i, j)),
        _like(x, w.shape, w.dtype),
        [pltpu.VMEM((left, right), jnp.float32)],
        ("parallel", "parallel", "arbitrary"),
    )(table, count, x, d_y)


def _product(one, other, axes: tuple[int, int]):
    """Product in float32 over an axis of each, of float32 in the precision that jax is set to."""
    # Products of bfloat16 are exact; Mosaic refuses to be asked for more.
    exact = jax.lax.Precision.DEFAULT if one.dtype == jnp.bfloat16 else None
    contraction = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(
        one, other, contraction, precision=exact, preferred_element_type=jnp.float32
    )


def _call(body, static: _Static, name, grid, inputs, out, shape, scratch, semantics):
    return pl.pallas_call(
        body,
        out_shape=shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=inputs,
            out_specs=out,
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=static.vmem
        ),
        interpret=static.interpret,
        name=f"grouped_product_{name}",
    )


def _rows(kind: str, width: int, out: int, itemsize: int) -> int | None:
    """Rows of a block; None if no block fits."""
    vmem = _vmem(kind)
    for rows in ROWS:
        ways = (
            _columns(vmem, rows, width, out, itemsize),
            _columns(vmem, rows, out, width, itemsize),
        )
        if None not in ways:
            return rows
    return None


def _columns(vmem: int, rows: int, width: int, out: int, itemsize: int) -> int | None:
    """Columns of a block of matrices; None if none fits. Blocks are held twice."""
    width, out = _round_up(width), _round_up(out)
    for size in SIZES:
        size = min(size, out)
        strip = 12 * 256 * size
        if 2 * itemsize * (rows * (width + size) + width * size) + strip <= vmem:
            return size
    return None


def _weights_bytes(rows: int, left: int, right: int, itemsize: int) -> int:
    return 2 * itemsize * (rows * (left + right) + left * right) + 4 * left * right + 2**20


def _vmem(kind: str) -> int:
    return KINDS[kind].vmem * 7 // 8


def _round_up(size: int, multiple: int = LANES) -> int:
    return -(-size // multiple) * multiple


def _like(array, shape, dtype) -> jax.ShapeDtypeStruct:
    """Type of an array that varies over the same manual mesh axes."""
    axes = jax.typeof(array).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)
