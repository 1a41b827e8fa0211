"""Parameter and FLOP counts against published sizes, a walk through the program, and XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from lmjax.config import replace
from lmjax.data import Data, Domain, TextFiles
from lmjax.jobs.pretrain import Pretrain
from lmjax.models import (
    AttentionConfig,
    EncoderDecoderConfig,
    FeedForwardConfig,
    GatedFeedForwardConfig,
    LoRA,
    TransformerConfig,
    abstract,
    gpt1,
    gpt2,
    gpt3,
    llama,
    llama2,
    plain_batch,
    xlnet,
)
from lmjax.objectives import SpanCorruption
from lmjax.parallel import Mesh, training_layout
from lmjax.scaling.explain import layer_table
from lmjax.scaling.flops import (
    attended_keys,
    count_parameters,
    count_trained,
    forward_flops_per_token,
    training_flops_per_token,
)
from lmjax.training.trainable import Adapters, LastBlocks

LENGTH = 64
PLAIN = TransformerConfig(
    vocab_size=256,
    hidden=96,
    num_layers=4,
    max_length=LENGTH,
    attention=AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=16, causal=False, implementation="reference"
    ),
    feed_forward=FeedForwardConfig(size=320),
)
GATED = replace(PLAIN, feed_forward=GatedFeedForwardConfig(size=200), tied_head=False)


@pytest.mark.parametrize(
    "config, total",
    [
        (gpt1(), 116_534_784),
        (gpt2("124M"), 124_439_808),
        (gpt2("1.5B"), 1_557_611_200),
        (llama("7B"), 6_738_415_616),
        (llama2("70B"), 68_976_648_192),
    ],
)
def test_parameters_are_the_published_number(config, total):
    """As the models' files on the Hugging Face hub have them."""
    assert count_parameters(config).total == total


def test_parameter_kinds():
    tied, untied = (count_parameters(replace(GATED, tied_head=tied)) for tied in (True, False))
    head = 256 * 96
    assert untied.total == tied.total + head
    assert untied.products == tied.products
    assert untied.embeddings == tied.embeddings == head + LENGTH * 96
    padded, exact = (count_parameters(replace(GATED, vocab_size=size)) for size in (255, 256))
    assert exact.total - padded.total == 2 * 96  # one row of the table and one of the head


def test_a_model_without_a_head_of_words_costs_none():
    """Also where the head would be the table of tokens, as in a reward model made of GPT-2."""
    words, none = PLAIN, replace(PLAIN, word_head=False)
    head = 2 * 256 * 96
    assert forward_flops_per_token(words, 32) - forward_flops_per_token(none, 32) == head
    assert not any(line.name.startswith("head") for line in layer_table(none, 32))


def products_in(jaxpr):
    """FLOPs of all matrix products in a traced program, loops multiplied out."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            left, right = (variable.aval.shape for variable in equation.invars)
            shared = np.prod([left[i] for i in (*contracted, *batched)], dtype=int)
            batch = np.prod([left[i] for i in batched], dtype=int)
            free = np.prod(left, dtype=int) * np.prod(right, dtype=int) // shared**2
            total += 2 * free * shared // batch * batch
            continue
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += times * products_in(inner)
    return total


def forward(config):
    """Logits from parameters, and the parameters' shapes; two rows of LENGTH tokens."""
    graph, shapes = abstract(config, training_layout())
    batch = plain_batch(jnp.zeros((2, LENGTH), jnp.int32))

    def logits(params):
        model = nnx.merge(graph, params)
        return model.logits(model(batch)[0])

    return logits, shapes


@pytest.mark.parametrize("config", [PLAIN, GATED], ids=["plain", "gated"])
def test_forward_is_the_sum_of_all_products_in_the_program(config, one_device):
    """Without a causal mask the program multiplies exactly what is counted."""
    logits, shapes = forward(config)
    walked = products_in(jax.make_jaxpr(logits)(shapes).jaxpr)
    assert walked == 2 * LENGTH * forward_flops_per_token(config, LENGTH)


ENCODER_DECODER = EncoderDecoderConfig(
    vocab_size=256,
    hidden=96,
    num_layers=4,
    encoder_layers=3,
    max_length=LENGTH,
    attention=PLAIN.attention,
    feed_forward=FeedForwardConfig(size=320),
)


def products_of_both(batch):
    """FLOPs of all products of an encoder and a decoder in a forward pass over a batch."""
    graph, shapes = abstract(ENCODER_DECODER, training_layout())

    def logits(params):
        model = nnx.merge(graph, params)
        return model.logits(model(batch)[0])

    return products_in(jax.make_jaxpr(logits)(shapes).jaxpr)


def test_an_encoder_s_part_is_the_products_in_its_program(one_device):
    """Two rows of LENGTH tokens with 24 tokens of the encoder each, and rows of one length."""
    for length in (24, LENGTH):
        batch, source = (plain_batch(np.zeros((2, n), np.int32)) for n in (LENGTH, length))
        walked = products_of_both(dataclasses.replace(batch, encoder=source))
        source_length = None if length == LENGTH else length
        counted = forward_flops_per_token(ENCODER_DECODER, LENGTH, source_length)
        np.testing.assert_allclose(walked, 2 * LENGTH * counted, rtol=1e-12)


def test_a_run_counts_what_encoder_and_decoder_read(one_device, tmp_path):
    """All products over an example of the objective's, which gives the decoder shorter rows."""
    domain = Domain(name="text", source=TextFiles(path=str(tmp_path)))
    experiment = Pretrain(
        output=str(tmp_path),
        steps=1,
        model=ENCODER_DECODER,
        objective=SpanCorruption(),
        data=Data(train=(domain,), length=LENGTH, batch_size=2),
    )
    batch = experiment.objective.shapes(2, LENGTH).inputs
    assert batch.tokens.shape[1] < batch.encoder.tokens.shape[1] == LENGTH
    counted = batch.tokens.size * experiment.flops_per_token()
    np.testing.assert_allclose(3 * products_of_both(batch), counted, rtol=1e-12)


def test_two_streams_are_the_products_in_their_program(one_device):
    """But for what is not counted: the keys of distances, once for all rows, and two types."""
    config = replace(
        xlnet(),
        vocab_size=256,
        hidden=64,
        num_layers=3,
        attention=replace(xlnet().attention, num_heads=4, head_dim=16, implementation="reference"),
        feed_forward=FeedForwardConfig(size=200),
    )
    graph, shapes = abstract(config, training_layout())
    batch = plain_batch(np.zeros((2, LENGTH), np.int32))
    batch = dataclasses.replace(batch, ranks=np.asarray(batch.positions))

    def logits(params):
        model = nnx.merge(graph, params)
        return model.logits(model(batch)[0])

    walked = products_in(jax.make_jaxpr(logits)(shapes).jaxpr)
    distances, types = 2 * 2 * LENGTH * 64 * 64, 2 * (2 * 2 * LENGTH) * 2 * 64
    counted = 2 * LENGTH * forward_flops_per_token(config, LENGTH)
    assert walked == counted + 3 * (distances + types)


@pytest.mark.parametrize("tied", [True, False])
def test_training_adapters_is_the_products_in_its_program(one_device, tied):
    """But for A x, which backward computes once more."""
    config = replace(PLAIN, tied_head=tied, lora=LoRA(rank=4, layers=("query", "down")))
    logits, shapes = forward(config)
    flat = traverse_util.flatten_dict(shapes, sep=".")
    adapters = {path: leaf for path, leaf in flat.items() if ".adapter." in path}

    def loss(adapters, flat):
        params = traverse_util.unflatten_dict(flat | adapters, sep=".")
        return jnp.sum(jnp.square(logits(params)))

    walked = products_in(jax.make_jaxpr(jax.grad(loss))(adapters, flat).jaxpr)
    again = 2 * sum(leaf.size for path, leaf in adapters.items() if ".a." in path)
    counted = training_flops_per_token(config, LENGTH, share=Adapters().share)
    assert walked == 2 * LENGTH * (counted + again)
    assert counted < 0.75 * training_flops_per_token(config, LENGTH)
    sizes = sum(leaf.size for leaf in adapters.values())
    assert count_trained(config, Adapters().share) == sizes


def test_blocks_before_the_last_ones_have_no_backward():
    """Of 4 blocks 3 go without: 4 of their 6 FLOPs a weight; the tied head has no gradient."""
    count, share = count_parameters(PLAIN), LastBlocks(count=1).share
    head = PLAIN.vocab_size * PLAIN.hidden
    blocks = count.products - head
    saved = training_flops_per_token(PLAIN, LENGTH) - training_flops_per_token(
        PLAIN, LENGTH, share=share
    )
    assert saved == 4 * blocks * 3 / 4 + 2 * head


def test_forward_is_what_xla_counts(one_device):
    """Of an unrolled model; XLA also counts norms, softmax and the like: a few percent."""
    config = replace(PLAIN, unroll=0, hidden=256, feed_forward=FeedForwardConfig(size=1024))
    logits, shapes = forward(config)
    counted = jax.jit(logits).lower(shapes).compile().cost_analysis()["flops"]
    ours = 2 * LENGTH * forward_flops_per_token(config, LENGTH)
    assert ours < counted < 1.05 * ours


def test_attended_keys_by_counting():
    """Against pairs of positions; the diagonal, half of which is counted, is the difference."""
    rows, columns = np.mgrid[:96, :96]
    for window in (None, 1, 7, 96, 200):
        for causal in (True, False):
            distance = rows - columns
            seen = np.abs(distance) < (window or 96)
            if causal:
                seen &= distance >= 0
            exact = seen.sum() / 96
            assert abs(attended_keys(96, window, causal) - exact) <= 1
    assert attended_keys(96, None, causal=True) == 48


def test_training_against_six_n():
    """6 N plus attention: 12 layers hidden length for the full square, half of it if causal."""
    config = gpt3("6.7B")
    count = count_parameters(config)
    full = replace(config, attention=replace(config.attention, windows=(None,)))
    expected = 6 * count.products + 6 * config.num_layers * config.hidden * config.max_length
    assert training_flops_per_token(full, config.max_length) == expected
    # every other layer of GPT-3 has a band
    assert 6 * count.products < training_flops_per_token(config, config.max_length) < expected
    # N as scaling laws have it: everything but the look-ups
    without = count_parameters(llama("7B"))
    six_n = 6 * (without.total - without.embeddings)
    assert 1.0 < training_flops_per_token(llama("7B"), 2048) / six_n < 1.05


def test_parameters_are_counted_on_any_mesh():
    """The count knows no mesh, and tracing takes the one that is set."""
    config = TransformerConfig(vocab_size=300, num_layers=2, hidden=96)
    alone = count_parameters(config)
    count_parameters.cache_clear()
    with jax.set_mesh(Mesh(fsdp=4, tensor=2).build()):
        assert count_parameters(config) == alone
