"""Pruned models: zeros through the layers, and smaller models beside the large one with zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lmjax.compression.calibration import batches_of, stacks_of, walk
from lmjax.compression.methods import matrix_of
from lmjax.compression.pruner import Pruner
from lmjax.compression.shrinking import Shrinker, laid_out, layer_influence
from lmjax.compression.sparsity import Sparsity, wanda
from lmjax.config import UserError, replace
from lmjax.models import abstract
from lmjax.models.positions import ALiBi
from lmjax.parallel import Mesh, training_layout
from lmjax.training.zeros import share_of_zeros
from tests.lmjax.compression.test_methods import FALCON, LLAMA, QUIET, ROWS, T5, drawn, logits

# Four layers whose windows alternate, heads in groups of two.
DEEP = replace(
    LLAMA,
    num_layers=4,
    attention=replace(LLAMA.attention, windows=(4, None)),
)
HALF = Sparsity.of(0.5, None)


@pytest.fixture(scope="module", autouse=True)
def one_mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


def flat(params):
    return traverse_util.flatten_dict(jax.device_get(params), sep=".")


@pytest.mark.parametrize("model", [LLAMA, FALCON, T5], ids=["llama", "falcon", "t5"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_half_of_every_dense_layer_is_zero(model, method):
    """Of weights of blocks alone; norms, biases and tables stay as they were."""
    params = drawn(model)
    found = Pruner(method, HALF, ROWS, **QUIET)(model, params)
    assert abs(share_of_zeros(found) - 0.5) < 0.01
    before, after = flat(params), flat(found)
    for path, leaf in after.items():
        if ".blocks." in f".{path}" and path.endswith(".weight"):
            shares = np.mean(leaf == 0, axis=tuple(range(1, leaf.ndim)))
            np.testing.assert_allclose(shares, 0.5, rtol=0, atol=0.02)
        else:
            np.testing.assert_array_equal(leaf, before[path])


def test_later_layers_are_calibrated_on_what_pruned_ones_give():
    """The second layer's queries by Wanda from inputs that the pruned first layer makes."""
    params = drawn(LLAMA)
    found = Pruner("wanda", HALF, ROWS, **QUIET)(LLAMA, params)
    seen = {}
    blocks = {
        path: leaf.at[1].set(traverse_util.flatten_dict(params["blocks"])[path][1])
        for path, leaf in traverse_util.flatten_dict(found["blocks"]).items()
    }
    half = found | {"blocks": traverse_util.unflatten_dict(blocks)}
    batches = list(batches_of(LLAMA, ROWS))
    walk(LLAMA, half, stacks_of(LLAMA)[0], batches, lambda entry, m: seen.update({entry: m}))
    path = "attention", "query"
    second = jax.tree.map(lambda a: a[1], params["blocks"])
    expected = wanda(matrix_of(second, path), seen[1][path].second, HALF)
    pruned = jax.tree.map(lambda a: a[1], found["blocks"])
    np.testing.assert_allclose(matrix_of(pruned, path), expected, rtol=1e-6)


def test_methods_that_calibrate_come_nearer():
    """Errors of the logits with half of the weights: SparseGPT, Wanda, magnitude in this order."""
    params = drawn(LLAMA)
    expected, errors = logits(LLAMA, params), []
    for method in ("sparsegpt", "wanda", "magnitude"):
        found = Pruner(method, HALF, ROWS, **QUIET)(LLAMA, params)
        errors.append(np.sqrt(np.mean(np.square(logits(LLAMA, found) - expected))))
    assert errors == sorted(errors)


def test_only_layers_that_are_named_get_zeros():
    params = drawn(LLAMA)
    sparsity = Sparsity.of(None, "2:4")
    found = flat(
        Pruner("magnitude", sparsity, matrices=("feed_forward.*",), **QUIET)(LLAMA, params)
    )
    zeros = {path for path, leaf in found.items() if path.endswith("weight") and (leaf == 0).any()}
    assert zeros == {f"blocks.feed_forward.{name}.weight" for name in ("gate", "up", "down")}
    up = found["blocks.feed_forward.up.weight"]
    layers, inputs, outputs = up.shape
    counts = np.count_nonzero(up.reshape(layers, inputs // 4, 4, outputs), axis=2)
    assert (counts == 2).all()


def shapes_fit(config, params):
    wanted = abstract(config, training_layout())[1]
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, wanted)


def contributions(model, params, path, size):
    """What parts of a layer's inputs add, in each layer: over rows, each part multiplied apart."""
    found = []

    def note(entry, moments):
        own = jax.tree.map(lambda a: a[entry], params["blocks"])
        weight, second = matrix_of(own, path), moments[path].second
        parts = np.split(np.arange(len(weight)), len(weight) // size)
        found.append([np.trace(weight[p].T @ second[np.ix_(p, p)] @ weight[p]) for p in parts])

    walk(model, params, stacks_of(model)[0], list(batches_of(model, ROWS)), note)
    return np.array(found)


MULTI_QUERY = replace(LLAMA, attention=replace(LLAMA.attention, num_kv_heads=1))


@pytest.mark.parametrize("model", [FALCON, LLAMA, MULTI_QUERY], ids=["all", "groups", "one key"])
def test_logits_without_heads_are_those_of_the_model_with_them_zeroed(model):
    """Half of the heads, those that add least; where keys are shared, whole groups. To 1e-5."""
    params, heads = drawn(model), model.attention.num_heads
    small, config = Shrinker(None, heads // 2, None, ROWS, **QUIET)(model, params)
    kv_heads = model.attention.kv_heads
    assert config.attention.num_heads == heads // 2
    assert config.attention.kv_heads == max(1, kv_heads // 2)
    shapes_fit(config, small)
    each = contributions(model, params, ("attention", "output"), model.attention.head_dim)
    together = 1 if kv_heads == 1 else heads // kv_heads
    groups = each.reshape(len(each), -1, together).sum(axis=-1)
    gone = groups < np.median(groups, axis=1, keepdims=True)
    mask = np.repeat(~gone, together, axis=1)[:, :, None, None]
    output = params["blocks"]["attention"]["output"]
    zeroed = output | {"weight": output["weight"] * mask}
    blocks = params["blocks"] | {"attention": params["blocks"]["attention"] | {"output": zeroed}}
    expected = logits(model, params | {"blocks": blocks})
    np.testing.assert_allclose(logits(config, small), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", [FALCON, LLAMA], ids=["plain", "gated"])
def test_logits_without_columns_are_those_of_the_model_with_them_zeroed(model):
    """A quarter of the columns stays. To 1e-5."""
    params, size = drawn(model), model.feed_forward.size
    small, config = Shrinker(None, None, size // 4, ROWS, **QUIET)(model, params)
    assert config.feed_forward.size == size // 4
    shapes_fit(config, small)
    each = contributions(model, params, ("feed_forward", "down"), 1)
    mask = each >= np.sort(each, axis=1)[:, -size // 4, None]
    down = params["blocks"]["feed_forward"]["down"]
    zeroed = down | {"weight": down["weight"] * mask[..., None]}
    layer = params["blocks"]["feed_forward"] | {"down": zeroed}
    expected = logits(model, params | {"blocks": params["blocks"] | {"feed_forward": layer}})
    np.testing.assert_allclose(logits(config, small), expected, rtol=0, atol=1e-5)


def test_logits_without_layers_are_those_of_the_model_that_skips_them():
    """Layers that add nothing turn nothing, so that they go; windows of the others stay theirs."""
    params = drawn(DEEP)
    silent = np.array([1.0, 0.0, 1.0, 0.0]).reshape(-1, 1, 1, 1)
    path = {("attention", "output", "weight"), ("feed_forward", "down", "weight")}
    blocks = {
        name: leaf * silent.reshape(-1, *(1,) * (leaf.ndim - 1)) if name in path else leaf
        for name, leaf in traverse_util.flatten_dict(params["blocks"]).items()
    }
    params = params | {"blocks": traverse_util.unflatten_dict(blocks)}
    influence = layer_influence(DEEP, params, ROWS)
    np.testing.assert_allclose(influence[[1, 3]], 0, rtol=0, atol=1e-6)
    assert (influence[[0, 2]] > 1e-3).all()
    small, config = Shrinker(2, None, None, ROWS, **QUIET)(DEEP, params)
    shapes_fit(config, small)
    assert config.windows == (4, 4)
    np.testing.assert_allclose(logits(config, small), logits(DEEP, params), rtol=0, atol=1e-5)


def test_influence_is_the_cosine_of_states():
    """Of the last layer, from hidden states of the model cut off before and after it."""
    params = drawn(LLAMA)
    states = []
    walk(
        LLAMA,
        params,
        stacks_of(LLAMA)[0],
        list(batches_of(LLAMA, ROWS)),
        lambda *_: None,
        see=lambda entry, x, y: states.append((entry, np.asarray(x), np.asarray(y))),
    )
    last = [(x, y) for entry, x, y in states if entry == LLAMA.num_layers - 1]
    x, y = (np.concatenate(parts).astype(np.float64) for parts in zip(*last, strict=True))
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    expected = 1 - np.mean(np.sum(x * y, axis=-1) / norms)
    np.testing.assert_allclose(layer_influence(LLAMA, params, ROWS)[-1], expected, rtol=1e-5)


def test_all_at_once_give_a_smaller_ordinary_model():
    params = drawn(DEEP)
    small, config = Shrinker(3, 4, 16, ROWS, **QUIET)(DEEP, params)
    shapes_fit(config, small)
    assert (config.num_layers, config.attention.num_heads, config.feed_forward.size) == (3, 4, 16)
    assert np.isfinite(logits(config, small)).all()


@pytest.mark.parametrize(
    ("model", "numbers", "message"),
    [
        (LLAMA, (3, None, None), "layers=3: the model has 2, of which 1 to 2 can stay"),
        (LLAMA, (0, None, None), "layers=0: the model has 2"),
        (LLAMA, (None, 3, None), "heads=3: they go by"),
        (LLAMA, (None, None, 100), "width=100: the model has 64"),
        (T5, (None, None, 8), "a model with an encoder and a decoder is not cut"),
        (
            replace(FALCON, attention=replace(FALCON.attention, positions=ALiBi())),
            (None, 4, None),
            "heads=4: the model has ALiBi, of which no heads can be left out",
        ),
    ],
)
def test_parts_that_cannot_be_left_out_are_refused(model, numbers, message):
    with pytest.raises(UserError, match=message):
        Shrinker(*numbers, ROWS, **QUIET)(model, {})


def test_what_a_method_lacks_is_said():
    with pytest.raises(UserError, match="method=wanda needs texts: give calibration=FILE"):
        Pruner("wanda", HALF)(LLAMA, {})
    with pytest.raises(UserError, match="measured on texts: give calibration=FILE"):
        Shrinker(1, None, None, None)(LLAMA, {})
    with pytest.raises(UserError, match="matrices: 'router' is for no dense layer; there are"):
        Pruner("magnitude", HALF, matrices=("router",))(LLAMA, drawn(LLAMA))


def test_eight_devices_prune_as_one():
    """Moments in another order: weights to 1e-5, zeros the same but for near ties."""
    params = jax.device_get(drawn(FALCON))
    one = flat(Pruner("sparsegpt", HALF, ROWS, **QUIET)(FALCON, jax.tree.map(jnp.asarray, params)))
    with jax.set_mesh(Mesh(fsdp=4, tensor=2).build()):
        many = Pruner("sparsegpt", HALF, ROWS, **QUIET)(FALCON, laid_out(params, FALCON))
        small, config = Shrinker(1, 4, 32, ROWS, **QUIET)(FALCON, laid_out(params, FALCON))
        shapes_fit(config, small)
        small, many = flat(small), flat(many)
    other, _ = Shrinker(1, 4, 32, ROWS, **QUIET)(FALCON, jax.tree.map(jnp.asarray, params))
    for path, leaf in flat(other).items():
        np.testing.assert_array_equal(small[path], leaf)
    for path, leaf in one.items():
        assert np.mean((leaf == 0) == (many[path] == 0)) > 0.99
