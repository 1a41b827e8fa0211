"""Vectors and perplexities of documents by a trained model, beside one text at a time."""

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.data.cleaning.step import Dropped
from lmjax.data.documents import Document
from lmjax.generation import load_run
from lmjax.generation.embeddings import ModelPerplexity, ModelStates
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    TransformerConfig,
    abstract,
    plain_batch,
)
from lmjax.parallel import Mesh
from tests.lmjax.jobs.base_run import write_base

TEXTS = ["line 3 and 9", "", "line 17 and 289\nline 18 and 324", "x"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    model = TransformerConfig(
        vocab_size=257,
        hidden=16,
        num_layers=2,
        max_length=32,
        attention=AttentionConfig(num_heads=2, head_dim=8),
        feed_forward=FeedForwardConfig(size=32),
    )
    write_base(folder, model)
    return str(folder / "base")


def alone(loaded, text):
    """States and logits of a text by itself, without padding."""
    tokens = [256, *(loaded.tokenizer.encode(text) or [256])][:32]
    config = loaded.generator.config
    graph, _ = abstract(config, loaded.generator.layout)

    @jax.jit
    def both(params, batch):
        model = nnx.merge(graph, params)
        states, _ = model(batch)
        return states[0], model.logits(states)[0]

    found = both(loaded.generator.params, plain_batch(np.array([tokens], np.int32)))
    return tokens, *map(np.asarray, found)


def test_vectors_are_means_of_states_and_perplexities_those_of_the_logits(run):
    documents = [Document(text, f"d{n}") for n, text in enumerate(TEXTS)]
    found = ModelStates(model=run, tokens=64, rows=3).vectors(documents)
    assert found.shape == (4, 16) and found.dtype == np.float32
    step = ModelPerplexity(model=run, most=1e6)
    with jax.set_mesh(Mesh().build()):
        loaded = load_run(run)
        for row, text in zip(found, TEXTS, strict=True):
            tokens, states, logits = alone(loaded, text)
            # Single precision, another order of the sums.
            np.testing.assert_allclose(row, states.mean(0), atol=2e-5)
            logs = np.asarray(jax.nn.log_softmax(logits[:-1, :257]))
            picked = logs[np.arange(len(tokens) - 1), tokens[1:]]
            value = step(Document(text, "d")).metadata["perplexity"]
            assert value == pytest.approx(np.exp(-picked.mean()), rel=1e-3, abs=0.01)


def test_the_band_drops_what_is_outside(run):
    low = ModelPerplexity(model=run, most=1.001)(Document(TEXTS[0], "d"))
    assert isinstance(low, Dropped) and low.reason == "the perplexity is high"
    high = ModelPerplexity(model=run, least=1e5, most=1e6)(Document(TEXTS[0], "d"))
    assert high.reason == "the perplexity is low"
