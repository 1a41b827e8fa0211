"""The families against an independent implementation: same weights, same logits, same tokens."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.config import replace
from lmjax.generation import Generator, Sampling
from lmjax.interop import huggingface
from lmjax.models import abstract, plain_batch
from lmjax.parallel import Mesh, generation_layout, training_layout

PARITY = Path(__file__).parents[2] / "data" / "parity"
CASES = ("gpt1", "gpt2", "llama", "llama2_gqa")
PROMPT, NEW = 7, 24


def case(name):
    """The folder, its arrays and its tolerance: 2e-5 absolute on logits of about 2.

    The reference differs from its own float64 by up to 2e-6.
    """
    folder = PARITY / name
    return folder, np.load(folder / "case.npz"), json.loads((folder / "case.json").read_text())


def logits_of(graph, params, tokens):
    """The model's logits of whole rows."""

    def run(params, batch):
        model = nnx.merge(graph, params)
        return model.logits(model(batch)[0])

    return np.asarray(jax.jit(run)(params, plain_batch(tokens)))


def check(name, layout):
    """Logits, and greedy tokens through the cache."""
    folder, arrays, description = case(name)
    config, graph, params = huggingface.read(folder, layout)
    logits = logits_of(graph, params, arrays["plain.tokens"])
    expected = arrays["plain.logits"]
    real = expected.shape[-1]
    np.testing.assert_allclose(logits[..., :real], expected, rtol=0, atol=description["tolerance"])
    assert (logits[..., real:] == -1e30).all()

    greedy = arrays["greedy"]
    generator = Generator(config, params)
    rows = generator.generate(greedy[:, :PROMPT].tolist(), Sampling(temperature=0.0), NEW)
    assert rows == greedy[:, PROMPT:].tolist()


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens(one_device, name):
    check(name, training_layout())


@pytest.mark.parametrize("name", ["gpt2", "llama2_gqa"])
def test_logits_and_greedy_tokens_on_a_mesh(name):
    """Grouped heads and learned positions on data x fsdp x tensor; two rows on four devices."""
    with jax.set_mesh(Mesh(data=2, fsdp=2, tensor=2).build()):
        check(name, generation_layout())


def test_layers_in_a_python_loop(one_device):
    folder, arrays, description = case("llama2_gqa")
    config, _, params = huggingface.read(folder, training_layout())
    graph, _ = abstract(replace(config, unroll=0), training_layout())
    logits = logits_of(graph, params, arrays["plain.tokens"])[..., : config.vocab_size]
    np.testing.assert_allclose(
        logits, arrays["plain.logits"], rtol=0, atol=description["tolerance"]
    )
