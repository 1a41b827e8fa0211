"""Prompts inserted into a running batch: each row gives what its prompt gives alone."""

import dataclasses
import functools

import jax
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
)
from lmjax.parallel import Mesh, generation_layout

VOCABULARY, HEADS, SLOTS, CAPACITY = 61, 4, 4, 40
SOURCE = 20  # tokens of an encoder's text in the batch; prefilled ones are padded to 16
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
    layers = len(attention.windows)
    return replace(LEARNED, positions=None, attention=attention, num_layers=layers)


FAMILIES = {
    "learned": LEARNED,
    "dynamic_ntk": in_attention(Rotary(scaling=DynamicNTKScaling(length=6))),
    "windows_in_turn": in_attention(Rotary(), num_kv_heads=2, windows=(5, None)),
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
SLOW = {"learned", "chatglm"}  # positions of others, of which each is here with another part


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
    batch = model.put_on_devices(prompt_batch([request.prompt], sources))
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
    cache = model.decoder.free_rows(slots, CAPACITY, SOURCE if name == "t5" else None)
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


@functools.cache
def whole(name):
    """The model without a cache, compiled: logits at every column of a batch."""
    model = generator(name)
    graph, _ = abstract(model.config, model.layout)

    @jax.jit
    def logits(params, batch):
        transformer = nnx.merge(graph, params)
        return transformer.logits(transformer(batch)[0])[..., :VOCABULARY]

    params = model.params
    return lambda batch: np.asarray(logits(params, model.put_on_devices(batch)))


def whole_logits(name, request, tokens):
    """Logits before each of the tokens that follow a request, from the model without a cache."""
    text = [*tokens_of(request.prompt), *tokens]
    if isinstance(request.prompt, Batch):
        blank, start = int(request.prompt.positions[-1]), int(request.prompt.tokens[-1])
        text = blank_row(text[: -1 - len(tokens)], [(blank, [start, *tokens])])
    texts = [text, [0] * 33]  # a second row, so that all are padded alike
    sources = None if request.source is None else [request.source, [0] * 16]
    return whole(name)(prompt_batch(texts, sources))[0, -len(tokens) - 1 : -1]


def compare(found, expected):
    """2e-5 of the largest logit: float32 sums over another batch, or padded otherwise."""
    assert len(found) == len(expected)
    atol = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


# (step, slot, length of the prompt, tokens that follow): of slot 1 the third row comes after the
# first, which was longer; slot 3 is never used.
ARRIVALS = [(0, 1, 9, 6), (2, 0, 3, 16), (3, 1, 5, 12), (4, 2, 17, 4), (11, 2, 1, 9)]


def requests(name):
    return [
        (when, slot, request(name, seed, length, tokens))
        for seed, (when, slot, length, tokens) in enumerate(ARRIVALS)
    ]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
                                  for name in FAMILIES])  # fmt: skip
def test_a_row_gives_what_its_prompt_gives_alone(name):
    """Greedy tokens and their log-probabilities are those of `Generator`.

    Logits are those of the model without a cache; not where the rotation follows from the length of
    the prompt, so that a text has another one.
    """
    arrivals = requests(name)
    for (tokens, logits), (_, _, wanted) in zip(serve(name, arrivals), arrivals):
        sources = None if wanted.source is None else [wanted.source]
        settings = Sampling(temperature=0.0), wanted.tokens
        (alone,) = generator(name).continuations([wanted.prompt], *settings, sources=sources)
        assert tokens == alone.tokens
        best = np.max(jax.nn.log_softmax(np.array(logits)), axis=1)
        atol = 2e-5 * np.abs(logits).max()  # as in `compare`
        np.testing.assert_allclose(best, alone.log_probabilities, rtol=0, atol=atol)
        if name != "dynamic_ntk":
            compare(logits, whole_logits(name, wanted, tokens))


@pytest.mark.parametrize(
    "name, unstack",
    [
        *((name, True) for name in ("windows_in_turn", "alibi_window", "glm", "t5")),
        ("windows_in_turn", False),
        pytest.param("t5", False, marks=pytest.mark.slow),
    ],
)
def test_the_other_rows_change_no_bit(name, unstack):
    """The same shapes: a row alone among free ones, or late and between others."""
    model = generator(name, unstack)
    arrivals = requests(name)
    together = serve(name, arrivals, model)
    for number in (1, 3, 4):
        _, slot, wanted = arrivals[number]
        ((tokens, logits),) = serve(name, [(0, slot, wanted)], model)
        assert tokens == together[number][0]
        np.testing.assert_array_equal(logits, together[number][1])


@st.composite
def schedules(draw):
    """Requests of any lengths, at any steps, for any slots."""
    count = draw(st.integers(1, 6))
    shape = st.tuples(
        st.integers(0, 12),  # step
        st.integers(0, SLOTS - 1),
        st.integers(1, 16),  # tokens of the prompt
        st.integers(1, 16),  # that follow
        st.integers(0, 2**32 - 1),
    )
    return [draw(shape) for _ in range(count)]


@pytest.mark.parametrize("name", ["windows_in_turn", "alibi_window", "glm", "t5"])
@settings(max_examples=12)
@given(schedule=schedules())
def test_any_order_of_any_lengths(name, schedule):
    """Beside the model without a cache, whose largest logit is the next token."""
    arrivals = [
        (when, slot, request(name, seed, length, tokens))
        for when, slot, length, tokens, seed in schedule
    ]
    for (tokens, logits), (_, _, wanted) in zip(serve(name, arrivals), arrivals):
        expected = whole_logits(name, wanted, tokens)
        compare(logits, expected)
        np.testing.assert_array_equal(tokens, np.argmax(logits, axis=1))


def test_rows_that_wait_go_on_where_they_were():
    """Each step takes other rows, so that lengths drift apart."""
    name, model = "windows_in_turn", generator("windows_in_turn")
    wanted = [request(name, seed, length, 8) for seed, length in enumerate((3, 9, 16, 6))]
    cache, logits = model.decoder.free_rows(SLOTS, CAPACITY), np.zeros((SLOTS, VOCABULARY))
    for slot, one in enumerate(wanted):
        first, row = prefilled(model, one)
        cache, logits[slot] = model.decoder.insert(cache, [slot], row), np.asarray(first)[0]
    draw, found = np.random.default_rng(0), [([], []) for _ in wanted]
    for slot in range(SLOTS):
        found[slot][0].append(int(logits[slot].argmax()))
        found[slot][1].append(logits[slot].copy())
    while any(len(tokens) < 8 for tokens, _ in found):
        going = draw.random(SLOTS) < 0.5
        going &= [len(tokens) < 8 for tokens, _ in found]
        newest = np.array([tokens[-1] for tokens, _ in found], np.int32)
        new, cache = model.decoder.step(model.weights, cache, newest, going)
        for slot in np.flatnonzero(going):
            found[slot][1].append(np.asarray(new)[slot])
            found[slot][0].append(int(found[slot][1][-1].argmax()))
    assert np.asarray(cache.lengths).tolist() == [10, 16, 23, 13]
    for (tokens, logits), one in zip(found, wanted):
        compare(logits, whole_logits(name, one, tokens))


def test_several_rows_at_once():
    """A batch of prompts into slots out of order is one prompt after another."""
    name, model = "windows_in_turn", generator("windows_in_turn")
    wanted = [request(name, seed, length, 1) for seed, length in enumerate((3, 9, 16))]
    batch = model.put_on_devices(prompt_batch([one.prompt for one in wanted], None))
    logits, rows = model.decoder.prefill(model.weights, batch)
    cache = model.decoder.free_rows(SLOTS, CAPACITY)
    cache = model.decoder.insert(cache, [2, 0, 3], rows)
    newest = np.zeros(SLOTS, np.int32)
    newest[[2, 0, 3]] = np.asarray(logits).argmax(axis=1)
    logits, cache = model.decoder.step(model.weights, cache, newest)
    assert np.asarray(cache.lengths).tolist() == [10, 0, 4, 17]
    for slot, one in zip([2, 0, 3], wanted):
        expected = whole_logits(name, one, [int(newest[slot]), 0])[1]
        compare(np.asarray(logits)[slot], expected)


def test_padding_on_the_right_is_padding_on_the_left():
    """Prompts of a batch that begin in its first column, with the logits after their last token."""
    model = generator("windows_in_turn")
    texts = [request("learned", seed, length, 1).prompt for seed, length in enumerate((3, 9, 16))]
    left = prompt_batch(texts, None)
    shift = [16 - len(text) for text in texts]
    right = jax.tree.map(lambda a: np.stack([np.roll(row, -n) for row, n in zip(a, shift)]), left)
    assert right.segments[:, 0].tolist() == [1, 1, 1]
    (expected, _), (found, cache) = (
        model.decoder.prefill(model.weights, model.put_on_devices(batch)) for batch in (left, right)
    )
    compare(found, expected)
    assert np.asarray(cache.lengths).tolist() == [3, 9, 16]


def test_compiled_once():
    """Of all schedules: one program a verb and shape, and other weights compile nothing."""
    programs = Decoder.prefill, Decoder._insert, Decoder.step
    name = "windows_in_turn"
    serve(name, requests(name))
    compiled = [program._cache_size() for program in programs]
    arrivals = [(when + 1, (slot + 1) % SLOTS, wanted) for when, slot, wanted in requests(name)]
    model = generator(name)
    other = Generator(model.config, jax.tree.map(lambda a: -a, model.params))
    assert serve(name, arrivals, other)[0][0] != serve(name, arrivals)[0][0]
    assert [program._cache_size() for program in programs] == compiled
    before = Decoder.step._cache_size()
    serve(name, arrivals[:1], slots=SLOTS + 1)
    assert Decoder.step._cache_size() == before + 1


@pytest.mark.parametrize("name", ["windows_in_turn", pytest.param("t5", marks=pytest.mark.slow)])
def test_a_mesh_gives_the_tokens_of_one_device(name):
    """Rows over data and fsdp, heads over tensor; a row alone lies whole on every device."""
    expected = serve(name, requests(name))
    with jax.set_mesh(Mesh(data=2, fsdp=2, tensor=2).build()):
        found = serve(name, requests(name), generator.__wrapped__(name))
    for (tokens, logits), (one_tokens, one_logits) in zip(found, expected):
        assert tokens == one_tokens
        compare(logits, one_logits)


def test_rows_that_cannot_be_inserted():
    model, t5 = generator("windows_in_turn"), generator("t5")
    _, row = prefilled(model, request("windows_in_turn", 0, 17, 1))
    _, text = prefilled(t5, request("t5", 0, 3, 1))
    for slots, message in (
        ([0, 1], "1 rows to insert, but 2 slots"),
        ([4], "slots=.4.: give different numbers from 0 to 3"),
        ([-1], "from 0 to 3"),
    ):
        with pytest.raises(UserError, match=message):
            model.decoder.insert(model.decoder.free_rows(SLOTS, CAPACITY), slots, row)
    with pytest.raises(UserError, match="room for 32 tokens do not fit into rows of 20"):
        model.decoder.insert(model.decoder.free_rows(SLOTS, 20), [0], row)
    with pytest.raises(UserError, match="one without"):
        t5.decoder.insert(t5.decoder.free_rows(SLOTS, CAPACITY), [0], text)
    with pytest.raises(UserError, match="16 tokens of the encoder do not fit into rows of 8"):
        t5.decoder.insert(t5.decoder.free_rows(SLOTS, CAPACITY, 8), [0], text)
    batch = model.put_on_devices(prompt_batch([[1]], None))
    with pytest.raises(UserError, match="length=8: the batch has 16 columns"):
        model.decoder.prefill(model.weights, batch, length=8)
