"""A larger vocabulary: the old tokens' logits to the bit, the new rows as a loop computes them."""

import jax
import numpy as np
import pytest

from lmjax.config import UserError, replace
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    HeadTransformConfig,
    TransformerConfig,
    abstract,
    initialize,
    plain_batch,
)
from lmjax.models.vocabulary import extend_vocabulary
from lmjax.parallel import Mesh, training_layout
from tests.whole_logits import program

TIED = TransformerConfig(
    vocab_size=120,
    hidden=32,
    num_layers=2,
    max_length=16,
    attention=AttentionConfig(num_heads=4, head_dim=8),
    feed_forward=FeedForwardConfig(size=64),
)
UNTIED = replace(TIED, tied_head=False)
BIASED = replace(TIED, head_transform=HeadTransformConfig())
PIECES = [[1, 2, 3], [7], [], [5, 5, 119, 0]]
TOKENS = np.random.default_rng(0).integers(0, 120, (2, 16)).astype(np.int32)


def logits(config, params, tokens=TOKENS):
    graph, _ = abstract(config, training_layout())
    return np.asarray(program(graph, None, params, plain_batch(tokens)))


@pytest.mark.parametrize(
    ("config", "how", "times"),  # within the padding of the tables, and beyond it
    [(TIED, "pieces", 5), (UNTIED, "mean", 1), (BIASED, "pieces", 5)],
    ids=["tied, beyond", "untied", "biased, beyond"],
)
def test_old_tokens_keep_their_logits(one_device, config, how, times):
    _, params = initialize(config, training_layout(), jax.random.key(1))
    before = logits(config, params)
    larger, extended = extend_vocabulary(config, params, PIECES * times, how)
    assert larger == replace(config, vocab_size=120 + 4 * times)
    after = logits(larger, extended)
    assert after.shape[-1] == (128 if times == 1 else 256)
    np.testing.assert_array_equal(after[..., :120], before[..., :120])
    assert (after[..., 120 : larger.vocab_size] > -1e3).all()
    assert (after[..., larger.vocab_size :] < -1e29).all()


@pytest.mark.parametrize("how", ["mean", "pieces"])
def test_new_rows(one_device, how):
    _, params = initialize(UNTIED, training_layout(), jax.random.key(1))
    larger, extended = extend_vocabulary(UNTIED, params, PIECES, how)
    for name in ("embedding", "head"):
        old = np.asarray(params[name]["table"])
        new = np.asarray(extended[name]["table"])
        np.testing.assert_array_equal(new[:120], old[:120])
        for row, pieces in zip(new[120:124], PIECES):
            used = pieces if pieces and how == "pieces" else range(120)
            wanted = sum(old[piece].astype(np.float64) for piece in used) / len(used)
            np.testing.assert_allclose(row, wanted, rtol=1e-5, atol=1e-8)
        assert not new[124:].any()
    same = {"embedding", "head"}
    assert all(extended[name] is params[name] for name in params.keys() - same)
    tokens = np.where(TOKENS < 60, TOKENS, 120 + TOKENS % 4).astype(np.int32)
    assert np.isfinite(logits(larger, extended, tokens)).all()


def test_on_a_mesh_the_tables_stay_cut():
    mesh = Mesh(fsdp=2, tensor=2).build(jax.devices()[:4])
    with jax.set_mesh(mesh):
        layout = training_layout()
        _, params = initialize(UNTIED, layout, jax.random.key(1))
        larger, extended = extend_vocabulary(UNTIED, params, PIECES * 5)
        _, fresh = initialize(larger, layout, jax.random.key(2))
        on_mesh = jax.tree.map(np.asarray, extended)
        assert jax.tree.map(jax.typeof, extended) == jax.tree.map(jax.typeof, fresh)
        params = jax.tree.map(np.asarray, params)
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        spread = jax.tree.map(
            lambda leaf, like: jax.device_put(leaf, like.sharding),
            params,
            initialize(UNTIED, training_layout(), jax.random.key(1))[1],
        )
        _, alone = extend_vocabulary(UNTIED, spread, PIECES * 5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), on_mesh, alone
        )


def test_nothing_new_and_mistakes(one_device):
    _, params = initialize(TIED, training_layout(), jax.random.key(1))
    same, extended = extend_vocabulary(TIED, params, [])
    assert same == TIED
    np.testing.assert_array_equal(
        extended["embedding"]["table"][:120], params["embedding"]["table"][:120]
    )
    with pytest.raises(UserError, match=r"old_pieces\[1\] names token 120"):
        extend_vocabulary(TIED, params, [[1], [2, 120]])
    with pytest.raises(UserError, match="128 rows; by the config it should have 256"):
        extend_vocabulary(replace(TIED, vocab_size=200), params, [[1]])


def test_biases_of_the_head_grow_with_it():
    """Each new token's is the mean of its pieces', or of all, on a mesh that cuts them."""
    with jax.set_mesh(Mesh(fsdp=2, tensor=2).build(jax.devices()[:4])):
        _, params = initialize(BIASED, training_layout(), jax.random.key(1))
        old = np.linspace(-1, 1, 128).astype(np.float32)
        spec = params["head_bias"].sharding
        params["head_bias"] = jax.device_put(old, spec)
        _, extended = extend_vocabulary(BIASED, params, PIECES * 5)
        new = extended["head_bias"]
        assert new.shape == (256,) and new.sharding.spec == spec.spec
        new = np.asarray(new)
    expected = [old[pieces].mean() if pieces else old[:120].mean() for pieces in PIECES] * 5
    np.testing.assert_allclose(new[:120], old[:120], rtol=0)
    np.testing.assert_allclose(new[120:140], expected, rtol=0, atol=1e-6)
    assert (new[140:] == 0).all()
