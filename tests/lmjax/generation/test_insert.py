"""Prompts inserted into a running batch: each row gives what its prompt gives alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.generation import Generator, Sampling
from lmjax.generation.decoder import Decoder
from lmjax.generation.prompts import prompt_batch, tokens_of
from lmjax.models import (
    ALiBi,
    AttentionConfig,
    Batch,
    BlockPositions,
    BlockRotary,
    DynamicNTKScaling,
    EncoderDecoderConfig,
    FeedForwardConfig,
    RelativeBuckets,
    Rotary,
    TransformerConfig,
    abstract,
    blank_row,
    plain_batch,
)
from lmjax.parallel import Mesh, generation_layout

VOCABULARY, HEADS, SLOTS, CAPACITY = 61, 4, 4, 40
ATTENTION = AttentionConfig(num_heads=HEADS, head_dim=8)
LEARNED = TransformerConfig(
    vocab_size=VOCABULARY,
    hidden=32,
    num_layers=2,
    max_length=64,
    attention=ATTENTION,
    feed_forward=FeedForwardConfig(size=48),
)


def in_attention(positions, **changes):
    """The model with these positions in attention and none on the embeddings."""
    attention = replace(ATTENTION, positions=positions, **changes)
    return replace(LEARNED, positions=None, attention=attention)


FAMILIES = {
    "learned": LEARNED,
    "rotary": in_attention(Rotary(), num_kv_heads=2),
    "dynamic_ntk": in_attention(Rotary(scaling=DynamicNTKScaling(length=6))),
    "alibi": in_attention(ALiBi()),
    "window": in_attention(Rotary(), windows=(5,)),
    "windows_in_turn": in_attention(Rotary(), windows=(5, None)),
    "alibi_window": in_attention(ALiBi(), windows=(None, 5)),
    "glm": replace(LEARNED, positions=BlockPositions()),
    "chatglm": in_attention(BlockRotary()),
    "t5": EncoderDecoderConfig(
        vocab_size=VOCABULARY,
        hidden=32,
        num_layers=2,
        encoder_layers=2,
        max_length=64,
        positions=None,
        attention=replace(ATTENTION, positions=RelativeBuckets(buckets=8, max_distance=16)),
        feed_forward=FeedForwardConfig(size=48),
    ),
}
BLANKS = {"glm", "chatglm"}


@pytest.fixture(scope="module", autouse=True)
def mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


@functools.cache
def generator(name, unstack=None):
    """A model with nothing left at 0 or 1, whose logits are of about 3."""
    draw = np.random.default_rng(7)

    def leaf(path, shape):
        scale = np.float32(jax.tree_util.keystr(path[-1:], simple=True) == "scale")
        value = 0.3 * draw.standard_normal(shape.shape, np.float32) + scale
        return jax.device_put(value, shape.sharding.spec)

    config, layout = FAMILIES[name], generation_layout()
    params = jax.tree.map_with_path(leaf, abstract(config, layout)[1])
    return Generator(config, params, unstack=unstack)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, how many tokens follow it, and what the encoder reads."""

    prompt: object
    tokens: int
    source: list[int] | None


def request(name, seed, length, tokens):
    """A random one; of GLM's kinds a text that sees itself whole, and the start of a blank."""
    draw = np.random.default_rng(seed)
    prompt = draw.integers(0, VOCABULARY, length).tolist()
    source = None
    if name in BLANKS:
        prompt = blank_row(prompt, [(int(draw.integers(length)), [1])])
    if name == "t5":
        source = draw.integers(0, VOCABULARY, draw.integers(1, 17)).tolist()
    return Request(prompt, tokens, source)


def prefilled(model, request):
    """Logits after one prompt, and its row."""
    sources = None if request.source is None else [request.source]
    batch = model.place(prompt_batch([request.prompt], sources))
    return model.decoder.prefill(model.weights, batch)


def serve(name, arrivals, model=None, slots=SLOTS):
    """Greedy decoding of requests that arrive while others are decoded.

    Args:
      name: of the family.
      arrivals: (step, slot, request); a request waits for its slot.
      model: the generator; None is that of `name`.
      slots: rows that are decoded at once.

    Returns:
      For each request its tokens, and the logits that they are the largest of.
    """
    model = generator(name) if model is None else model
    cache = model.decoder.free_rows(slots, CAPACITY, 16 if name == "t5" else None)
    waiting, running = list(enumerate(arrivals)), {}
    found = [([], []) for _ in arrivals]
    step, newest = 0, np.zeros(slots, np.int32)

    def note(slot, logits):
        number = running[slot]
        newest[slot] = logits.argmax()
        found[number][0].append(int(newest[slot]))
        found[number][1].append(logits)
        if len(found[number][0]) == arrivals[number][2].tokens:
            del running[slot]

    while waiting or running:
        for entry in list(waiting):
            number, (when, slot, wanted) = entry
            if when <= step and slot not in running:
                logits, row = prefilled(model, wanted)
                cache = model.decoder.insert(cache, [slot], row)
                running[slot] = number
                waiting.remove(entry)
                note(slot, np.asarray(logits)[0])
        going = np.isin(np.arange(slots), list(running))
        if going.any():
            logits, cache = model.decoder.step(model.weights, cache, newest.copy(), going)
            for slot in list(running):
                note(slot, np.asarray(logits)[slot])
        step += 1
    return found


def whole_logits(name, request, tokens):
    """Logits before each of the tokens that follow a request, from the model without a cache."""
    model = generator(name)
    graph, _ = abstract(model.config, model.layout)
    text = [*tokens_of(request.prompt), *tokens]
    if isinstance(request.prompt, Batch):
        place = int(request.prompt.positions[-1])
        start = int(request.prompt.tokens[-1])
        batch = blank_row(text[: -1 - len(tokens)], [(place, [start, *tokens])])
        batch = jax.tree.map(lambda a: a[None], batch)
    else:
        batch = plain_batch(np.array([text], np.int32))
    if request.source is not None:
        encoder = plain_batch(np.array([request.source], np.int32))
        batch = dataclasses.replace(batch, encoder=encoder)
    transformer = nnx.merge(graph, model.params)
    logits = np.asarray(transformer.logits(transformer(model.place(batch))[0]))
    return logits[0, -len(tokens) - 1 : -1, :VOCABULARY]


def compare(found, expected):
    """2e-5 of the largest logit: float32 sums over another batch, or padded otherwise."""
    assert len(found) == len(expected)
    atol = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


# (step, slot, length of the prompt, tokens that follow): of slot 1 the third row comes after the
# first, which was longer; slot 3 is never used.
ARRIVALS = [(0, 1, 9, 6), (2, 0, 3, 20), (3, 1, 5, 12), (4, 2, 17, 4), (11, 2, 1, 9)]


def requests(name):
    return [
        (when, slot, request(name, seed, length, tokens))
        for seed, (when, slot, length, tokens) in enumerate(ARRIVALS)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_gives_what_its_prompt_gives_alone(name):
    """Greedy tokens are those of `Generator`; logits those of the model without a cache."""
    arrivals = requests(name)
    if name == "dynamic_ntk":  # its base follows from the prompt, so whole texts have another one
        arrivals = arrivals[:1]
    for (tokens, logits), (_, _, wanted) in zip(serve(name, arrivals), arrivals):
        sources = None if wanted.source is None else [wanted.source]
        settings = Sampling(temperature=0.0), wanted.tokens
        alone = generator(name).generate([wanted.prompt], *settings, sources=sources)
        assert [tokens] == alone
        if name != "dynamic_ntk":
            compare(logits, whole_logits(name, wanted, tokens))
