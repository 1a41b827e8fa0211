"""Tiny models, engines over them, and what `lmjax.generation` says that they answer."""

import functools

import jax
import numpy as np

from lmjax.config import replace
from lmjax.generation import Generator, Sampling
from lmjax.models import (
    ALiBi,
    AttentionConfig,
    DynamicNTKScaling,
    ExpertsConfig,
    FeedForwardConfig,
    Rotary,
    TransformerConfig,
    initialize,
)
from lmjax.parallel import generation_layout
from lmjax.serving.engine import Engine
from lmjax.serving.request import CollectedAnswer, TokenRequest
from lmjax.serving.settings import EngineSettings
from lmjax.serving.weights import ServedWeights
from tests.larger import larger

VOCABULARY = 61
GREEDY = Sampling(temperature=0.0)
ATTENTION = AttentionConfig(num_heads=4, head_dim=8)
LEARNED = TransformerConfig(
    vocab_size=VOCABULARY,
    hidden=32,
    num_layers=2,
    max_length=96,
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
    "experts": replace(LEARNED, feed_forward=ExpertsConfig(size=16, experts=4)),
}
SMALL = EngineSettings(slots=3, cache_tokens=256, page=4, chunk=16)


@functools.cache
def make_generator(family="rotary", seed=0):
    """A generator of random weights, large enough that its answers differ; a mesh must be set."""
    config = FAMILIES[family]
    _, params = initialize(config, generation_layout(), jax.random.key(seed))
    return Generator(config, larger(params, 4, axes=2))


def make_engine(family="rotary", settings=SMALL, draft=None, **more):
    """An engine of one model, named tiny, and of others by name."""
    weights = {"tiny": make_generator(family)} | more
    draft = None if draft is None else ServedWeights.of(draft)
    return Engine({n: ServedWeights.of(g) for n, g in weights.items()}, settings, draft)


def request(tokens, max_tokens=12, **settings):
    """A greedy request to the model."""
    return TokenRequest(
        tokens, **({"sampling": GREEDY, "model": "tiny"} | settings), max_tokens=max_tokens
    )


def answered(engine, requests, arrivals=None, most=2000):
    """The answers to requests, each submitted before the step of its arrival."""
    answers = [CollectedAnswer() for _ in requests]
    arrivals = [0] * len(requests) if arrivals is None else arrivals
    for step in range(most):
        for one, answer, arrival in zip(requests, answers, arrivals):
            if arrival == step:
                engine.submit(one, answer)
        busy = engine.step()
        engine._book.check()
        if not busy and step >= max(arrivals):
            break
    assert all(answer.reason is not None for answer in answers)
    assert_idle(engine)
    return answers


def assert_idle(engine):
    """Nothing is held."""
    load = engine.load()
    assert (load.waiting, load.reading, load.writing, load.pages) == (0, 0, 0, 0)


ROWS, LONGEST = 6, 32  # of the generator's batches, so that it is compiled once for a sampling


def expected(requests, family="rotary", seed=0, read=list):
    """Continuations of the requests by the generator, those with equal settings together."""
    generator, found = make_generator(family, seed), {}
    for number, one in enumerate(requests):
        settings = one.sampling, one.max_tokens, tuple(one.stop_tokens)
        found.setdefault(settings, []).append(number)
    rows = [None] * len(requests)
    for (sampling, *how), numbers in found.items():
        together = ROWS if sampling.temperature == 0 else 1  # else each row has the next seed
        for begin in range(0, len(numbers), together):
            part = numbers[begin : begin + together]
            texts = [read(requests[number].tokens) for number in part]
            texts += [[0] * LONGEST] * (ROWS - len(texts))
            for number, row in zip(part, generator.continuations(texts, sampling, *how)):
                rows[number] = row
    return rows


def prompts(seed, lengths, vocabulary=VOCABULARY):
    """Random prompts."""
    draw = np.random.default_rng(seed)
    return [draw.integers(0, vocabulary, length).tolist() for length in lengths]
