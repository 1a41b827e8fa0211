"""XLNet against transformers: one stream and two, and what a predicted place does not see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax.config import replace
from lmjax.interop import huggingface
from lmjax.models import abstract, make_cache, plain_batch
from lmjax.parallel import Mesh, training_layout
from tests.parity_cases import parity_folder

CALLS = ("plain", "padding", "permutation", "partial")


def one():
    return Mesh(fsdp=1).build(jax.devices()[:1])


def batch_of(arrays, call):
    """A call of the case."""
    tokens = arrays[f"{call}.tokens"]
    return dataclasses.replace(
        plain_batch(tokens),
        segments=arrays.get(f"{call}.mask", np.ones_like(tokens)),
        token_types=arrays.get(f"{call}.segments"),
        ranks=arrays.get(f"{call}.ranks"),
    )


def on_mesh(layout, batch):
    """The batch as training lays it out."""

    def put(a):
        return jax.device_put(a, layout.spec("batch", "seq", shape=a.shape))

    return jax.tree.map(put, batch)


def run(graph, params, batch):
    model = nnx.merge(graph, params)
    return model.logits(model(batch)[0])


def check(mesh, calls=CALLS, **changes):
    """2e-5 on logits of about 2; the reference differs from its own float64 by 2e-6.

    Not compared are padding and, of the second stream, those of the lowest rank: they see no token
    here and the mean of all tokens there.
    """
    folder, layout = parity_folder("xlnet"), training_layout()
    arrays = np.load(folder / "case.npz")
    with jax.set_mesh(mesh):
        config, _, params = huggingface.read(folder, layout)
        graph, _ = abstract(replace(config, **changes), layout)
        for call in calls:
            batch = batch_of(arrays, call)
            logits = jax.jit(run, static_argnums=0)(graph, params, on_mesh(layout, batch))
            compared = batch.segments > 0
            if batch.ranks is not None:
                compared &= batch.ranks > batch.ranks.min(axis=1, keepdims=True)
            np.testing.assert_allclose(
                np.asarray(logits)[..., :61][compared],
                arrays[f"{call}.logits"][compared],
                rtol=0,
                atol=2e-5,
                err_msg=call,
            )


def test_logits():
    check(one())


def test_logits_on_a_mesh():
    check(Mesh(fsdp=2, tensor=2, context=2).build(), ("padding", "permutation"))


def test_layers_in_a_python_loop():
    check(one(), ("permutation",), unroll=0)


def test_nothing_leaks(one_device):
    """Gradients of exactly zero but from tokens of lower ranks; rank 0 sees nothing at all.

    Two documents in one row; the first has a context that every one of its places sees.
    """
    folder = parity_folder("xlnet")
    _, graph, params = huggingface.read(folder, training_layout())
    tokens = np.arange(10, dtype=np.int32)[None]
    segments = np.array([[1] * 6 + [2] * 4], np.int32)
    ranks = np.array([[0, 2, 1, 0, 3, 0, 2, 4, 1, 3]], np.int32)
    batch = dataclasses.replace(plain_batch(tokens), segments=segments, ranks=ranks)
    batch = jax.tree.map(jnp.asarray, batch)

    def outputs(embedded):
        model = nnx.merge(graph, params)
        model.embed = lambda batch, key=None: embedded
        return jnp.sum(jnp.sin(model(batch)[0][0]), axis=-1)

    embedded = nnx.merge(graph, params).embed(batch)
    found = np.asarray(jax.jit(jax.jacrev(outputs))(embedded))[:, 0]
    expected = (segments[0][:, None] == segments[0]) & (ranks[0] < ranks[0][:, None])
    np.testing.assert_array_equal(np.abs(found).max(-1) != 0, expected)


def test_remat_gives_the_same_gradients(one_device):
    """1e-5 relative: the same sums, fused otherwise. Every parameter has a part."""
    folder = parity_folder("xlnet")
    config, _, params = huggingface.read(folder, training_layout())
    batch = batch_of(np.load(folder / "case.npz"), "permutation")

    def gradient(config):
        graph, _ = abstract(config, training_layout())

        def loss(params):
            return jnp.sum(jnp.sin(run(graph, params, batch)[..., :61]))

        return jax.jit(jax.grad(loss))(params)

    expected = gradient(config)
    for path, leaf in jax.tree.leaves_with_path(expected):
        assert np.abs(np.asarray(leaf)).max() > 0, jax.tree_util.keystr(path)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4),
        gradient(replace(config, remat="full")),
        expected,
    )


def test_it_has_no_cache(one_device):
    config, graph, params = huggingface.read(parity_folder("xlnet"), training_layout())
    cache = make_cache(config, training_layout(), 1, 4)
    with pytest.raises(ValueError, match="it has no cache"):
        nnx.merge(graph, params)(plain_batch(np.zeros((1, 4), np.int32)), cache)
