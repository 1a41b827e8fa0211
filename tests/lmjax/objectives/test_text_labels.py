"""Labelled texts as rows: cuts, second texts, and losses beside those of single texts."""

import functools
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.data import LabelledTexts, build_stores
from lmjax.data.groups import Groups
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.models import (
    AttentionConfig,
    EncoderDecoderConfig,
    FeedForwardConfig,
    TextHeadConfig,
    TokenHeadConfig,
    TransformerConfig,
    plain_batch,
)
from lmjax.objectives import Classification, MultiLabelClassification, Regression, TextLabels
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import to_devices

END = 256  # the only special token of bytes: before each text
LENGTH = 12
MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
    word_head=False,
    token_types=2,
    heads=(
        TextHeadConfig(name="label", outputs=3),
        TextHeadConfig(name="grade", outputs=1),
        TokenHeadConfig(name="tag", outputs=3),
    ),
)
# Of few lengths: the loss of a single text is compiled for each.
TEXTS = ["a", "bc def", "ghij klmnop qrst", "u", "vwx yz", "0123456789 ", "!", "??? ??"]
CLASSES = [0, 1, 2, 2, 1, 0, 1, 2]
CAUSAL = {"causal": MODEL.attention, "encoder": replace(MODEL.attention, causal=False)}


def store_of(folder, records, **fields):
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = LabelledTexts(path=str(folder / "texts.jsonl"), **fields)
    return build_stores(source, ByteTokenizer(), folder / "store")["all"]


@given(
    pairs=st.lists(st.tuples(*[st.text("xyz ", min_size=1).filter(str.strip)] * 2), min_size=1),
    length=st.integers(3, 9),
)
@settings(deadline=None, max_examples=30)
def test_rows_are_those_of_a_loop(pairs, length, tmp_path_factory):
    """The first tokens of a pair that is too long, its last one, and its second text."""
    records = [{"text": a, "other": b, "label": "same"} for a, b in pairs]
    store = store_of(tmp_path_factory.mktemp("pairs"), records, second="other")
    rows = Groups(store, length, 1, keeps_begin=True)
    index = np.arange(len(pairs))
    tokens, segments = rows.read(index, 0 * index)
    example = TextLabels().prepare(
        tokens,
        segments,
        np.zeros(len(pairs), np.uint64),
        spans=rows.spans(index, 0 * index),
        labels=rows.labels(index, 0 * index),
    )
    for row, (first, second) in enumerate(pairs):
        ids = [*ByteTokenizer().opening, *first.encode(), END]
        types = [0] * len(ids)
        rest = [*second.encode(), *ByteTokenizer().closing]
        ids, types = ids + rest, types + [1] * len(rest)
        if len(ids) > length:
            ids, types = [*ids[: length - 1], ids[-1]], types[:length]
        filling = [0] * (length - len(ids))
        assert example.inputs.tokens[row].tolist() == ids + filling
        assert example.inputs.token_types[row].tolist() == types + filling
        assert example.inputs.segments[row].tolist() == [1] * len(ids) + filling
    np.testing.assert_array_equal(example.targets.labels, 0 * index[:, None])
    np.testing.assert_array_equal(example.targets.weights, 1 + 0 * index[:, None])


def rows_of(objective, values):
    """An example of `TEXTS`; a value of None is a text without a label."""
    tokens = np.zeros((len(TEXTS), LENGTH), np.int32)
    segments = np.zeros_like(tokens)
    for row, text in enumerate(TEXTS):
        ids = ids_of(text)
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
    labels = np.array([[[0, math.nan if v is None else v]] for v in values], np.float32)
    return objective.prepare(tokens, segments, np.zeros(len(TEXTS), np.uint64), labels=labels)


def ids_of(text):
    return [END, *text.encode()][:LENGTH]


def learner_of(objective, attention=MODEL.attention, word_head=False, **fields):
    model = replace(MODEL, attention=attention, word_head=word_head)
    return Learner(model, objective, AdamW(), lambda step: 1e-2, training_layout(), **fields)


def alone(learner, params, words=False):
    """Text -> its outputs of the heads on texts by name, or the logits of words too, in float64."""

    @jax.jit
    def run(params, batch):
        model = nnx.merge(learner.graph, params)
        hidden, _ = model(batch)
        found = {head: model.outputs(head, hidden, batch)[0, 0] for head in ("label", "grade")}
        return found | ({"words": model.logits(hidden)[0, :, :257]} if words else {})

    def outputs(text):
        found = run(params, plain_batch(np.array([ids_of(text)], np.int32)))
        return {name: np.asarray(a, np.float64) for name, a in found.items()}

    return outputs


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("objective", [Classification(), Regression(head="grade")])
def test_losses_are_those_of_single_texts(kind, objective, one_device):
    """Without padding, by the formula; a text without a label does not count. To float32."""
    learner = learner_of(TextLabels(objective=objective), CAUSAL[kind])
    state = learner.init(seed=0)
    outputs = alone(learner, state.params)
    values = [None, *CLASSES[1:]]
    total = 0.0
    for text, value in list(zip(TEXTS, values, strict=True))[1:]:
        out = outputs(text)[objective.head]
        if objective.head == "label":
            total += np.log(np.exp(out).sum()) - out[value]
        else:
            total += (out[0] - value) ** 2
    example = to_devices(rows_of(learner.objective, values), learner.layout, 257)
    sums = learner.compiled_evaluate(state.params, example)
    assert float(sums.weight) == len(TEXTS) - 1 == float(learner.objective.weight(example))
    assert float(sums.loss) == pytest.approx(total, rel=1e-5)


def test_words_are_learnt_beside_labels(one_device):
    """The label's loss and half the mean loss of a text's tokens, by a loop. To float32."""
    learner = learner_of(TextLabels(words=0.5), word_head=True)
    state = learner.init(seed=0)
    outputs = alone(learner, state.params, words=True)
    values, total, words = [None, *CLASSES[1:]], 0.0, 0.0
    for text, value in list(zip(TEXTS, values, strict=True))[1:]:
        found = outputs(text)
        out, after = found["label"], ids_of(text)[1:]
        total += np.log(np.exp(out).sum()) - out[value]
        each = [np.log(np.exp(row).sum()) - row[word] for row, word in zip(found["words"], after)]
        words += np.mean(each)
    example = to_devices(rows_of(learner.objective, values), learner.layout, 257)
    sums = learner.compiled_evaluate(state.params, example)
    assert float(sums.weight) == len(TEXTS) - 1
    assert float(sums.loss) == pytest.approx(total + 0.5 * words, rel=1e-5)
    assert float(sums.extra["cross_entropy"]) == pytest.approx(total, rel=1e-5)
    assert float(sums.extra["words_loss"]) == pytest.approx(words, rel=1e-5)


MESH = {"fsdp": 2, "context": 2, "tensor": 2}


@functools.cache
def gradients(words, fsdp=1, context=1, tensor=1, **fields):
    shape = {"fsdp": fsdp, "context": context, "tensor": tensor}
    devices = jax.devices()[: math.prod(shape.values())]
    with jax.set_mesh(Mesh(**shape).build(devices)):
        kind = CAUSAL["causal" if words else "encoder"]
        learner = learner_of(TextLabels(words=words), kind, words > 0, **fields)
        state = learner.init(seed=0)
        example = to_devices(rows_of(learner.objective, [*CLASSES[:-1], None]), learner.layout, 257)
        found, sums = jax.jit(learner.gradients)(state, example, state.key)
        return float(sums.loss), float(sums.weight), jax.device_get(found)


@pytest.mark.parametrize(
    ("words", "settings"),
    [(0.5, MESH | {"microbatch": 4}), (0.0, MESH)],
    ids=["accumulated", "an encoder"],
)
def test_any_mesh_and_accumulation_gives_the_gradients_of_one_device(words, settings):
    """To 1e-6 of the largest gradient: the same sums in another order."""
    one, other = gradients(words), gradients(words, **settings)
    assert one[1] == other[1] == 7
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(one[2]))
    for a, b in zip(jax.tree.leaves(one[2]), jax.tree.leaves(other[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * scale)


def test_models_and_objectives_that_do_not_fit():
    with pytest.raises(UserError, match="MultiLabelClassification: a text has one class"):
        TextLabels(objective=MultiLabelClassification())
    with pytest.raises(UserError, match=r"words=-0.5: a weight is 0 or more"):
        TextLabels(words=-0.5)
    with pytest.raises(UserError, match=r"TextLabels needs a model whose tokens do not see"):
        TextLabels(words=0.5).check(replace(MODEL, attention=CAUSAL["encoder"]))
    for objective, message in (
        (Classification(head="tag"), "the head 'tag' is not one of texts"),
        (Classification(head="topic"), "trains a head of the name 'topic'"),
        (Regression(), "the head 'label' has 3 outputs; a text has one number"),
    ):
        with pytest.raises(UserError, match=message):
            TextLabels(objective=objective).check(MODEL)
    fields = {name: getattr(MODEL, name) for name in ("vocab_size", "hidden", "max_length")}
    with pytest.raises(UserError, match="nothing to the encoder"):
        TextLabels().check(EncoderDecoderConfig(**fields, heads=MODEL.heads))
