"""Functions in three passes: the whole gradient, each product once, and little that is kept."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.parallel.passes import in_passes
from lmjax.scaling.program import CompiledProgram

ROWS, WIDTH, HIDDEN = 10, 6, 16
PRODUCT = 2 * ROWS * WIDTH * HIDDEN  # FLOPs of one product


def layer(weights, given, x):
    """A normalised layer whose weights are cast where they are used, and computed again there."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def product(x, stored):
        return x @ stored.astype(x.dtype)

    y = x - jnp.mean(x, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-3) * weights["scale"]
    hidden = jax.nn.gelu(product(y, weights["up"])) * given["kept"]
    return x + product(hidden, weights["down"])


def problem():
    """Weights in bfloat16, a mask, an input and a gradient of the output."""
    keys = jax.random.split(jax.random.key(0), 5)
    weights = {
        "scale": jnp.linspace(0.5, 1.5, WIDTH),
        "up": jax.random.normal(keys[0], (WIDTH, HIDDEN), jnp.bfloat16),
        "down": jax.random.normal(keys[1], (HIDDEN, WIDTH), jnp.bfloat16),
    }
    given = {"kept": jax.random.bernoulli(keys[2], 0.7, (ROWS, HIDDEN))}
    x, d_y = (jax.random.normal(key, (ROWS, WIDTH)) for key in keys[3:])
    return weights, given, x, d_y


@pytest.mark.parametrize("again", [False, True])
def test_passes_are_the_gradient_cut_in_three(again):
    """Without and with a `jax.checkpoint` around all, which backward computes again."""
    function = jax.checkpoint(layer) if again else layer
    weights, given, x, d_y = problem()
    y, pull = jax.vjp(lambda weights, x: layer(weights, given, x), weights, x)
    expected = y, *pull(d_y)

    def passes(weights, given):
        return in_passes(function, weights, given, jax.ShapeDtypeStruct(x.shape, x.dtype))

    def run(do, *arguments):
        compiled = jax.jit(do).lower(weights, given, *arguments).compile()
        flops = CompiledProgram(compiled.as_text()).flops
        return flops, compiled(weights, given, *arguments)

    first, (found_y, kept) = run(lambda w, g, x: passes(w, g).forward(x), x)
    second, (d_x, more) = run(lambda w, g, *given: passes(w, g).backward(*given), kept, d_y)
    third, d_weights = run(lambda w, g, *given: passes(w, g).weights(*given), kept, more)
    # The same operations in float32; gradients of weights are rounded to their bfloat16.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2, atol=1e-5
        ),
        (found_y, d_weights, d_x),
        expected,
    )
    # Two products in each; the one whose result backward reads is computed again, the other not.
    assert (first, second, third) == (2 * PRODUCT, (3 if again else 2) * PRODUCT, 2 * PRODUCT)
    # Casts of weights, and the mask, are not kept; with the checkpoint only the input is.
    shapes = {a.shape for a in (*kept, *more)}
    assert not shapes & {(WIDTH, HIDDEN), (HIDDEN, WIDTH)}
    assert not any(a.dtype == bool for a in kept)
    if again:
        assert [a.shape for a in kept] == [x.shape]


def test_forms_of_what_is_kept_are_not_kept():
    """Of what is widened and repeated the original, and the sum in its narrow form."""

    def function(weights, given, x):
        wide = jnp.broadcast_to(x[:, None].astype(jnp.float32), (ROWS, 3, WIDTH))
        return jnp.sum(wide * wide, axis=1).astype(x.dtype) * weights

    x = jax.random.normal(jax.random.key(0), (ROWS, WIDTH), jnp.bfloat16)
    passes = in_passes(function, jnp.ones((WIDTH,), jnp.bfloat16), None, x)
    _, kept = passes.forward(x)
    assert [(a.shape, a.dtype) for a in kept] == [(x.shape, jnp.bfloat16)] * 2
