"""Tiny models that texts are scored with, and a plain loop over prefixes to compare with."""

import functools
import string

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmjax.config import replace
from lmjax.data.tokenizers import CharacterTokenizer
from lmjax.generation import Generator, TextGenerator
from lmjax.interop import huggingface
from lmjax.models import Batch, abstract
from lmjax.parallel import generation_layout
from tests.parity_cases import finished_folder

# 96 characters and the separator: as many tokens as the models of the parity cases have.
TOKENIZER = CharacterTokenizer("".join(sorted({*string.printable[:95], "\n"})))


def read_model(name, length=None, tokenizer=TOKENIZER, window=None):
    """A model of tests/data/parity with a token a character, on the mesh that is set."""
    config, _, params = huggingface.read(finished_folder(name), generation_layout())
    if length is not None:
        config = replace(config, max_length=length)
    if window is not None:
        config = replace(config, attention=replace(config.attention, windows=(window,)))
    return TextGenerator(Generator(config, params), tokenizer)


def loop_over_prefixes(text, context, continuation):
    """Log-probability of each token of a continuation, and the likeliest one there.

    A row for each prefix, on its own, without a cache.
    """
    generator = text.generator
    tokens = [*context, *continuation]
    rows, segments = np.zeros((2, 16 * -(-len(continuation) // 16), 64), np.int32)
    for row in range(len(continuation)):
        size = len(context) + row
        rows[row, :size], segments[row, :size] = tokens[:size], 1
    positions = np.broadcast_to(np.arange(64, dtype=np.int32), rows.shape)
    batch = Batch(tokens=rows, positions=positions, segments=segments)
    program = whole_rows(generator.config, generator.layout)
    last = np.asarray(program(generator.params, batch))[: len(continuation)]
    return last[np.arange(len(continuation)), list(continuation)], last.argmax(1)


@functools.lru_cache
def whole_rows(config, layout):
    """Compiles once: log-probabilities after the last token of each row."""
    graph, _ = abstract(config, layout)

    @jax.jit
    def program(params, batch):
        model = nnx.merge(graph, params)
        logits = model.logits(model(batch)[0])[..., : config.vocab_size]
        last = (jnp.sum(batch.segments, axis=1) - 1)[:, None, None]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), last, axis=1)[:, 0]

    return program
