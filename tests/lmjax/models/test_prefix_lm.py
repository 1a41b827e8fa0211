"""Decoders whose beginning sees itself in both directions: ranks, and nothing else, make them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import replace
from lmjax.models import (
    AttentionConfig,
    Batch,
    FeedForwardConfig,
    GatedFeedForwardConfig,
    RelativeBuckets,
    RMSNormConfig,
    Rotary,
    TransformerConfig,
    initialize,
    make_cache,
    plain_batch,
)
from lmjax.parallel import Mesh, generation_layout, training_layout

LENGTH = 10
GPT_LIKE = TransformerConfig(
    vocab_size=97,
    hidden=32,
    num_layers=2,
    max_length=16,
    attention=AttentionConfig(num_heads=4, head_dim=8),
    feed_forward=FeedForwardConfig(size=64),
)
LLAMA_LIKE = replace(
    GPT_LIKE,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, positions=Rotary()),
    feed_forward=GatedFeedForwardConfig(size=64),
    norm=RMSNormConfig(),
    positions=None,
)
T5_LIKE = replace(LLAMA_LIKE, attention=replace(LLAMA_LIKE.attention, positions=RelativeBuckets()))
CONFIGS = {"gpt": GPT_LIKE, "llama": LLAMA_LIKE, "t5": T5_LIKE}


def packed(documents):
    """One row of documents, each (length, tokens of its prefix); what is left is padding."""
    tokens = np.random.default_rng(0).integers(0, 97, (1, LENGTH)).astype(np.int32)
    positions, segments, ranks = (np.zeros((1, LENGTH), np.int32) for _ in range(3))
    begin = 0
    for number, (length, prefix) in enumerate(documents, 1):
        places = np.arange(begin, begin + length)
        segments[0, places], positions[0, places] = number, places - begin
        ranks[0, places] = np.where(places < begin + prefix, begin, places)
        begin += length
    return Batch(tokens=tokens, positions=positions, segments=segments, ranks=ranks)


def seen_by_hand(documents):
    """Which output of `packed` may see which token, pair by pair."""
    seen, begin = np.zeros((LENGTH, LENGTH), bool), 0
    for length, prefix in documents:
        for query in range(length):
            for key in range(length):
                in_prefix = query < prefix and key < prefix
                seen[begin + query, begin + key] = key <= query or in_prefix
        begin += length
    return seen


@functools.cache
def reaching(name):
    """Gradients of the blocks' outputs with respect to the embeddings, [query, key, width]."""
    with one_device_mesh():
        graph, params = initialize(CONFIGS[name], training_layout(), jax.random.key(0))

        @jax.jit
        def gradients(batch):
            def outputs(embedded):
                model = nnx.merge(graph, params)
                model.embed = lambda batch, key=None: embedded
                return jnp.sum(jnp.sin(model(batch)[0][0]), axis=-1)

            return jax.jacrev(outputs)(nnx.merge(graph, params).embed(batch))[:, 0]

    return gradients


def one_device_mesh():
    return jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1]))


@st.composite
def rows_of_documents(draw):
    """One to three documents, with prefixes from one token to all of them."""
    documents, left = [], LENGTH
    for _ in range(draw(st.integers(1, 3))):
        if left:
            length = draw(st.integers(1, left))
            documents.append((length, draw(st.integers(1, length))))
            left -= length
    return documents


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=20)
@given(documents=rows_of_documents())
def test_nothing_but_what_ranks_allow_is_seen(name, documents):
    """Gradients of exactly zero elsewhere; a token of padding reaches itself past attention."""
    gradients = reaching(name)
    with one_device_mesh():
        found = np.asarray(gradients(jax.tree.map(jnp.asarray, packed(documents))))
    reached = np.abs(found).max(-1) != 0
    np.testing.assert_array_equal(reached, seen_by_hand(documents) | np.eye(LENGTH, dtype=bool))


def outputs(graph, params, batch, cache=None):
    return nnx.merge(graph, params)(batch, cache)


def test_a_prefix_of_one_token_is_causal_attention(one_device):
    """2e-6 absolute on outputs of about 1: other blocks of keys are multiplied."""
    graph, params = initialize(GPT_LIKE, training_layout(), jax.random.key(0))
    ranked = packed([(LENGTH, 1)])
    run = jax.jit(functools.partial(outputs, graph))
    causal = run(params, plain_batch(ranked.tokens))[0]
    np.testing.assert_allclose(run(params, ranked)[0], causal, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_continued_from_the_cache(one_device, name):
    """The prefix goes in as one piece, tokens follow one by one; 5e-6 on outputs of about 1."""
    layout, prefix = generation_layout(), 6
    graph, params = initialize(CONFIGS[name], layout, jax.random.key(0))
    run = jax.jit(functools.partial(outputs, graph))
    batch = packed([(LENGTH, prefix)])

    def part(first, last, batch=batch):
        columns = jax.tree.map(lambda a: a[:, first:last], batch)
        return jax.tree.map(lambda a: jax.device_put(a, layout.spec(None, None)), columns)

    whole = run(params, part(0, LENGTH))[0]
    cache = make_cache(CONFIGS[name], layout, 1, LENGTH)
    first, cache = run(params, part(0, prefix), cache)
    found = [first]
    later = dataclasses.replace(batch, ranks=None)
    for place in range(prefix, LENGTH):
        out, cache = run(params, part(place, place + 1, later), cache)
        found.append(out)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=0, atol=5e-6)
