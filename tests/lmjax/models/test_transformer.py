"""The Transformer: causality, packing, equivalent ways to run it, and its size."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.models import (
    AttentionConfig,
    BlockRotary,
    FeedForwardConfig,
    GatedFeedForwardConfig,
    Llama3Scaling,
    PostNorm,
    RMSNormConfig,
    Rotary,
    TransformerConfig,
    YaRNScaling,
    abstract,
    gpt1,
    gpt2,
    gpt3,
    initialize,
    llama,
    llama2,
    plain_batch,
)
from lmjax.objectives import CausalLM
from lmjax.parallel import training_layout

SMALL = TransformerConfig(
    vocab_size=97,
    hidden=32,
    num_layers=4,
    max_length=16,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, windows=(None, 4)),
    feed_forward=FeedForwardConfig(size=64),
)
LLAMA_LIKE = replace(
    SMALL,
    attention=replace(SMALL.attention, windows=(None,), positions=Rotary()),
    feed_forward=GatedFeedForwardConfig(size=64),
    norm=RMSNormConfig(),
    positions=None,
    tied_head=False,
)
# Counts of model-building in other libraries, from the published sizes.
COUNTS = {
    gpt1("117M"): 116_534_784,
    gpt2("124M"): 124_439_808,
    gpt2("355M"): 354_823_168,
    gpt2("774M"): 774_030_080,
    gpt2("1.5B"): 1_557_611_200,
    gpt3("125M"): 125_226_240,
    gpt3("1.3B"): 1_315_723_264,
    gpt3("13B"): 12_853_386_240,
    gpt3("175B"): 174_604_259_328,
    llama("7B"): 6_738_415_616,
    llama("13B"): 13_015_864_320,
    llama("33B"): 32_528_943_616,
    llama("65B"): 65_285_660_672,
    llama2("7B"): 6_738_415_616,
    llama2("70B"): 68_976_648_192,
}


def make(config, key=0):
    graph, params = initialize(config, training_layout(), jax.random.key(key))
    return graph, params


@pytest.mark.parametrize("config", COUNTS, ids=lambda c: f"{c.num_layers}x{c.hidden}")
def test_parameter_counts_are_the_published_ones(one_device, config):
    """Exactly, less the rows that pad the vocabulary; nothing is allocated."""
    _, shapes = abstract(config, training_layout())
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    tables = 1 if config.tied_head else 2
    padding = tables * (config.padded_vocab - config.vocab_size) * config.hidden
    assert count - padding == COUNTS[config]


def test_an_unknown_size_lists_the_sizes():
    with pytest.raises(UserError, match=r"124M, 355M, 774M, 1\.5B"):
        gpt2("100M")


@pytest.mark.parametrize("config", [SMALL, LLAMA_LIKE], ids=["gpt", "llama"])
def test_no_gradient_reaches_a_token_from_its_past(one_device, config):
    """The output at place t has a gradient of exactly zero at every later embedding."""
    graph, params = make(config)
    batch = plain_batch(np.arange(8)[None])

    def output(embedded, place):
        model = nnx.merge(graph, params)
        # The same tokens, their embeddings replaced by ones that can be differentiated.
        model.embed = lambda batch, key=None: embedded
        hidden, _ = model(batch)
        return jnp.sum(jnp.sin(hidden[0, place]))

    embedded = nnx.merge(graph, params).embed(jax.tree.map(jnp.asarray, batch))
    gradients = jax.jit(jax.vmap(jax.grad(output), in_axes=(None, 0)))(embedded, jnp.arange(8))
    reached = np.abs(np.asarray(gradients)[:, 0]).max(-1) != 0
    assert not np.triu(reached, 1).any()
    assert reached.diagonal().all()


@pytest.mark.parametrize("config", [SMALL, LLAMA_LIKE], ids=["gpt", "llama"])
def test_packed_documents_lose_what_they_lose_alone(one_device, config):
    """2e-6 absolute on losses of about 4.6 in float32: only the order of sums differs."""
    graph, params = make(config)
    generator = np.random.default_rng(1)
    documents = [generator.integers(0, 97, n).astype(np.int32) for n in (5, 7, 4)]
    objective = CausalLM()

    def rows(documents):
        row, segments = np.zeros((1, 17), np.int32), np.zeros((1, 17), np.int32)
        end = 0
        for number, document in enumerate(documents, 1):
            row[0, end : end + len(document)] = document
            segments[0, end : end + len(document)] = number
            end += len(document)
        return objective.prepare(row, segments, np.zeros(1, np.uint64))

    loss = jax.jit(lambda example: objective.loss(nnx.merge(graph, params), example, None))
    packed = rows(documents)
    segments = packed.inputs.segments
    crossing = segments[:, :-1] != segments[:, 1:]
    inside = packed.targets.weights.copy()
    inside[:, :-1][crossing] = 0  # the target after a document's end exists only when packed
    packed = loss(jax.tree.map(jnp.asarray, replace_weights(packed, inside)))
    alone = [loss(rows([document])) for document in documents]
    np.testing.assert_allclose(packed.loss, sum(a.loss for a in alone), rtol=2e-6)
    assert packed.weight == sum(a.weight for a in alone) == sum(map(len, documents)) - 3


def replace_weights(example, weights):
    targets = dataclasses.replace(example.targets, weights=weights)
    return dataclasses.replace(example, targets=targets)


def test_scan_unrolled_loop_and_remat_agree(one_device):
    """1e-5 relative on loss and gradient: the same sums, fused differently."""
    _, params = make(SMALL)
    objective = CausalLM()
    tokens = np.random.default_rng(2).integers(0, 97, (2, 17)).astype(np.int32)
    example = objective.prepare(tokens, np.ones_like(tokens), np.zeros(2, np.uint64))
    example = jax.tree.map(jnp.asarray, example)

    def gradient(config):
        graph, _ = abstract(config, training_layout())

        def loss(params):
            return objective.loss(nnx.merge(graph, params), example, None).loss

        return jax.jit(jax.value_and_grad(loss))(params)

    expected = gradient(SMALL)
    for change in (
        dict(unroll=0),
        dict(unroll=2, remat="full"),
        dict(remat="dots"),
    ):
        got = gradient(replace(SMALL, **change))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected
        )


def test_windows_narrow_what_is_seen(one_device):
    """With a band of 1 in every layer a token sees itself alone."""
    config = replace(SMALL, attention=replace(SMALL.attention, windows=(1,)))
    graph, params = make(config)
    model = jax.jit(lambda batch: nnx.merge(graph, params)(batch)[0])
    tokens = np.array([[5, 6, 7, 8]])
    other = np.array([[9, 6, 1, 8]])
    ours, theirs = model(plain_batch(tokens)), model(plain_batch(other))
    np.testing.assert_array_equal(ours[0, 1::2], theirs[0, 1::2])


def test_bfloat16_keeps_parameters_in_float32(one_device):
    """Within 3e-2 of the float32 logits, a few units of bfloat16's last place, and not equal."""
    graph, params = make(LLAMA_LIKE)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    batch = plain_batch(np.arange(16)[None])
    logits = {}
    for dtype in ("float32", "bfloat16"):
        graph, _ = abstract(replace(LLAMA_LIKE, dtype=dtype), training_layout())
        model = nnx.merge(graph, params)
        hidden, _ = jax.jit(lambda batch, model=model: model(batch))(batch)
        assert hidden.dtype == dtype
        logits[dtype] = np.asarray(model.logits(hidden))[..., :97]
    np.testing.assert_allclose(logits["bfloat16"], logits["float32"], atol=3e-2)
    assert np.abs(logits["bfloat16"] - logits["float32"]).max() > 1e-3


def test_initialisation_follows_gpt2(one_device):
    """Deviations of the paper within 5 percent; residual projections by 1 / sqrt(2 layers)."""
    config = replace(
        gpt2(),
        hidden=64,
        num_layers=8,
        vocab_size=500,
        max_length=256,
        attention=AttentionConfig(num_heads=4, head_dim=16),
        feed_forward=FeedForwardConfig(size=256),
    )
    _, params = make(config)
    expected = {
        ("embedding", "table"): 0.02,
        ("positions", "table"): 0.01,
        ("blocks", "attention", "query", "weight"): 0.02,
        ("blocks", "attention", "output", "weight"): 0.02 / 4,
        ("blocks", "feed_forward", "up", "weight"): 0.02,
        ("blocks", "feed_forward", "down", "weight"): 0.02 / 4,
    }
    for path, std in expected.items():
        leaf = params
        for name in path:
            leaf = leaf[name]
        assert np.std(leaf) == pytest.approx(std, rel=0.05), path


def test_post_norm_has_no_final_norm(one_device):
    _, shapes = abstract(replace(SMALL, arrangement=PostNorm()), training_layout())
    assert "final_norm" not in shapes


def test_dropout_drops_only_with_a_key(one_device):
    graph, params = make(replace(SMALL, dropout=0.5))
    batch = plain_batch(np.arange(16)[None])
    run = jax.jit(lambda key: nnx.merge(graph, params)(batch, key=key)[0])
    still = run(None)
    first, second = run(jax.random.key(1)), run(jax.random.key(2))
    assert not np.allclose(first, still) and not np.allclose(first, second)


def test_heads_that_do_not_group_are_refused():
    with pytest.raises(UserError, match="num_heads=6 is no multiple of num_kv_heads=4"):
        AttentionConfig(num_heads=6, num_kv_heads=4)


def test_a_table_of_positions_needs_a_longest_text():
    with pytest.raises(UserError, match="max_length is none, but the table of positions"):
        replace(SMALL, max_length=None)
    assert replace(LLAMA_LIKE, max_length=None).max_length is None


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (SMALL, {"hidden": -1}, "hidden=-1: must be 1 or more"),
        (SMALL, {"num_layers": 0}, "num_layers=0: must be 1 or more"),
        (SMALL, {"dropout": 1.0}, "dropout=1.0: must be 0 or more, and below 1"),
        (SMALL, {"logit_softcap": 0.0}, "logit_softcap=0.0: must be above 0, or none"),
        (SMALL.attention, {"num_kv_heads": 0}, "attention.kv_heads=0: must be 1 or more"),
        (SMALL.attention, {"windows": (None, 0)}, "must be 1 or more, or none"),
        (SMALL.attention, {"softcap": -1.0}, "attention.softcap=-1.0: must be above 0, or none"),
        (SMALL.attention, {"dropout": -0.1}, "attention.dropout=-0.1: must be 0 or more"),
        (SMALL.feed_forward, {"size": 0}, "feed_forward.size=0: must be 1 or more"),
        (SMALL.norm, {"epsilon": -1.0}, "norm.epsilon=-1.0: must be 0 or more"),
        (Rotary(), {"base": 0.0}, "base=0.0: must be above 0"),
        (BlockRotary(), {"base": -2.0}, "base=-2.0: must be above 0"),
        (YaRNScaling(), {"factor": 0.0}, "factor=0.0: must be above 0"),
        (YaRNScaling(), {"fast": 0.5}, "slow=1.0, fast=0.5: slow must be above 0, at most fast"),
        (Llama3Scaling(), {"length": 0}, "length=0: must be above 0"),
    ],
)
def test_numbers_that_cannot_be_meant(part, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        replace(part, **changes)


def test_an_attention_kernel_that_cannot_serve_is_the_users_to_change(one_device):
    with pytest.raises(UserError, match=r"implementation=fast: must be one of reference, chunked"):
        replace(SMALL.attention, implementation="fast")
    config = replace(SMALL, attention=replace(SMALL.attention, implementation="cudnn"))
    graph, params = make(config)
    with pytest.raises(UserError, match="'cudnn' cannot serve this call: it needs an NVIDIA GPU"):
        nnx.merge(graph, params)(plain_batch(np.zeros((1, 4), np.int32)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_few_and_of_many_rows_are_the_same(one_device, dtype):
    """Few are made by the table times the rows, on CPUs: sums of 32 products in another order."""
    graph, params = initialize(replace(SMALL, dtype=dtype), training_layout(), jax.random.key(0))
    model = nnx.merge(graph, params)
    hidden = jax.random.normal(jax.random.key(1), (3, 40, SMALL.hidden), jnp.dtype(dtype))
    whole = model.logits(hidden)
    assert whole.dtype == jnp.float32
    for rows, columns in ((1, 1), (1, 2), (2, 16), (3, 11)):
        few = model.logits(hidden[:rows, :columns])
        assert few.dtype == jnp.float32
        np.testing.assert_allclose(few, whole[:rows, :columns], rtol=1e-5, atol=1e-5)
