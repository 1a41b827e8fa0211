"""Codes of weights as programs: operation by operation, each would be compiled by itself."""

import functools

import jax

from lmjax.models.quantized import WeightForm


@functools.partial(jax.jit, static_argnums=(0, 2))
def encode(code, weight, axis):
    """See `WeightCode.encode`."""
    return code.encode(weight, axis)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def decode(code, stored, axis, size):
    """See `WeightCode.decode`."""
    return code.decode(stored, axis, size)


encode_form = jax.jit(WeightForm.encode, static_argnums=0)
read_form = jax.jit(WeightForm.read, static_argnums=0)
