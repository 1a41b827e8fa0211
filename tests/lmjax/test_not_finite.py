"""One NaN among 8,192 numbers shows in losses, norms and generated text, wherever it stands."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.data.tokenizers import CharacterTokenizer
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer
from lmjax.generation import Sampling, TextGenerator
from lmjax.generation.beams import BeamSearch
from lmjax.generation.fill import MaskedTokenInfiller
from lmjax.generation.generator import Generator
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, initialize
from lmjax.objectives import CausalLM
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW, clip_by_global_norm
from lmjax.training.schedules import Constant

VOCABULARY = 8192
MODEL = TransformerConfig(
    vocab_size=VOCABULARY,
    hidden=4,
    num_layers=1,
    max_length=8,
    attention=AttentionConfig(num_heads=2, head_dim=2),
    feed_forward=FeedForwardConfig(size=4),
)
PLACES = st.integers(0, VOCABULARY - 1)


def broken(params, place):
    """The parameters with a NaN in the embedding of one token, which is its row of the head too."""
    table = params["embedding"]["table"]
    table = table.at[place, 1].set(np.nan)
    return params | {"embedding": params["embedding"] | {"table": table}}


@pytest.fixture(scope="module", autouse=True)
def mesh():
    """One device."""
    with jax.set_mesh(Mesh().build(jax.devices()[:1])):
        yield


@functools.cache
def start():
    """Structure and parameters."""
    return initialize(MODEL, training_layout(), jax.random.key(0))


@settings(max_examples=10)
@given(place=st.integers(0, 2 * VOCABULARY - 1), limit=st.sampled_from([None, 1e-3, 1.0, 1e9]))
def test_clipping_the_norm_of_gradients(place, limit):
    gradients = {"a": np.ones((64, 128), np.float32), "b": np.ones((8192,), np.float32)}
    _, norm = jax.jit(clip_by_global_norm, static_argnums=1)(gradients, limit)
    assert float(norm) == pytest.approx(128.0, rel=1e-6)
    gradients["ab"[place // VOCABULARY]].reshape(-1)[place % VOCABULARY] = np.nan
    clipped, norm = jax.jit(clip_by_global_norm, static_argnums=1)(gradients, limit)
    assert np.isnan(norm)
    for leaf in jax.tree.leaves(clipped) if limit is not None else ():
        assert np.isnan(np.asarray(leaf)).all()


@functools.cache
def training():
    """A state, an example, and what trains and evaluates with them."""
    objective = CausalLM(z_loss=1e-4, max_z_loss=1e-4)
    learner = Learner(
        model=MODEL,
        objective=objective,
        optimizer=AdamW(),
        rate=Constant(peak=1e-2, warmup=0).build(1),
        layout=training_layout(),
    )
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9), np.int32)
    example = objective.prepare(tokens, np.ones_like(tokens), np.zeros(2, np.uint64))
    return learner.init(seed=0), example, jax.jit(learner.step), learner.compiled_evaluate


@settings(max_examples=5)
@given(place=PLACES)
def test_the_loss_and_the_norm_of_a_step(place):
    """The broken token need not be one of the example: it could have been."""
    state, example, step, evaluate = training()
    for params, finite in ((state.params, True), (broken(state.params, place), False)):
        _, metrics = step(dataclasses.replace(state, params=params), example)
        numbers = metrics["loss"], metrics["gradient_norm"], evaluate(params, example).loss
        assert [bool(np.isfinite(number)) for number in numbers] == [finite] * 3


GREEDY = Sampling(temperature=0.0)
WAYS = {
    "greedy": GREEDY,
    "greedy, penalised": replace(GREEDY, repetition_penalty=1.3),
    "temperature": Sampling(),
    "top_k": Sampling(top_k=3),
    "top_p": Sampling(top_p=0.5),
    "min_p": Sampling(min_p=0.5),
    "all": Sampling(top_k=3, top_p=0.5, min_p=0.5, repetition_penalty=1.3),
}


@pytest.fixture(scope="module")
def generators():
    """The model, and the same with a broken token or two."""
    params = start()[1]
    return [Generator(MODEL, params)] + [
        Generator(MODEL, broken(params, place)) for place in (0, 4095, VOCABULARY - 1)
    ]


@pytest.mark.parametrize("way", WAYS)
def test_generation_refuses_it(generators, way):
    """Whether the broken token would be chosen or not; the prompt does not hold it."""
    sound, *others = generators
    assert len(sound.generate([[1, 2]], WAYS[way], 2)[0]) == 2
    for generator in others:
        with pytest.raises(UserError, match="no probabilities"):
            generator.generate([[1, 2]], WAYS[way], 2)


def test_a_search_refuses_it(generators):
    for generator in generators[1:]:
        with pytest.raises(UserError, match="no probabilities"):
            BeamSearch(generator)([[1, 2]], beams=2, max_tokens=2)


def test_a_guess_refuses_it():
    config = replace(MODEL, attention=replace(MODEL.attention, causal=False))
    tokenizer = CharacterTokenizer("".join(map(chr, range(32, 32 + VOCABULARY - 2))))
    tokenizer = ExtendedTokenizer(tokenizer, ("[MASK]",))
    filling = MaskedTokenInfiller(cls=None, sep=None)
    _, params = initialize(config, training_layout(), jax.random.key(0))
    text = TextGenerator(Generator(config, params), tokenizer, filling)
    assert len(text.guess("a [MASK]", 2)[0]) == 2
    text = TextGenerator(Generator(config, broken(params, 4095)), tokenizer, filling)
    with pytest.raises(UserError, match="no probabilities"):
        text.guess("a [MASK]", 2)
