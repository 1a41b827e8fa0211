"""Pruned models: zeros through the layers, and smaller models beside the large one with zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from lmjax.compression.calibration import batches_of, stacks_of, walk
from lmjax.compression.importance import layer_influence
from lmjax.compression.methods import matrix_of
from lmjax.compression.pruner import Pruner
from lmjax.compression.shrinking import Shrinker, laid_out
from lmjax.compression.sparsity import Sparsity, wanda
from lmjax.config import UserError, replace
from lmjax.models import (
    ExpertChoiceRouter,
    ExpertsConfig,
    GatedFeedForwardConfig,
    abstract,
)
from lmjax.models.experts import Experts
from lmjax.models.positions import ALiBi, RelativeBuckets, alibi_slopes
from lmjax.parallel import Mesh, training_layout
from lmjax.training.zeros import share_of_zeros
from tests.lmjax.compression.test_methods import (
    FALCON,
    LLAMA,
    QUIET,
    ROWS,
    T5,
    drawn,
    logits,
    program,
)

# Four layers whose windows alternate, heads in groups of two.
DEEP = replace(
    LLAMA,
    num_layers=4,
    attention=replace(LLAMA.attention, windows=(4, None)),
)
DEEP_T5 = replace(T5, num_layers=2, encoder_layers=2)
EXPERTS = replace(LLAMA, num_layers=1, feed_forward=ExpertsConfig(size=32, experts=4))
PAIRS = replace(
    EXPERTS, num_layers=2, alternate_feed_forward=GatedFeedForwardConfig(size=64), unroll=2
)
HALF = Sparsity.of(0.5, None)


@pytest.fixture(scope="module", autouse=True)
def one_mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


def flat(params):
    return traverse_util.flatten_dict(jax.device_get(params), sep=".")


@pytest.mark.parametrize(
    ("model", "method"),
    [
        (LLAMA, "magnitude"),
        (FALCON, "wanda"),
        (LLAMA, "sparsegpt"),
        (T5, "sparsegpt"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
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


# Positions tell heads apart: slopes, and a table of buckets in each of two stacks.
SLOPES = replace(FALCON, attention=replace(FALCON.attention, positions=ALiBi()))
BUCKETS = RelativeBuckets(buckets=8, max_distance=16)
BUCKETS = replace(DEEP_T5, attention=replace(T5.attention, positions=BUCKETS))


@pytest.mark.parametrize("model", [SLOPES, BUCKETS], ids=["slopes", "buckets"])
def test_heads_that_positions_tell_apart_stay_in_all_layers_of_a_stack(model):
    """With their slopes or buckets, so that logits are those with the others zeroed. To 1e-5."""
    params = drawn(model)
    small, config = Shrinker(None, 3, None, ROWS, **QUIET)(model, params)
    shapes_fit(config, small)
    zeroed, after, kept = flat(params), flat(small), {}
    for path, leaf in zeroed.items():
        if path.endswith("attention.output.weight"):  # layers, heads, head_dim, embed
            same = (leaf[:, :, None] == after[path][:, None]).all(axis=(-2, -1)).any(axis=2)
            assert (same.sum(axis=1) == 3).all()
            zeroed[path], kept[path] = leaf * same[..., None, None], same
            assert "cross" in path or (same == same[0]).all()
    zeroed = jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(zeroed, sep="."))
    expected = logits(model, zeroed)
    np.testing.assert_allclose(logits(config, small), expected, rtol=0, atol=1e-5)
    if model is SLOPES:
        (same,), slopes = kept.values(), alibi_slopes(8)
        assert config.attention.positions.slopes == tuple(slopes[same[0]].tolist())
        each = contributions(model, params, ("attention", "output"), model.attention.head_dim)
        shares = (each / each.sum(axis=1, keepdims=True)).sum(axis=0)
        assert shares[same[0]].min() > shares[~same[0]].max()


def test_logits_without_columns_are_those_of_the_model_with_them_zeroed():
    """A quarter of the columns stays. To 1e-5."""
    model = FALCON
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
    influence = layer_influence(DEEP, params, ROWS, stacks_of(DEEP)[0])
    np.testing.assert_allclose(influence[[1, 3]], 0, rtol=0, atol=1e-6)
    assert (influence[[0, 2]] > 1e-3).all()
    small, config = Shrinker(2, None, None, ROWS, **QUIET)(DEEP, params)
    shapes_fit(config, small)
    assert config.windows == (4, 4)
    np.testing.assert_allclose(logits(config, small), logits(DEEP, params), rtol=0, atol=1e-5)


def silenced(params, model):
    """The parameters without what half of all heads and columns add, others in each layer, and
    without what the second layer of each stack adds, where stacks have an entry for each layer."""
    rng, found = np.random.default_rng(3), traverse_util.flatten_dict(jax.device_get(params))
    together = Shrinker.together(model.attention)
    for path, leaf in found.items():
        if path[-2:] == ("output", "weight"):  # layers, heads, head_dim, embed
            parts, axis, size = leaf.shape[1] // together, 1, together
        elif path[-2:] == ("down", "weight"):  # layers, perhaps experts, columns, embed
            parts, axis, size = leaf.shape[-2], leaf.ndim - 2, 1
        else:
            continue
        mask = np.ones((*leaf.shape[:axis], parts))
        mask[..., : parts // 2] = 0
        mask = np.repeat(rng.permuted(mask, axis=-1), size, axis=-1)
        mask = mask.reshape(*mask.shape, *(1,) * (leaf.ndim - mask.ndim))
        if model.group == 1 and len(leaf) > 1:
            mask[1] = 0
        found[path] = (leaf * mask).astype(np.float32)
    return jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(found))


@pytest.mark.parametrize(
    ("model", "numbers"),
    [
        (DEEP_T5, {"layers": 1, "encoder_layers": 1, "heads": 4, "width": 32}),
        (EXPERTS, {"heads": 4, "width": 16}),
        pytest.param(PAIRS, {"heads": 4}, marks=pytest.mark.slow),
    ],
    ids=["t5", "experts", "pairs"],
)
def test_parts_that_add_nothing_go_and_logits_stay(model, numbers):
    """In an encoder and its decoder, in every expert, and in layers of two kinds. To 1e-5."""
    params = silenced(drawn(model), model)
    shrink = Shrinker(**dict.fromkeys(("layers", "heads", "width")) | numbers, rows=ROWS, **QUIET)
    small, config = shrink(model, params)
    shapes_fit(config, small)
    assert config.attention.num_heads == 4
    if model is DEEP_T5:
        assert (config.num_layers, config.encoder_layers) == (1, 1)
    np.testing.assert_allclose(logits(config, small), logits(model, params), rtol=0, atol=1e-5)


def test_experts_with_the_most_tokens_stay(monkeypatch):
    """Loads counted from the router's logits; the rest answers as if no token could choose those
    that went. To 1e-5."""
    params, rows, seen = drawn(EXPERTS), ROWS[:8], []
    small, config = Shrinker(None, None, None, rows, experts=2, **QUIET)(EXPERTS, params)
    shapes_fit(config, small)
    own, penalty = Experts.logits, np.zeros(4, np.float32)
    graph = abstract(replace(EXPERTS, unroll=0), training_layout())[0]
    (batch,) = batches_of(EXPERTS, rows)

    def noted(layer, x, key):
        seen.append(own(layer, x, key) + penalty)
        return seen[-1]

    @jax.jit
    def router_logits(params, batch):
        nnx.merge(graph, params)(batch)
        return seen[-1]

    monkeypatch.setattr(Experts, "logits", noted)
    chosen = np.argsort(-np.asarray(router_logits(params, batch)), axis=-1)[..., :2]
    load = np.bincount(chosen.reshape(-1), minlength=4)
    gone = np.argsort(load)[:2]
    assert load[gone].max() < np.sort(load)[2]
    router = params["blocks"]["feed_forward"]["router"]["weight"]
    np.testing.assert_array_equal(
        small["blocks"]["feed_forward"]["router"]["weight"], np.delete(router, gone, axis=2)
    )
    penalty[gone] = -1e9
    program.cache_clear()  # of programs without the penalty
    expected = logits(EXPERTS, params)
    monkeypatch.undo()
    program.cache_clear()
    np.testing.assert_allclose(logits(config, small), expected, rtol=0, atol=1e-5)


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
    np.testing.assert_allclose(
        layer_influence(LLAMA, params, ROWS, stacks_of(LLAMA)[0])[-1], expected, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("model", "numbers", "message"),
    [
        (LLAMA, {"layers": 3}, "layers=3: the model has 2, of which 1 to 2 can stay"),
        (LLAMA, {"layers": 0}, "layers=0: the model has 2"),
        (LLAMA, {"heads": 3}, "heads=3: they go by"),
        (LLAMA, {"width": 100}, "width=100: the model has 64"),
        (LLAMA, {"encoder_layers": 1}, "encoder_layers=1: the model has no encoder"),
        (T5, {"encoder_layers": 2}, "encoder_layers=2: the model has 1"),
        (LLAMA, {"experts": 2}, "experts=2: the model has no experts that tokens choose"),
        (EXPERTS, {"experts": 1}, "TopKRouter takes 2 for a token"),
        (PAIRS, {"width": 16}, "width=16: the model has layers of two kinds"),
        (
            replace(EXPERTS, feed_forward=ExpertsConfig(size=32, router=ExpertChoiceRouter())),
            {"width": 16},
            "width=16: with ExpertChoiceRouter no columns can be left out",
        ),
        (
            replace(T5, attention=replace(T5.attention, positions=ALiBi())),
            {"heads": 4},
            "heads=4: the model has ALiBi, of which no heads can be left out",
        ),
    ],
)
def test_parts_that_cannot_be_left_out_are_refused(model, numbers, message):
    with pytest.raises(UserError, match=message):
        every = dict.fromkeys(("layers", "heads", "width")) | numbers
        Shrinker(**every, rows=ROWS, **QUIET)(model, {})


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
