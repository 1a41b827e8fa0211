"""Decoding with a cache gives the logits of the model without one, in every kind of family."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import replace
from lmjax.generation import Generator
from lmjax.generation.prompts import left_padded
from lmjax.models import (
    Batch,
    DynamicNTKScaling,
    abstract,
    baichuan2,
    bloom,
    chatglm2,
    falcon,
    gemma2,
    gpt1,
    gpt3,
    grok1,
    llama2,
    mistral,
    opt,
    qwen,
)
from lmjax.parallel import Mesh, generation_layout

VOCABULARY, HIDDEN, HEADS, HEAD_DIM = 97, 32, 4, 8
ROWS, PADDED, NEW = 3, 16, 8  # prompts, the longest of them, and tokens after each
STRETCHED = 12  # Qwen's length of training: prompts of up to 4 stay within it, from 13 on none does
FAMILIES = {
    "gpt1": gpt1(),  # post-norm
    "gpt3": gpt3(),  # learned positions, dense and banded layers in turn
    "opt_350m": opt("350M"),  # a table narrower than the rest
    "bloom": bloom(),  # ALiBi
    "llama2_70b": llama2("70B"),  # rotary positions, grouped queries
    "mistral": mistral(),  # a window
    "grok1": grok1(),  # experts, soft caps, norms on both sides
    "baichuan2_13b": baichuan2("13B"),  # ALiBi, a head of unit rows
    "qwen": qwen(),  # dynamic NTK, LogN
    "falcon_7b": falcon("7B"),  # side by side, one key head
    "falcon_40b": falcon("40B"),  # side by side, two norms
    "chatglm2": chatglm2(),  # half of each head rotated, in pairs side by side
    "gemma2": gemma2(),  # windows in turn, soft caps, norms on both sides
}


def shrunk(config):
    """The same kind of model, tiny; its windows are shorter than most prompts."""
    attention = config.attention
    kv_heads = HEADS if attention.kv_heads == attention.num_heads else min(attention.kv_heads, 2)
    attention = replace(
        attention,
        num_heads=HEADS,
        num_kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        windows=tuple(window and 5 for window in attention.windows),
    )
    if attention.logn_length is not None:
        rotary = replace(attention.positions, scaling=DynamicNTKScaling(length=STRETCHED))
        attention = replace(attention, logn_length=STRETCHED, positions=rotary)
    return replace(
        config,
        vocab_size=VOCABULARY,
        hidden=HIDDEN,
        num_layers=2,
        max_length=64,
        embedding_size=config.embedding_size and 16,
        embedding_scale=1.0 if config.embedding_scale == 1 else math.sqrt(HIDDEN),
        attention=attention,
        feed_forward=replace(config.feed_forward, size=48),
    )


def random_parameters(config):
    """Parameters with nothing left at 0 or 1, and logits of about 3."""
    draw = np.random.default_rng(7)

    def leaf(path, shape):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return jnp.asarray(
            0.3 * draw.standard_normal(shape.shape, np.float32) + np.float32(name == "scale")
        )

    return jax.tree.map_with_path(leaf, abstract(config, generation_layout())[1])


# Their layers are those of others, in other places.
SLOW = {"gpt1", "llama2_70b", "mistral", "baichuan2_13b", "falcon_7b", "grok1"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in FAMILIES],
)
def computed(request):
    """What the generator compiles: logits after prompts, and after one more token; and the model.

    All of it once a family: prompts are padded to PADDED, whole texts to PADDED + NEW.
    """
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        config = shrunk(FAMILIES[request.param])
        params = random_parameters(config)
        generator = Generator(config, params)
        graph, _ = abstract(config, generation_layout())

        def whole(params, batch):
            model = nnx.merge(graph, params)
            return model.logits(model(batch)[0])[..., :VOCABULARY]

        prefill = jax.jit(functools.partial(generator.decoder.prefill, length=PADDED + NEW))
        step, whole = jax.jit(generator.decoder.logits), jax.jit(whole)
        yield (
            config,
            lambda batch: prefill(generator.weights, generator.put_on_devices(batch)),
            lambda batch, cache: step(generator.weights, generator.put_on_devices(batch), cache),
            lambda batch: whole(params, generator.put_on_devices(batch)),
        )


@settings(max_examples=12)
@given(data=st.data())
def test_cached_is_uncached(computed, data):
    """The logits before and after each of NEW given tokens, for prompts of any lengths.

    2e-5 of the largest logit: the same float32 sums, in another order.
    """
    config, prefill, step, whole = computed
    length = st.integers(1, PADDED)
    if config.attention.logn_length is not None:
        # Qwen's base follows from a text's length when it was first read: here the prompt's and
        # the whole text's give the same one, 1 or 3 times as far.
        length = st.integers(1, STRETCHED - NEW) | st.integers(STRETCHED + 1, PADDED)
    lengths = np.array(data.draw(st.lists(length, min_size=ROWS, max_size=ROWS)))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows = [draw.integers(0, VOCABULARY, length + NEW).tolist() for length in lengths]

    logits, cache = prefill(left_padded([row[:-NEW] for row in rows], PADDED))
    cached = [logits]
    for place in range(NEW):
        tokens = np.array([[row[length + place]] for row, length in zip(rows, lengths)], np.int32)
        positions = (lengths + place)[:, None].astype(np.int32)
        batch = Batch(tokens=tokens, positions=positions, segments=np.ones_like(tokens))
        logits, cache = step(batch, cache)
        cached.append(logits)

    # Without a cache the rows are padded at their other end.
    tokens, positions, segments = np.zeros((3, ROWS, PADDED + NEW), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
        positions[i, : len(row)] = np.arange(len(row))
    uncached = np.asarray(whole(Batch(tokens=tokens, positions=positions, segments=segments)))
    for i, length in enumerate(lengths):
        expected = uncached[i, length - 1 : length + NEW]
        atol = 2e-5 * np.abs(expected).max()
        found = [logits[i] for logits in cached]
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
