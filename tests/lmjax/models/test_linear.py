"""The dense layer: the product of one row, which is computed in another way than that of many."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lmjax.models.linear import in_parts

SIZES = st.sampled_from([1, 7, 16, 97])  # with and without 16 equal parts


@given(SIZES, SIZES, st.integers(0, 2**31))
def test_a_product_in_parts_is_the_product(inputs, outputs, seed):
    """Beside numpy in float64, within the rounding of as many additions of float32."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(1, inputs)).astype(np.float32)
    weight = draw.normal(size=(inputs, outputs)).astype(np.float32)
    wanted = x.astype(np.float64) @ weight.astype(np.float64)
    size = np.abs(x.astype(np.float64)) @ np.abs(weight)
    error = np.abs(np.asarray(in_parts(jnp.array(x), jnp.array(weight))) - wanted)
    assert (error <= inputs * np.finfo(np.float32).eps * size).all()
