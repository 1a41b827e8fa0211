"""Held-out scores against a sum over every token, written down with plain loops."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, config
from lmjax.data import TextFiles, build_stores
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.evaluation.held_out import HeldOut
from lmjax.models import (
    AttentionConfig,
    Batch,
    FeedForwardConfig,
    Normal,
    TransformerConfig,
    initialize,
)
from lmjax.objectives import CausalLM, Sums
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW

LENGTH = 8
TEXTS = ("one two three", "äöü", "a", "the last of the documents is the longest of them all")
MODEL = TransformerConfig(
    vocab_size=257,
    hidden=8,
    num_layers=1,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=2, head_dim=4),
    feed_forward=FeedForwardConfig(size=16),
    initializer=Normal(std=0.5),
    dropout=0.5,
)


@pytest.fixture
def store(tmp_path):
    """The texts as a token store: a separator before each document."""
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    source = TextFiles(path=str(tmp_path / "corpus.txt"), split="line")
    return build_stores(source, ByteTokenizer(), tmp_path / "store")["all"]


def held_out(store, **settings):
    defaults = {"objective": CausalLM(z_loss=1.0), "layout": training_layout(), "batch_size": 8}
    defaults |= {"length": LENGTH, "vocab_size": MODEL.vocab_size}
    return HeldOut(stores={"texts": store}, **(defaults | settings))


def score(store, mesh, devices, **settings):
    """The score of a model of fixed parameters on a mesh."""
    with jax.set_mesh(mesh.build(jax.devices()[:devices])):
        _, params = initialize(MODEL, training_layout(), jax.random.key(0))
        sets = held_out(store, **settings)
        learner = Learner(MODEL, sets.objective, AdamW(), lambda step: 0.0, sets.layout)
        return sets.score(learner.compiled_evaluate, params)["texts"]


def plain_nats():
    """Nats of each token: the stream cut every eight tokens, documents apart, no batch."""
    stream, document = [], []
    for number, text in enumerate(TEXTS):
        tokens = [256, *text.encode("utf-8")]
        stream += tokens
        document += [number] * len(tokens)
    stream, document = [*stream, 256], [*document, len(TEXTS)]  # the first begins again
    nats = []
    with jax.set_mesh(Mesh().build(jax.devices()[:1])):
        graph, params = initialize(MODEL, training_layout(), jax.random.key(0))
        model = nnx.merge(graph, params)

        @jax.jit
        def predict(tokens, positions, segments):
            batch = Batch(tokens=tokens, positions=positions, segments=segments)
            return model.logits(model(batch)[0])[0, :, :257]

        for first in range(0, len(stream) - 1, LENGTH):
            count = min(LENGTH, len(stream) - 1 - first)
            tokens, positions, segments = (np.zeros((1, LENGTH), np.int32) for _ in range(3))
            for i in range(count):
                tokens[0, i] = stream[first + i]
                segments[0, i] = document[first + i] + 1
                same = i > 0 and document[first + i] == document[first + i - 1]
                positions[0, i] = positions[0, i - 1] + 1 if same else 0
            logits = np.asarray(predict(tokens, positions, segments), np.float64)
            for i in range(count):
                nats.append(np.logaddexp.reduce(logits[i]) - logits[i, stream[first + i + 1]])
    return nats


def test_score_is_the_mean_over_every_token(store):
    nats = plain_nats()
    found = score(store, Mesh(), 1)
    assert found.tokens == len(nats) == sum(1 + len(text.encode("utf-8")) for text in TEXTS)
    # The model computes in float32, sums of some eighty numbers.
    assert found.loss == pytest.approx(np.mean(nats), rel=1e-5)
    text_bytes = sum(len(text.encode("utf-8")) for text in TEXTS)
    assert found.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / text_bytes, rel=1e-5)


@pytest.mark.parametrize(
    ("mesh", "devices", "batch_size"),
    [(Mesh(), 1, 3), (Mesh(), 1, 64), (Mesh(fsdp=4, tensor=2), 8, 4), (Mesh(context=2), 2, 1)],
)
def test_score_depends_on_neither_mesh_nor_batch(store, mesh, devices, batch_size):
    found = score(store, mesh, devices, batch_size=batch_size)
    expected = score(store, Mesh(), 1)
    assert found.tokens == expected.tokens
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-5)


def test_a_part_of_a_set_is_its_first_rows(store):
    nats = plain_nats()[: 3 * LENGTH]
    found = score(store, Mesh(), 1, tokens=3 * LENGTH + 1, batch_size=2)
    assert found.tokens == len(nats)
    assert found.loss == pytest.approx(np.mean(nats), rel=1e-5)
    whole = score(store, Mesh(), 1)
    bytes_per_token = store.text_bytes / whole.tokens
    assert found.bits_per_byte == pytest.approx(
        np.mean(nats) / math.log(2) / bytes_per_token, rel=1e-5
    )


@config
class Overlapping(CausalLM):
    """Every row goes on in the middle of the one before."""

    def row_overlap(self, length):
        """The last target and the half of the row."""
        return 1 + length // 2


def test_rows_overlap_as_the_objective_says(store):
    size = store.manifest.tokens
    found = score(store, Mesh(), 1, objective=Overlapping())
    assert found.tokens == sum(min(LENGTH, size - first) for first in range(0, size, LENGTH // 2))


@config
class Unnamed(CausalLM):
    """A loss that does not say which part of it is cross-entropy."""

    def loss(self, model, example, key, frozen=None):
        """The cross-entropy alone, doubled."""
        sums = CausalLM().loss(model, example, key)
        return Sums(2 * sums.loss, sums.weight, {})


def test_a_loss_that_names_no_cross_entropy_is_scored_whole(store):
    expected = score(store, Mesh(), 1, objective=CausalLM())
    found = score(store, Mesh(), 1, objective=Unnamed())
    assert found.loss == pytest.approx(2 * expected.loss, rel=1e-6)
    assert found.tokens == expected.tokens


@config
class Astray(CausalLM):
    """An objective of one's own that makes a target which no model of these tokens has."""

    def prepare(self, tokens, segments, seeds, lexicon, length):
        """One target too large, and another where it has no weight."""
        example = CausalLM().prepare(tokens, segments, seeds)
        example.targets.tokens[-1, -1] = example.targets.tokens[2, 3] = MODEL.vocab_size
        return example


def test_targets_that_the_model_does_not_have_are_refused(store):
    with pytest.raises(UserError, match=r"targets\[2, 3\] of the batch is 257; .*0 to 256"):
        score(store, Mesh(), 1, objective=Astray())


def test_text_that_the_tokens_do_not_hold_has_a_loss_alone(store, monkeypatch):
    expected = score(store, Mesh(), 1)
    lost = dataclasses.replace(store.manifest.round_trip, lost=10, example=("A", "a"))
    monkeypatch.setattr(
        store, "manifest", dataclasses.replace(store.manifest, round_trip=lost), raising=True
    )
    found = score(store, Mesh(), 1)
    assert (found.loss, found.tokens) == (expected.loss, expected.tokens)
    assert expected.withheld == "" and found.bits_per_byte is None
    assert found.withheld == store.not_comparable() != ""
    # Where not all text is predicted, there is nothing to withhold.
    assert score(store, Mesh(), 1, objective=NotAllText()).withheld == ""


@config
class NotAllText(CausalLM):
    """An objective that does not say that it predicts all of the text."""

    @property
    def predicts_text(self):
        """No."""
        return False


@config
class Nothing(CausalLM):
    """An objective without a single target."""

    def prepare(self, tokens, segments, seeds, lexicon, length):
        """All padding."""
        return CausalLM().prepare(tokens, np.zeros_like(segments), seeds)


def test_a_set_without_a_target_is_refused(store):
    with pytest.raises(UserError, match="texts holds nothing to predict"):
        score(store, Mesh(), 1, objective=Nothing())
