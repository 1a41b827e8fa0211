"""Weights as integers and small floats: a loop in numpy, half a step of error, odd shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.models import NF4, Float8, Int4, Int8, ScaledInt8
from lmjax.models.few_rows import few_row_product, piecewise_product
from lmjax.models.integer_products import DynamicInt8, integer_product
from lmjax.models.quantized import WeightForm
from lmjax.parallel import Layout, Mesh
from tests.lmjax.models.compiled_codes import decode, encode, encode_form, read_form

INTEGERS = [kind(symmetric=symmetric) for kind in (Int8, Int4) for symmetric in (True, False)]


@pytest.fixture(scope="module", autouse=True)
def one_mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


def slowly(weight, bits, block, symmetric):
    """The weight that is kept, block by block down each column, and each number's step."""
    found, steps = np.zeros(weight.shape), np.zeros(weight.shape)
    for column in range(weight.shape[1]):
        for first in range(0, len(weight), block or len(weight)):
            part = slice(first, first + (block or len(weight))), column
            w = weight[part].astype(np.float64)
            if symmetric:
                low, high, zero = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0
                scale = np.abs(w).max() / high
            else:
                low, high = 0, 2**bits - 1
                scale = (max(w.max(), 0) - min(w.min(), 0)) / high
                zero = np.round(-min(w.min(), 0) / (scale or 1))
            n = np.clip(np.round(w / (scale or 1)) + zero, low, high)
            found[part], steps[part] = (n - zero) * scale, scale
    return found, steps


def random_weight(shape, seed):
    """Numbers of sizes that differ by column, with a column of zeros and one of one sign."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal((1, shape[1])))
    weight[:, 0] = np.abs(weight[:, 0])
    weight[:, -1] *= seed % 2
    return weight.astype(np.float32)


@settings(max_examples=6, deadline=None)
@given(
    code=st.sampled_from(INTEGERS),
    rows=st.integers(1, 21),
    columns=st.integers(1, 4),
    block=st.sampled_from([None, 2, 5, 8]),
    seed=st.integers(0, 99),
)
def test_integers_are_those_of_a_loop(code, rows, columns, block, seed):
    """All but numbers half-way between two, to which float32 rounds either way: half a step."""
    code = type(code)(symmetric=code.symmetric, block=block)
    weight = random_weight((rows, columns), seed)
    stored = encode(code, weight, 0)
    found = np.asarray(decode(code, stored, 0, rows))
    expected, steps = slowly(weight, code.bits, block, code.symmetric)
    assert (np.abs(found - weight) <= 0.5001 * steps + 1e-30).all()
    assert (np.abs(found - expected) <= 1.0002 * steps + 1e-30).all()
    clear = np.abs(np.abs(expected - weight) - steps / 2) > 1e-3 * steps
    np.testing.assert_allclose(found[clear], expected[clear], rtol=1e-5, atol=1e-30)
    assert stored["codes"].shape == (-(-rows // code.packed), columns)
    assert stored["codes"].dtype.itemsize == 1


@settings(max_examples=4, deadline=None)
@given(
    symmetric=st.booleans(),
    rows=st.integers(1, 9),
    seed=st.integers(0, 99),
    scales=st.sampled_from(["float32", "float16"]),
)
@pytest.mark.parametrize("kind", [Int8, Int4])
def test_every_code_comes_back(kind, symmetric, rows, seed, scales):
    """What is packed is unpacked, zeros of 0 and 2^b - 1 among them; shapes may be odd."""
    code = kind(symmetric=symmetric, block=None, scales=scales)
    rng = np.random.default_rng(seed)
    n = rng.integers(code.lowest, code.highest + 1, (rows, 3)).astype(np.float32)
    scale = rng.random((1, 3)).astype(np.float16).astype(np.float32) + 1
    zero = None if symmetric else np.array([[0, code.highest, 5]], np.float32)

    @jax.jit
    def both(n, scale, zero):
        grid = code.grid({"scales": scale}, 0)._replace(zero=zero)
        return code.decode(code.stored(n, grid, 0), 0, rows)

    found = both(n, scale, zero)
    kept = scale.astype(scales).astype(np.float32)
    np.testing.assert_allclose(found, (n - (0 if symmetric else zero)) * kept, rtol=1e-6)


def test_scales_in_16_bits_are_rounded_up():
    """So the largest number is still within the grid: half a step of the kept scale."""
    weight = random_weight((64, 5), 1)
    for code in INTEGERS:
        code = type(code)(symmetric=code.symmetric, scales="float16", block=16)
        stored = encode(code, weight, 0)
        assert stored["scales"].dtype == jnp.float16
        steps = np.repeat(np.asarray(stored["scales"], np.float32), 16, axis=0)
        found = np.asarray(decode(code, stored, 0, 64))
        assert (np.abs(found - weight) <= 0.501 * steps).all()


@pytest.mark.parametrize("block", [None, 8])
def test_floats_are_the_nearest_of_their_format(block):
    """Half a step: 2^-4 of a normal number, 2^-10 of the scale below; the largest stays itself."""
    weight = random_weight((24, 5), 3)
    code = Float8(block=block)
    stored = encode(code, weight, 0)
    found = np.asarray(decode(code, stored, 0, 24))
    scales = np.repeat(np.asarray(stored["scales"]), block or 24, axis=0)
    bound = np.maximum(np.abs(weight) * 2.0**-4, scales * 2.0**-10)
    assert (np.abs(found - weight) <= bound * (1 + 1e-5)).all()
    largest = np.abs(weight).max(axis=0)
    np.testing.assert_allclose(np.abs(found).max(axis=0), largest, rtol=1e-6)


@pytest.mark.parametrize("code", [Int8(), Int4(), Int4(symmetric=False), Float8()])
def test_what_is_no_number_is_not_lost(code):
    """All of its block is NaN, and nothing else."""
    code = type(code)(block=64) if isinstance(code, Float8) else code
    weight = np.ones((8192, 2), np.float32)
    weight[5000, 1] = np.inf
    found = np.asarray(decode(code, encode(code, weight, 0), 0, 8192))
    assert np.isnan(found[4992:5056, 1]).all() and np.isnan(found).sum() == 64


CODES = [
    *(
        kind(symmetric=s, block=b)
        for kind in (Int8, Int4)
        for s in (True, False)
        for b in (16, None)
    ),
    *(Float8(), NF4(block=16), NF4(block=16, double=False), ScaledInt8(block=32)),
]


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_products_of_a_few_rows_are_those_of_the_whole_weight(code, rows):
    """Sums in another order: 1e-5 of results of about 10."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((96, 7)).astype(np.float32)
    x = rng.standard_normal((rows, 96)).astype(np.float32)
    form = WeightForm((("embed", 96),), (("mlp", 7),), code, Layout(rules=()))
    stored = encode_form(form, weight)
    expected = x @ np.asarray(read_form(form, stored))
    for product in (few_row_product, piecewise_product):
        found = jax.jit(lambda x, stored, product=product: product(x, form, stored))(x, stored)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("code", [Int8(block=64), Int4(block=64), Float8()], ids=str)
def test_no_float_weight_is_made(code, biased):
    """XLA takes out of a loop what is the same in all turns: it would be a weight of 4 bytes.

    It also makes one for a product with a bias. A piece of 128 outputs may be made at a time, which
    is 1 byte a weight; XLA of jax 0.12 makes float16 of fp8, which are 2.
    """
    form = WeightForm((("embed", 512),), (("mlp", 512),), code, Layout(rules=()))
    stored, x = encode_form(form, np.ones((512, 512), np.float32)), jnp.ones((1, 512))

    @jax.jit
    def repeated(x, stored, bias, turns):
        def turn(_, x):
            product = few_row_product(x, form, stored)
            return product + bias if biased else product

        return jax.lax.fori_loop(0, turns, turn, x)

    given = x, stored, jnp.ones(512), jnp.int32(3)
    memory = repeated.lower(*given).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3 * 512 * 512


@pytest.mark.parametrize("code", [Int8(block=64), Int4(block=64), Float8()], ids=str)
def test_what_a_row_is_made_of_is_not_in_the_loop_over_weights(code):
    """There it would be computed for each weight; the maximum stands for a norm."""
    form = WeightForm((("embed", 256),), (("mlp", 128),), code, Layout(rules=()))
    stored, x = encode_form(form, np.ones((256, 128), np.float32)), jnp.ones((1, 256))
    product = jax.jit(lambda x, stored: few_row_product(jnp.maximum(x, 0.5), form, stored))
    parts = product.lower(x, stored).compile().as_text().split("\n\n")
    assert any(" maximum(" in part for part in parts)
    fused = [part for part in parts if " maximum(" in part and " dot(" in part]
    assert not [part for part in fused if not part.startswith("ENTRY")]


def test_products_of_integers_are_exact_sums():
    """numpy's integers of 64 bits, times both scales: 1e-6."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((40, 6)).astype(np.float32)
    x = rng.standard_normal((2, 3, 40)).astype(np.float32)
    form = WeightForm((("embed", 40),), (("mlp", 6),), Int8(block=None), Layout(rules=()))
    stored = encode_form(form, weight)
    scale = DynamicInt8().scale(None, jnp.asarray(x))
    found = integer_product(jnp.asarray(x), scale, form, stored, jax.P(None, None, None))
    of_x = np.abs(x).max(axis=2, keepdims=True) / 127
    of_w = np.abs(weight).max(axis=0) / 127
    n_x, n_w = np.round(x / of_x).astype(np.int64), np.round(weight / of_w).astype(np.int64)
    np.testing.assert_allclose(found, (n_x @ n_w) * of_x * of_w, rtol=1e-5)


@pytest.mark.parametrize("code", [Int8(block=16), Int4(symmetric=False, block=16), NF4(block=32)])
@pytest.mark.parametrize("rows", [1, 2])
def test_scores_of_a_table(code, rows):
    """Those of the whole table: 1e-5 of results of about 10."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((256, 96)).astype(np.float32)
    x = rng.standard_normal((rows, 96)).astype(np.float32)
    form = WeightForm((("embed", 96),), (), code, Layout(rules=()), (("vocab", 256),))
    stored = encode_form(form, table)
    found = jax.jit(lambda x, stored: few_row_product(x, form, stored))(x, stored)
    np.testing.assert_allclose(found, x @ np.asarray(read_form(form, stored)).T, rtol=0, atol=1e-4)
