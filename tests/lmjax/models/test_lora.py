"""Adapters: y = W x + scale B A x by numpy, how they begin, dropout, meshes, decoding, merging."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from lmjax.config import UserError, replace
from lmjax.generation import Generator, Sampling
from lmjax.models import (
    AttentionConfig,
    EncoderDecoderConfig,
    GatedFeedForwardConfig,
    LoRA,
    RMSNormConfig,
    Rotary,
    TransformerConfig,
    abstract,
    initialize,
    merge_adapters,
    plain_batch,
    xlnet,
)
from lmjax.models.linear import Builder
from lmjax.models.lora import Adapter, dense_layers, give_keys
from lmjax.parallel import Mesh, training_layout
from lmjax.scaling.flops import parameters
from tests.larger import larger
from tests.lmjax.models.adapted import with_random_b
from tests.whole_logits import logits_of_config

BASE = TransformerConfig(
    vocab_size=97,
    hidden=32,
    num_layers=2,
    max_length=16,
    attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=4, positions=Rotary()),
    feed_forward=GatedFeedForwardConfig(size=64),
    norm=RMSNormConfig(),
    positions=None,
)
ALL = LoRA(rank=3, alpha=7.0, layers=("*",))
MODEL = replace(BASE, lora=ALL)
TOKENS = np.random.default_rng(0).integers(0, 97, (8, 16)).astype(np.int32)


def logits(config, params, tokens=TOKENS, key=None):
    """Of the whole vocabulary, in numpy, on the mesh that is set."""
    return logits_of_config(config, params, plain_batch(tokens), key)


def flat(params):
    return traverse_util.flatten_dict(jax.device_get(params), sep=".")


def merged_by_numpy(params, scale):
    """W + scale A B, layer by layer."""
    params, found = flat(params), {}
    for path, leaf in params.items():
        if ".adapter." in path:
            continue
        layer = path.removesuffix("weight") + "adapter."
        if f"{layer}a.weight" in params:
            a, b = params[f"{layer}a.weight"], params[f"{layer}b.weight"]
            added = [
                (a[n].reshape(-1, a.shape[-1]) @ b[n].reshape(len(b[n]), -1)).reshape(leaf[n].shape)
                for n in range(len(leaf))
            ]
            leaf = leaf + np.float32(scale) * np.stack(added)
        found[path] = leaf
    return traverse_util.unflatten_dict(found, sep=".")


@pytest.mark.parametrize("stable", [False, True])
def test_logits_are_those_of_w_plus_scaled_b_a(one_device, stable):
    """1e-5 of logits of up to 1: two products are added in another order."""
    config = replace(MODEL, lora=replace(ALL, rank_stabilised=stable))
    params = with_random_b(initialize(config, training_layout(), jax.random.key(0))[1])
    scale = 7 / math.sqrt(3) if stable else 7 / 3
    expected = merged_by_numpy(params, scale)
    found = logits(config, params)
    assert np.abs(found - logits(BASE, merged_by_numpy(params, 0))).max() > 1e-2
    np.testing.assert_allclose(found, logits(BASE, expected), rtol=0, atol=1e-5)
    merged, without = merge_adapters(params, config)
    assert without == BASE
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, expected)
    assert merge_adapters(merged, without) == (merged, without)


def test_the_head_of_words_has_an_adapter_too(one_device):
    """W + scale (A B)^T of its table; 1e-5 of logits of up to 1: another order of sums."""
    config = replace(BASE, tied_head=False, lora=LoRA(rank=3, alpha=7.0, layers=("query", "head")))
    params = with_random_b(initialize(config, training_layout(), jax.random.key(0))[1])
    leaves = flat(params)
    a, b = (leaves[f"head.adapter.{part}.weight"] for part in "ab")
    merged, without = merge_adapters(params, config)
    expected = leaves["head.table"] + np.float32(7 / 3) * (a @ b).T
    np.testing.assert_allclose(flat(merged)["head.table"], expected, rtol=0, atol=1e-6)
    assert without == replace(config, lora=None) and not any("adapter" in p for p in flat(merged))
    found = logits(config, params)
    np.testing.assert_allclose(found, logits(without, merged), rtol=0, atol=1e-5)
    of_blocks = merged | {"head": {"table": params["head"]["table"]}}
    assert np.abs(found - logits(without, of_blocks)).max() > 1e-2
    sizes = {".".join(p.path): p.shape for p in parameters(config)}
    assert sizes["head.adapter.a.weight"] == (32, 3) and sizes["head.adapter.b.weight"] == (3, 97)
    with pytest.raises(UserError, match="no head of words that is a table of its own"):
        abstract(replace(BASE, lora=LoRA(layers=("head",))), training_layout())


def test_it_begins_as_the_model_without(one_device):
    """The same bits of parameters and of logits; A within 1 / sqrt(inputs), evenly."""
    _, base = initialize(BASE, training_layout(), jax.random.key(0))
    _, params = initialize(MODEL, training_layout(), jax.random.key(0))
    np.testing.assert_array_equal(logits(MODEL, params), logits(BASE, base))
    adapters = {path: leaf for path, leaf in flat(params).items() if ".adapter." in path}
    assert flat(params).keys() - adapters.keys() == flat(base).keys()
    for path, leaf in flat(base).items():
        np.testing.assert_array_equal(flat(params)[path], leaf)
    assert len(adapters) == 2 * 7
    for path, leaf in adapters.items():
        assert leaf.dtype == np.float32
        if ".b." in path:
            assert not leaf.any()
        else:
            bound = 1 / math.sqrt(64 if "down" in path else 32)
            assert 0.8 * bound < np.abs(leaf).max() <= bound
            np.testing.assert_allclose(leaf.std(), bound / math.sqrt(3), rtol=0.15)
            assert not np.array_equal(leaf[0], leaf[1])


def test_only_named_layers_have_adapters():
    def adapted(*layers):
        with jax.sharding.use_abstract_mesh(Mesh(fsdp=1).abstract(1)):
            _, shapes = abstract(replace(BASE, lora=LoRA(layers=layers)), training_layout())
        paths = traverse_util.flatten_dict(shapes, sep=".")
        return {
            p.partition(".adapter.")[0].removeprefix("blocks.") for p in paths if "adapter" in p
        }

    assert adapted("query", "value") == {"attention.query", "attention.value"}
    assert adapted("feed_forward.*") == {f"feed_forward.{name}" for name in ("gate", "up", "down")}
    assert adapted("blocks.attention.output") == {"attention.output"}
    with pytest.raises(UserError, match=r"'querry' is for no dense layer .* attention\.query"):
        adapted("value", "querry")


@pytest.mark.parametrize(
    "wrong", [dict(rank=0), dict(alpha=0.0), dict(dropout=1.0), dict(layers=())]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=f"lora.{next(iter(wrong))}"):
        LoRA(**wrong)


def test_any_mesh_gives_the_logits_of_one_device():
    """1e-5 of logits of up to 1: sums in another order; merged, on the mesh."""
    found = []
    for mesh in (Mesh(fsdp=2, context=2, tensor=2), Mesh(fsdp=1)):
        devices = mesh.fsdp * mesh.context * mesh.tensor
        with jax.set_mesh(mesh.build(jax.devices()[:devices])):
            params = with_random_b(initialize(MODEL, training_layout(), jax.random.key(0))[1])
            found.append(logits(MODEL, params))
            if len(found) == 1:
                merged, without = merge_adapters(params, MODEL)
                np.testing.assert_allclose(logits(without, merged), found[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


def test_gradients_do_not_depend_on_how_blocks_are_run(one_device):
    """1e-5 of the largest; with dropout, whose masks are drawn again where backward recomputes."""

    def gradients(config):
        graph, _ = abstract(config, training_layout())

        def loss(params):
            model = nnx.merge(graph, params)
            hidden, _ = model(plain_batch(TOKENS), key=jax.random.key(1))
            return jnp.mean(jnp.square(model.logits(hidden)[..., :97]))

        return jax.device_get(jax.jit(jax.grad(loss))(params))

    config = replace(MODEL, lora=replace(ALL, dropout=0.3))
    params = with_random_b(initialize(config, training_layout(), jax.random.key(0))[1])
    expected = gradients(config)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest),
        gradients(replace(config, remat="dots", unroll=0)),
        expected,
    )


def test_dropout_is_of_the_adapters_input_alone(one_device):
    config = replace(MODEL, lora=replace(ALL, dropout=0.5))
    _, params = initialize(config, training_layout(), jax.random.key(0))
    # B is zero: whatever is dropped before it changes nothing.
    np.testing.assert_array_equal(
        logits(config, params, key=jax.random.key(1)), logits(config, params)
    )
    params = with_random_b(params)
    one, same, other = (logits(config, params, key=jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-2
    without = replace(config, lora=ALL)
    np.testing.assert_array_equal(logits(config, params), logits(without, params))


def test_dropout_keeps_the_expected_output(one_device):
    """Of 1,000 rows that are alike the mean is within 5 standard errors of what nothing drops."""
    builder = Builder(16, 1, BASE.initializer, "float32", training_layout(), nnx.Rngs(0))
    layer = builder.linear((("embed", 16),), (("mlp", 4),), bias=False)
    adapter = Adapter(LoRA(rank=2, alpha=3.0, dropout=0.25), layer.inputs, layer.outputs, builder)
    adapter.b.weight[...] = jnp.ones((2, 4))
    x = jnp.broadcast_to(jnp.arange(1.0, 17.0), (1, 1000, 16))
    whole = np.asarray(adapter(x))[0, 0]
    adapter.key = jax.random.key(3)
    rows = np.asarray(adapter(x))[0]
    assert rows.std(axis=0).min() > 0
    error = rows.std(axis=0) / math.sqrt(1000)
    assert np.all(np.abs(rows.mean(axis=0) - whole) < 5 * error)


def test_each_adapter_has_a_key_of_its_own(one_device):
    config = replace(MODEL, lora=replace(ALL, dropout=0.5))
    block = config.build(training_layout(), nnx.Rngs(0)).blocks
    key = jax.random.key(5)
    give_keys(block, key)
    keys = [layer.adapter.key for layer in dense_layers(block).values()]
    taken = {tuple(np.asarray(jax.random.key_data(k))) for k in (*keys, *jax.random.split(key, 8))}
    assert len(keys) == 7 and len(taken) == 7 + 8


def test_adapters_are_computed_in_float32(one_device):
    """Beside a weight of 0 in bfloat16: the float32 product, rounded once, to 8 bits."""
    builder = Builder(64, 1, BASE.initializer, "bfloat16", training_layout(), nnx.Rngs(0))
    layer = builder.linear((("embed", 64),), (("mlp", 32),), bias=False)
    layer.weight[...] = jnp.zeros((64, 32))
    layer.adapter = Adapter(LoRA(rank=16, alpha=20.0), layer.inputs, layer.outputs, builder)
    layer.adapter.b.weight[...] = jax.random.normal(jax.random.key(1), (16, 32))
    x = jax.random.normal(jax.random.key(2), (1, 4, 64)).astype("bfloat16")
    found = layer(x)
    assert found.dtype == jnp.bfloat16
    a, b = (np.asarray(part.weight[...], np.float64) for part in (layer.adapter.a, layer.adapter.b))
    expected = 20 / 16 * np.asarray(x, np.float64) @ a @ b
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("merge", [True, False])
def test_decoding_with_a_cache(one_device, merge):
    """Log-probabilities of a continuation are those of the whole text at once, to 1e-4."""
    params = with_random_b(initialize(MODEL, training_layout(), jax.random.key(0))[1])
    prompts = [[5, 6, 7], [11, 12, 13, 14, 15]]
    generator = Generator(MODEL, params, unstack=False, merge=merge)
    # Merged, each adapted weight is another one; beside its adapter it takes no further memory.
    adapted = sum(leaf.nbytes for path, leaf in flat(params).items() if _is_adapted(path))
    further = bytes_beside(generator.weights, params)
    assert further >= adapted if merge else further == 0
    for prompt, row in zip(
        prompts, generator.continuations(prompts, Sampling(temperature=0), max_tokens=6)
    ):
        text = np.array([prompt + row.tokens], np.int32)
        scores = jax.nn.log_softmax(logits(MODEL, params, text)[0])
        at = np.arange(len(prompt) - 1, text.shape[1] - 1)
        expected = scores[at, text[0, at + 1]]
        np.testing.assert_allclose(row.log_probabilities, expected, rtol=0, atol=1e-4)
        assert row.tokens == np.argmax(scores[at], axis=1).tolist()


def _is_adapted(path):
    return path.startswith("blocks.") and path.endswith(".weight") and ".adapter." not in path


def bytes_beside(tree, other):
    """Bytes of the arrays of a tree that are not those of another one."""
    own = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(other)}
    found = {leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in jax.tree.leaves(tree)}
    return sum(size for pointer, size in found.items() if pointer not in own)


def test_encoder_and_decoder(one_device):
    """Adapters are in both stacks, cross-attention's in the decoder's; to 1e-5 as above."""
    base = EncoderDecoderConfig(
        vocab_size=97,
        hidden=16,
        num_layers=2,
        encoder_layers=1,
        attention=AttentionConfig(num_heads=2, head_dim=8),
    )
    config = replace(base, lora=LoRA(rank=2, alpha=3.0, layers=("query", "cross_attention.value")))
    params = with_random_b(initialize(config, training_layout(), jax.random.key(0))[1])
    adapted = {path.partition(".adapter.")[0] for path in flat(params) if ".adapter." in path}
    assert adapted == {
        "blocks.attention.query",
        "blocks.cross_attention.query",
        "blocks.cross_attention.value",
        "encoder.blocks.attention.query",
    }

    def run(config, params):
        graph, _ = abstract(config, training_layout())
        batch = dataclasses.replace(plain_batch(TOKENS), encoder=plain_batch(TOKENS[:, ::-1]))

        def logits(params, batch):
            model = nnx.merge(graph, params)
            return model.logits(model(batch)[0])

        return np.asarray(jax.jit(logits)(params, batch))

    merged, _ = merge_adapters(params, config)
    np.testing.assert_allclose(run(base, merged), run(config, params), rtol=0, atol=1e-5)


def test_xlnets_layer_of_distances(one_device):
    """It is not applied to tokens, but its weight is read; 1e-5 of the largest logit."""
    base = replace(
        xlnet(),
        vocab_size=97,
        hidden=16,
        num_layers=1,
        attention=replace(xlnet().attention, num_heads=2, head_dim=8),
        feed_forward=replace(xlnet().feed_forward, size=32),
    )
    config = replace(base, lora=LoRA(rank=2, alpha=3.0, layers=("position",)))
    params = initialize(config, training_layout(), jax.random.key(0))[1]
    # Of all weights, so that scores are large enough to matter.
    params = with_random_b(larger(params, 20), scale=1.0)
    merged, _ = merge_adapters(params, config)
    found = logits(config, params)
    assert np.abs(found - logits(base, merged_by_numpy(params, 0))).max() > 1e-2
    np.testing.assert_allclose(found, logits(base, merged), rtol=0, atol=1e-5 * np.abs(found).max())
