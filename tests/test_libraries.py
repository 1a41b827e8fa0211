"""What the libraries under us do where a test, or a run, would rest on a wrong belief."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data.permutation import permute, random_bits
from lmjax.generation.sampling import choose
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, initialize
from lmjax.models.linear import dropout
from lmjax.parallel import training_layout

TESTS = Path(__file__).parent


def test_a_precision_changes_nothing_on_a_cpu():
    """So low precision is tested by casting what is multiplied, never by a setting."""
    a, b = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    full = np.asarray(jnp.matmul(a, b))
    np.testing.assert_array_equal(jnp.matmul(a, b, precision="bfloat16"), full)
    with jax.default_matmul_precision("bfloat16"):
        np.testing.assert_array_equal(jax.jit(jnp.matmul)(a, b), full)
    cast = jnp.matmul(*(jnp.asarray(x, jnp.bfloat16) for x in (a, b)))
    # Three roundings to 8 bits: of each factor and of the result.
    error = np.abs(np.asarray(cast, np.float32) - full).max() / np.abs(full).max()
    assert 2**-10 < error < 3 * 2**-8


def test_no_test_sets_a_precision():
    """But for the one in conftest.py, which is for GPUs and TPUs."""
    setting = re.compile(r"\bprecision=|matmul_precision")
    ours = {TESTS / "conftest.py", Path(__file__)}
    files = set(TESTS.rglob("*.py")) - ours
    assert not [path for path in files if setting.search(path.read_text("utf-8"))]


def test_random_numbers_are_the_same_in_every_version(one_device):
    """The order of the data, keys, masks and drawn tokens, with each jax that we run on.

    A run that goes on with another version goes on with the same data and the same dropout.
    """
    assert [hex(bits) for bits in random_bits(7, np.arange(2))] == [
        "0xb8b4c2977eabce45",
        "0x3d41bf495cd3075f",
    ]
    order = permute(np.arange(12), np.array([12]), random_bits(0, 1))
    assert order.tolist() == [2, 0, 3, 1, 6, 4, 9, 5, 11, 8, 10, 7]

    key = jax.random.split(jax.random.key(0))[1]
    assert jax.random.key_data(key).tolist() == [928981903, 3453687069]
    step = jax.random.fold_in(key, 3)
    assert jax.random.key_data(step).tolist() == [2488719848, 3371676629]
    kept = dropout(jnp.ones((1, 2, 8)), 0.5, key) > 0
    assert kept.ravel().astype(int).tolist() == [1, 1, 0, 1, 1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0]

    seeds = jnp.arange(8)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 5))(seeds)
    tokens = choose(jnp.zeros((8, 100)), keys, jnp.float32(1), None, None, None)
    assert tokens.tolist() == [59, 34, 80, 19, 32, 42, 82, 25]


def test_parameters_are_drawn_alike_in_every_version(one_device):
    """To 2 units in the last place: bits become normal numbers by a polynomial of XLA's."""
    config = TransformerConfig(
        vocab_size=50,
        hidden=8,
        num_layers=2,
        max_length=8,
        attention=AttentionConfig(num_heads=2, head_dim=4),
        feed_forward=FeedForwardConfig(size=16),
    )
    _, params = initialize(config, training_layout(), jax.random.key(0))
    drawn = [
        params["embedding"]["table"][0, :3],
        params["blocks"]["attention"]["query"]["weight"][1, 0, 0, :3],
    ]
    expected = [
        [0.020080285146832466, -0.01812674291431904, -0.014963444322347641],
        [-0.000853357429150492, 0.008720907382667065, -0.03186306729912758],
    ]
    np.testing.assert_array_max_ulp(np.array(drawn), np.array(expected, np.float32), 2)
