"""Ring attention: queries stay where they are, and keys and values go around the devices.

Each device has an equal part of every sequence. In as many steps as there are devices it attends
to the keys of one of them, and merges what it finds by log-sum-exp (Liu et al. 2023,
arXiv:2310.01889). No device ever has more than two parts of the keys, so memory falls with the
number of devices.

Of a causal mask, the last device would have as many pairs as all others do on average twice. So a
device works on two halves of parts, one from the beginning of the sequence and one from its end,
which together have as many pairs everywhere (the zig-zag of Zhu 2024, ring-flash-attention).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention import Mask
from pallas_kernels.manual_axes import vary_alike

HALVES = 0, 1  # the earlier and the later one
# (q, k, v, mask, bias) -> (output, log-sum-exp), as `pallas_kernels.attention.attention`
Kernel = Callable[..., tuple[jax.Array, jax.Array]]


def ring_attention(
    kernel: Kernel,
    axis: str,
    query: Float[Array, "batch part heads head_dim"],
    keys: Float[Array, "batch part kv_heads head_dim"],
    values: Float[Array, "batch part kv_heads value_dim"],
    mask: Mask,
    bias: Any = None,
) -> Float[Array, "batch part heads value_dim"]:
    """Attention to whole sequences, from one part of them on each device of a manual mesh axis.

    Args:
      kernel: attention to some keys.
      axis: the sequences' axis of the mesh.
      query, keys, values: this device's part, of an even number of tokens.
      mask: its arrays are those of the part.
      bias: None, or one by distance.
    """
    inputs = query, keys, values, mask, bias
    query, keys, values, mask, bias = vary_alike(inputs)
    exchange = functools.partial(_to_zigzag, axis)
    query, keys, values = map(exchange, (query, keys, values))
    mask = mask.mapped(exchange, exchange)
    output = _ring(kernel, axis, query, keys, values, bias, mask)
    return _from_zigzag(axis, output)


# ---- the zig-zag


def _to_zigzag(axis: str, a: jax.Array) -> jax.Array:
    """This device's halves of [batch, part, ...], given neighbouring ones: d and 2 n - 1 - d."""
    size, device = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    even, odd = (
        jax.lax.ppermute(half, axis, pairs)
        for half, pairs in zip(jnp.split(a, 2, axis=1), _exchanges(size), strict=True)
    )
    early = device % 2 == 0
    return jnp.concatenate([jnp.where(early, even, odd), jnp.where(early, odd, even)], axis=1)


def _from_zigzag(axis: str, a: jax.Array) -> jax.Array:
    """The opposite of `_to_zigzag`."""
    size, device = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    first, second = jnp.split(a, 2, axis=1)
    early = device % 2 == 0
    halves = jnp.where(early, first, second), jnp.where(early, second, first)
    back = [
        jax.lax.ppermute(half, axis, [(to, at) for at, to in pairs])
        for half, pairs in zip(halves, _exchanges(size), strict=True)
    ]
    return jnp.concatenate(back, axis=1)


def _exchanges(size: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(from, to) of the halves with even numbers, and of those with odd ones."""
    holder = [half if half < size else 2 * size - 1 - half for half in range(2 * size)]
    pairs = [(half // 2, holder[half]) for half in range(2 * size)]
    return pairs[::2], pairs[1::2]


def _start(size: int, device: jax.Array, half: int, length: int) -> jax.Array:
    """Position of the first token of a device's half."""
    return (device if half == 0 else 2 * size - 1 - device) * length


# ---- the ring


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(kernel: Kernel, axis: str, query, keys, values, bias, mask: Mask):
    return _forward(kernel, axis, query, keys, values, bias, mask)[0]


def _forward(kernel: Kernel, axis: str, query, keys, values, bias, mask: Mask):
    exact = jnp.promote_types(jnp.float32, query.dtype)
    shape = query.shape[0], query.shape[1] // 2, query.shape[2]
    nothing = jnp.zeros((*shape, values.shape[3]), exact), jnp.full(shape, -jnp.inf, exact)
    nothing = vary_alike(nothing, like=query)

    def turn(carry, step):
        moving, found = carry
        for half, other in itertools.product(HALVES, HALVES):
            pair = _Pair(kernel, axis, mask, half, other, step)
            if pair.is_empty:
                continue
            part = pair.attend(query, bias, nothing, *moving)
            found = [_merged(found[n], part) if n == half else found[n] for n in HALVES]
        return (_next(axis, moving), found), None

    moving = keys, values, _key_arrays(mask)
    carry = moving, [nothing, nothing]
    (_, found), _ = jax.lax.scan(turn, carry, jnp.arange(jax.lax.axis_size(axis)))
    outputs, lses = zip(*found, strict=True)
    output = jnp.concatenate(outputs, axis=1).astype(query.dtype)
    return output, (query, keys, values, bias, mask, output, jnp.concatenate(lses, axis=1))


def _backward(kernel: Kernel, axis: str, saved, d_output):
    query, keys, values, bias, mask, output, lse = saved
    exact = lse.dtype
    delta = jnp.sum(d_output.astype(exact) * output.astype(exact), axis=-1)
    rows = [jnp.split(a, 2, axis=1) for a in (d_output.astype(exact), lse, delta)]

    def turn(carry, step):
        moving, d_moving, d_query, d_bias = carry
        for half, other in itertools.product(HALVES, HALVES):
            pair = _Pair(kernel, axis, mask, half, other, step)
            if pair.is_empty:
                continue
            own = tuple(part[half] for part in rows)
            d_q, d_k, d_v, more = pair.gradients(query, bias, own, *moving)
            d_query = _added(d_query, half, d_q)
            d_moving = _added(d_moving[0], other, d_k), _added(d_moving[1], other, d_v)
            d_bias = jax.tree.map(jnp.add, d_bias, more)
        return (*_next(axis, (moving, d_moving)), d_query, d_bias), None

    moving = keys, values, _key_arrays(mask)
    zeros = jax.tree.map(lambda a: jnp.zeros_like(a, exact), (keys, values, query))
    zeros = vary_alike(zeros, like=query)
    d_bias = jax.tree.map(jnp.zeros_like, bias)
    carry = moving, zeros[:2], zeros[2], d_bias
    steps = jnp.arange(jax.lax.axis_size(axis))
    (_, d_moving, d_query, d_bias), _ = jax.lax.scan(turn, carry, steps)
    found = zip((d_query, *d_moving), (query, keys, values), strict=True)
    return *(d.astype(a.dtype) for d, a in found), d_bias, None


_ring.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Half a part of the queries and one of the keys that are here at a step."""

    kernel: Kernel
    axis: str
    mask: Mask
    half: int
    other: int
    step: jax.Array

    @property
    def is_empty(self) -> bool:
        """Returns whether no query sees a key on any device: all keys are later."""
        return self.mask.causal_by_position and self.half < self.other

    def attend(self, query, bias, nothing, keys, values, arrays) -> tuple[jax.Array, jax.Array]:
        """Output and log-sum-exp of the queries."""
        inputs, mask = self.inputs(query, keys, values, arrays)

        def run():
            output, lse = self.kernel(*inputs, mask, bias)
            found = output.astype(nothing[0].dtype), lse.astype(nothing[1].dtype)
            return vary_alike(found, like=query)

        return jax.lax.cond(self.sees(mask, inputs), run, lambda: nothing)

    def gradients(self, query, bias, rows, keys, values, arrays) -> tuple[Any, ...]:
        """Gradients of queries, keys, values and bias, from those of the whole output.

        With o and l a pair's output and log-sum-exp, and w = exp(l - lse) its weight, the whole
        output is the sum of w o: so d_o = w d_output, and d_l = w (d_output . (o - output)).
        """
        inputs, mask = self.inputs(query, keys, values, arrays)
        d_output, lse, delta = rows

        def attend(q, k, v, bias):
            return self.kernel(q, k, v, mask, bias)

        def run():
            (output, own), pull = jax.vjp(attend, *inputs, bias)
            seen = jnp.isfinite(own)
            weight = jnp.where(seen, jnp.exp(jnp.where(seen, own - lse, 0.0)), 0.0)
            d_lse = weight * (jnp.sum(d_output * output.astype(lse.dtype), axis=-1) - delta)
            d_own = (weight[..., None] * d_output).astype(output.dtype)
            return vary_alike(pull((d_own, d_lse.astype(own.dtype))), like=query)

        zeros = vary_alike(jax.tree.map(jnp.zeros_like, (*inputs, bias)), like=query)
        return jax.lax.cond(self.sees(mask, inputs), run, lambda: zeros)

    def inputs(self, query, keys, values, arrays) -> tuple[tuple[jax.Array, ...], Mask]:
        """The halves, and their mask."""
        size, device = jax.lax.axis_size(self.axis), jax.lax.axis_index(self.axis)
        length = query.shape[1] // 2
        start = _start(size, device, self.half, length)
        first = _start(size, (device - self.step) % size, self.other, length)
        halves = _half(query, self.half), _half(keys, self.other), _half(values, self.other)
        here = {name: _half(a, self.other) for name, a in arrays.items()}
        mask = self.mask.mapped(lambda a: _half(a, self.half), lambda a: a)
        return halves, dataclasses.replace(mask, offset=start - first, **here)

    def sees(self, mask: Mask, inputs: tuple[jax.Array, ...]) -> jax.Array | bool:
        """Returns whether some query may see some key, by their positions."""
        length, offset, seen = inputs[0].shape[1], mask.offset, True
        if mask.causal_by_position:
            seen &= offset > -length
        if mask.window is not None:
            near = offset if mask.causal_by_position else jnp.abs(offset)
            seen &= near < length + mask.window - 1
        return seen


def _half(a: jax.Array, half: int) -> jax.Array:
    return jnp.split(a, 2, axis=1)[half]


def _key_arrays(mask: Mask) -> dict[str, jax.Array]:
    """The arrays of a mask that go around with the keys."""
    names = "key_segments", "key_ranks"
    return {name: getattr(mask, name) for name in names if getattr(mask, name) is not None}


def _next(axis: str, tree: Any) -> Any:
    """Arrays of the device before."""
    size = jax.lax.axis_size(axis)
    pairs = [(at, (at + 1) % size) for at in range(size)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, axis, pairs), tree)


def _merged(one: tuple, other: tuple) -> tuple[jax.Array, jax.Array]:
    """Attention to two sets of keys, each as (output, log-sum-exp)."""
    lse = jnp.logaddexp(one[1], other[1])
    seen = jnp.isfinite(lse)  # else both are -inf, whose differences are no numbers
    output = jnp.zeros_like(one[0])
    for part, own in (one, other):
        share = jnp.where(seen, jnp.exp(jnp.where(seen, own - lse, 0.0)), 0.0)
        output += share[..., None] * part
    return output, lse


def _added(total: jax.Array, half: int, part: jax.Array) -> jax.Array:
    """The total with a part added to one of its halves."""
    halves = jnp.split(total, 2, axis=1)
    halves[half] = halves[half] + part.astype(total.dtype)
    return jnp.concatenate(halves, axis=1)
