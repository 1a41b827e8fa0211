"""The loss on replies: what is learned of a row, and packed conversations beside single ones."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.data import ChatTemplate, Conversations, WholeDocuments, build_stores
from lmjax.data.chat.folder import FolderTemplate
from lmjax.data.loss_weights import LossWeights
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.spans import KINDS, RowSpans
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.objectives import CausalLM, ChatLM
from lmjax.objectives.chat_lm import last_of_segments
from lmjax.objectives.example import TokenTargets
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import to_devices
from tests.lmjax.data.chat.chat_families import FAMILIES
from tests.lmjax.data.chat.chat_folders import write_folder

LENGTH = 48
END = 256
MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=2,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(size=32),
)
TEMPLATE = ChatTemplate(user=("<{content}>",), assistant=("{content}",))


def talk(turns):
    """A record whose messages are these texts, a user's and an assistant's in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    return {"messages": messages}


def stored(folder, records, **settings):
    path = folder / "talks.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    source = Conversations(path=str(path), template=TEMPLATE, **settings)
    return build_stores(source, ByteTokenizer(), folder / "store")["all"]


def example_of(objective, rows, number):
    """Example of some rows of whole documents."""
    number = np.asarray(number)
    tokens, segments = rows.read(number, np.zeros_like(number))
    seeds = np.zeros(len(number), np.uint64)
    spans = rows.spans(number, np.zeros_like(number))
    return objective.prepare(tokens, segments, seeds, None, LENGTH, spans=spans)


def learned(example, row=0):
    """Text of the targets with weight; the end of a document is a dot."""
    targets, weights = example.targets.tokens[row], example.targets.weights[row]
    return "".join("." if token == END else chr(token) for token in targets[weights > 0])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Conversations of two turns and of one, and a text."""
    records = [talk(["ab", "cd", "ef", "gh"]), talk(["l", "m"]), {"text": "ijk"}]
    return WholeDocuments(stored(tmp_path_factory.mktemp("mixed"), records), LENGTH + 1)


@pytest.mark.parametrize(
    ("loss_on", "found"),
    [
        ("assistant", ("cdgh.", "m.")),
        ("last", ("gh.", "m.")),
        ("all", ("ab>cd<ef>gh.", "l>m.")),
    ],
)
def test_targets_of_a_row(mixed, loss_on, found):
    """Replies with their end; a text whole, and its end, but nothing of it from a conversation.

    The first token of a conversation, here <, is no target.
    """
    assert mixed.count == 1
    row = learned(example_of(ChatLM(loss_on=loss_on), mixed, [0]))
    for part in found:
        assert part in row
        row = row.replace(part, "", 1)
    assert row == "ijk."


def test_the_end_is_learnt_where_the_tokenizer_also_pads_with_it(tmp_path):
    """Of a public folder as LLaMA's are completed: every end has weight, of each reply one."""
    write_folder(tmp_path, FAMILIES["llama2"])
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "</s>"}))
    (tmp_path / "talks.jsonl").write_text(json.dumps(talk(["ab", "cd", "ef", "gh"])))
    template = FolderTemplate(path=str(tmp_path))
    source = Conversations(path=str(tmp_path / "talks.jsonl"), template=template)
    tokenizer = read_tokenizer(tmp_path)
    rows = WholeDocuments(build_stores(source, tokenizer, tmp_path / "store")["all"], LENGTH + 1)
    targets = example_of(ChatLM(), rows, [0]).targets
    ends = targets.weights[targets.tokens == tokenizer.end]
    assert ends.tolist() == [1, 1]


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_padding_may_be_any_token(mixed, loss_on):
    """What is padding is known by its segment: no token stands for it, also not the end."""
    tokens, segments = mixed.read(np.zeros(1, int), np.zeros(1, int))
    further = {"length": LENGTH, "spans": mixed.spans(np.zeros(1, int), np.zeros(1, int))}
    assert (segments == 0).any()
    found = [
        ChatLM(loss_on=loss_on).prepare(
            np.where(segments > 0, tokens, pad), segments, np.zeros(1, np.uint64), **further
        )
        for pad in (0, END, ord("a"))
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(other.targets.weights, found[0].targets.weights)
        np.testing.assert_array_equal(other.inputs.segments, found[0].inputs.segments)
        assert learned(other) == learned(found[0])


def test_without_spans_it_is_language_modelling():
    tokens = np.arange(LENGTH + 1, dtype=np.int32)[None] % 256
    segments, seeds = np.ones_like(tokens), np.zeros(1, np.uint64)
    one, other = (
        objective.prepare(tokens, segments, seeds, None, LENGTH, **further)
        for objective, further in (
            (ChatLM(), {"spans": RowSpans.none()}),
            (CausalLM(), {}),
        )
    )
    np.testing.assert_array_equal(one.targets.weights, other.targets.weights)


ROWS = st.lists(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    min_size=1,
    max_size=4,
)


@given(conversations=ROWS, start=st.integers(0, 6))
def test_the_last_replies_are_those_of_a_loop(conversations, start):
    """Brute force over tokens; conversations have (prompt, reply) lengths, and a row cuts them."""
    kinds, segment, mark, position = [], [], [], 0
    spans = []
    for number, turns in enumerate(conversations, 1):
        for turn, (prompt, reply) in enumerate(turns):
            kinds += ["user"] * prompt + ["assistant"] * reply
            mark += [False] * prompt + [turn == len(turns) - 1] * reply
            segment += [number] * (prompt + reply)
            spans.append((position + prompt, position + prompt + reply))
            position += prompt + reply
    start = min(start, position - 1)
    segments = np.array([segment[start:]], np.int32)
    first, end = np.array(spans).T - start
    inside = end > 0
    row = np.zeros(inside.sum(), np.int64)
    kind = np.full(inside.sum(), KINDS.index("assistant"))
    found = last_of_segments(RowSpans(row, first[inside], end[inside], kind), segments)
    np.testing.assert_array_equal(found.mask(segments.shape), [mark[start:]])


# ---- packed and alone ----------------------------------------------------------------------------

TALKS = [
    [["a?", "yes"], ["bb?", "no, never", "c?", "why"], ["d", "e"], ["ff", "g" * 9]][n % 4]
    for n in range(11)
]


def alone(store):
    """Example with a row for each document of a store."""
    count = len(store.offsets) - 1
    tokens = np.zeros((count, LENGTH + 1), np.int32)
    segments, spans = np.zeros_like(tokens), []
    for row in range(count):
        begin, end = store.offsets[row : row + 2]
        tokens[row, : end - begin] = store.tokens[begin:end]
        segments[row, : end - begin] = 1
        spans += [
            (row, a - begin, b - begin, kind)
            for a, b, kind in zip(*store.spans, strict=True)
            if begin <= a < end
        ]
    spans = RowSpans(*np.array(spans).T)
    return ChatLM().prepare(tokens, segments, np.zeros(count, np.uint64), None, LENGTH, spans=spans)


def gradients(example, mesh, rows=8, **settings):
    """Sum of the loss, of the weights, and the gradients."""
    filling = (-len(example.targets.weights)) % rows

    def padded(a):
        return np.concatenate([a, np.zeros((filling, *a.shape[1:]), a.dtype)])

    example = jax.tree.map(padded, example)
    with jax.set_mesh(mesh):
        layout = training_layout()
        learner = Learner(MODEL, ChatLM(), AdamW(), lambda step: 1e-2, layout, **settings)
        state = learner.init(seed=0)
        on_devices = to_devices(example, layout, MODEL.vocab_size)
        compute = jax.jit(learner.gradients)
        found, sums = compute(state, on_devices, state.key)
        return float(sums.loss), float(sums.weight), jax.device_get(found)


def test_packed_conversations_are_single_ones(tmp_path):
    """To 1e-6 of the largest gradient: the same sums in another order."""
    store = stored(tmp_path, map(talk, TALKS))
    mesh, accumulated = {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2}
    compare_packed(store, [(mesh, {}), (accumulated, {"microbatch": 4})])


def test_packed_conversations_keep_their_weights(tmp_path):
    """Each weighs as in a loop that multiplies the targets of its own row by its weight."""
    sources = [("good", "poor", "other")[n % 3] for n in range(len(TALKS))]
    records = [talk(t) | {"source": s} for t, s in zip(TALKS, sources, strict=True)]
    store = stored(tmp_path, records, metadata=("source",))
    chosen = LossWeights(field="source", weights=(("good", 1.0), ("poor", 0.125)), other=0.5)
    weights = chosen.of_documents(store)
    known = {"good": 1.0, "poor": 0.125, "other": 0.5}
    assert weights.tolist() == [known[source] for source in sources]
    compare_packed(store, [({"fsdp": 1}, {"microbatch": 4})], weights)


def test_weights_of_numbers_and_what_is_none(tmp_path):
    records = [talk(["a", "b"]) | {"reward": reward} for reward in (0.25, 2)] + [talk(["c", "d"])]
    store = stored(tmp_path, records, metadata=("reward",))
    assert LossWeights(field="reward", other=1.0).of_documents(store).tolist() == [0.25, 2, 1]
    with pytest.raises(UserError, match="conversation 2 has reward=None, which is not a number"):
        LossWeights(field="reward").of_documents(store)
    with pytest.raises(UserError, match=r"reward=0\.25, which is not one of good;"):
        LossWeights(field="reward", weights=(("good", 1.0),)).of_documents(store)
    with pytest.raises(UserError, match="has the weight 0"):
        LossWeights(field="none", other=0.0).of_documents(store)
    for wrong in ({"weights": (("a", -1.0),)}, {"weights": (("a", 1.0),) * 2}, {"other": -0.5}):
        with pytest.raises(UserError):
            LossWeights(field="source", **wrong)


def compare_packed(store, ways, weights=None):
    """Compares packed rows, on some meshes with some settings, with one conversation a row."""
    packed = WholeDocuments(store, LENGTH + 1, weights=weights)
    assert packed.count < len(TALKS)
    example = alone(store)
    if weights is not None:
        targets = example.targets
        targets = TokenTargets(targets.tokens, targets.weights * weights[:, None])
        example = dataclasses.replace(example, targets=targets)
    single = gradients(example, Mesh(fsdp=1).build(jax.devices()[:1]), rows=len(TALKS))
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(single[2]))
    example = example_of(ChatLM(), packed, range(packed.count))
    for shape, settings in ways:
        mesh = Mesh(**shape).build(jax.devices()[: math.prod(shape.values())])
        found = gradients(example, mesh, **settings)
        assert found[1] == pytest.approx(single[1], rel=1e-6)
        np.testing.assert_allclose(found[0], single[0], rtol=1e-6)
        for a, b in zip(jax.tree.leaves(found[2]), jax.tree.leaves(single[2]), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * scale)
