"""Executors of blocks: another one takes the place of the scan, in every kind of model."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from lmjax.config import UserError, replace
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    TransformerConfig,
    abstract,
    gemma2,
    gpt2,
    initialize,
    plain_batch,
    t5,
    xlnet,
)
from lmjax.models.executor import scan_blocks
from lmjax.parallel import training_layout
from lmjax.parallel.mesh import AXES

VOCABULARY = 128
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (8, 12)).astype(np.int32)


def tiny(config, layers=4, **changes):
    """A small model of the config's family."""
    windows = tuple(window and 5 for window in config.attention.windows)
    attention = replace(
        config.attention, num_heads=2, num_kv_heads=2, head_dim=8, windows=windows, dropout=0.0
    )
    return replace(
        config,
        vocab_size=VOCABULARY,
        hidden=16,
        num_layers=layers,
        max_length=config.max_length and 32,
        attention=attention,
        feed_forward=replace(config.feed_forward, size=24),
        **changes,
    )


MODELS = {
    "gpt2": tiny(gpt2()),
    "gemma2": tiny(gemma2(), layers=5),  # its pattern ends in its middle
    "t5": tiny(t5(), encoder_layers=3),  # two stacks
    "xlnet": tiny(xlnet(), layers=3),  # two streams
}


def batch_for(config):
    """The tokens as the model reads them; XLNet with an order of prediction."""
    batch = plain_batch(TOKENS)
    if hasattr(config, "encoder_layers"):
        return dataclasses.replace(batch, encoder=plain_batch(TOKENS[:, ::-1].copy()))
    if hasattr(config, "two_streams"):
        ranks = np.random.default_rng(1).permuted(batch.positions, axis=1)
        return dataclasses.replace(batch, ranks=ranks)
    return batch


def loss_and_gradients(config, layout, executor, key=1):
    """Of one set of parameters, with dropout where the config has it."""
    graph, params = initialize(config, layout, jax.random.key(key))
    sharding = jax.NamedSharding(
        jax.sharding.get_mesh(), layout.spec("batch", "seq", shape=TOKENS.shape)
    )
    batch = jax.tree.map(lambda a: jax.device_put(a, sharding), batch_for(config))

    @jax.jit
    def run(params, batch):
        model = nnx.merge(graph, params)
        for stack in (model, getattr(model, "encoder", model)):
            stack.executor = executor
        return jnp.sin(model.logits(model(batch, key=jax.random.key(3))[0])).mean()

    return jax.device_get(jax.value_and_grad(run)(params, batch))


def assert_alike(found, expected):
    """1e-5 of the largest gradient: float32 sums in other orders."""
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    largest = max(np.abs(gradient).max() for gradient in jax.tree.leaves(expected[1]))
    check = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * largest)
    jax.tree.map(check, found[1], expected[1])


@pytest.mark.parametrize("name", ["gemma2", "t5", pytest.param("xlnet", marks=pytest.mark.slow)])
def test_every_model_runs_its_blocks_by_the_executor(one_device, name):
    """Two scans one after another, of the first layer and of the others."""
    config, scanned = replace(MODELS[name], dropout=0.1), []

    def in_two(blocks, x, mask, tables, cache):
        for part in (slice(None, 1), slice(1, None)):
            params, keys = jax.tree.map(lambda a, part=part: a[part], (blocks.params, blocks.keys))
            own = dataclasses.replace(
                blocks, params=params, keys=keys, windows=blocks.windows[part]
            )
            scanned.append(len(own.windows))
            x, _ = scan_blocks(own, x, mask, tables, None)
        return x, cache

    layout = training_layout()
    found = loss_and_gradients(config, layout, in_two)
    depths = [config.encoder_layers] if hasattr(config, "encoder_layers") else []
    depths.append(config.num_layers)
    assert scanned[: 2 * len(depths)] == [n for depth in depths for n in (1, depth - 1)]
    assert_alike(found, loss_and_gradients(config, layout, scan_blocks))


def staged(mapped=("stage",)):
    """The training layout with the layers cut over the stages."""
    layout = training_layout()
    rules = dict(layout.rules) | {"layers": mapped}
    return dataclasses.replace(layout, rules=tuple(rules.items()))


def mesh(*sizes):
    """A mesh with stages, which `Mesh` refuses until there is a pipeline."""
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def test_stacked_parameters_lie_along_the_layers_axis():
    """Each stage holds its layers; what is no block's lies as before. The numbers are the same."""
    config = MODELS["gpt2"]
    with jax.set_mesh(mesh(1, 2, 1, 2, 1, 2)):
        _, usual = initialize(config, training_layout(), jax.random.key(0))
        _, shapes = abstract(config, staged())
        _, params = initialize(config, staged(), jax.random.key(0))
        for path, leaf in jax.tree.leaves_with_path(params):
            spec, own = leaf.sharding.spec, jax.tree_util.keystr(path, simple=True, separator=".")
            before = usual
            for step in path:
                before = before[step.key]
            assert spec == dict(jax.tree.leaves_with_path(shapes))[path].sharding.spec
            if own.startswith("blocks."):
                assert spec == PartitionSpec("stage", *before.sharding.spec[1:])
                assert leaf.addressable_shards[0].data.shape[0] == config.num_layers // 2
            else:
                assert spec == before.sharding.spec
            np.testing.assert_array_equal(leaf, before)
        with pytest.raises(UserError, match="layers of size 3 does not divide the mesh: stage=2"):
            abstract(replace(config, num_layers=3), staged())


def gpipe(blocks, x, mask, tables, cache, microbatches=4):
    """A pipeline without dropout: microbatches go through stages (GPipe, arXiv:1811.06965)."""
    stages = jax.sharding.get_abstract_mesh().shape["stage"]
    count = len(blocks.windows) // stages
    assert cache is None and blocks.windows == blocks.windows[:count] * stages

    def run(params, x, mask, tables):
        stage = jax.lax.axis_index("stage")
        own = dataclasses.replace(blocks, params=params, keys=None, windows=blocks.windows[:count])

        def cut(a):
            return a.reshape(microbatches, -1, *a.shape[1:])

        def pick(number, a):
            return jax.lax.dynamic_index_in_dim(a, number, keepdims=False)

        parts, masks, tables = jax.tree.map(cut, (x, mask, tables))
        received, done = jnp.zeros_like(parts[0]), jnp.zeros_like(parts)
        received, done = jax.lax.pcast((received, done), "stage", to="varying")
        for tick in range(microbatches + stages - 1):
            number = jnp.clip(tick - stage, 0, microbatches - 1)
            part, *shared = jax.tree.map(functools.partial(pick, number), (parts, masks, tables))
            out, _ = scan_blocks(own, jnp.where(stage == 0, part, received), *shared, None)
            done = jnp.where(
                (stage == stages - 1) & (tick >= stage),
                jax.lax.dynamic_update_index_in_dim(done, out, number, 0),
                done,
            )
            received = jax.lax.ppermute(out, "stage", [(s, s + 1) for s in range(stages - 1)])
        return jax.lax.psum(jnp.where(stage == stages - 1, done, 0.0), "stage").reshape(x.shape)

    piped = jax.shard_map(
        run,
        in_specs=(PartitionSpec("stage"), PartitionSpec(), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names={"stage"},
    )
    return piped(blocks.params, x, mask, tables), None


@pytest.mark.slow
def test_a_pipeline_takes_the_place_of_the_scan():
    """Stages of two layers each, one with a window: loss and gradients of one device's scan."""
    config = TransformerConfig(
        vocab_size=VOCABULARY,
        hidden=16,
        num_layers=8,
        max_length=32,
        attention=AttentionConfig(num_heads=2, head_dim=8, windows=(3, None)),
        feed_forward=FeedForwardConfig(size=32),
    )
    with jax.set_mesh(mesh(1, 1, 1, 4, 1, 1)):
        found = loss_and_gradients(config, staged(), gpipe)
    with jax.set_mesh(mesh(1, 1, 1, 1, 1, 1)):
        expected = loss_and_gradients(config, training_layout(), scan_blocks)
    assert_alike(found, expected)
