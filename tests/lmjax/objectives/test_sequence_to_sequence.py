"""From a request to its reply: what both sides read, packed and single, and beside transformers."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.data import ChatTemplate, Conversations, RequestRows, build_stores
from lmjax.data.spans import KINDS, RowSpans
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer
from lmjax.interop import huggingface
from lmjax.models import gpt2, t5
from lmjax.objectives import SequenceToSequence, TokenTable
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import to_devices

LENGTH = 32
TOKENIZER = ExtendedTokenizer(ByteTokenizer(), ("<pad>",))
END, PAD = TOKENIZER.end, TOKENIZER.special["<pad>"]
LEXICON = TokenTable.of(TOKENIZER)
OBJECTIVE = SequenceToSequence()
BASE = t5("small")
MODEL = replace(
    BASE,
    vocab_size=TOKENIZER.vocab_size,
    hidden=16,
    num_layers=1,
    encoder_layers=1,
    attention=replace(BASE.attention, num_heads=2, head_dim=8, dropout=0.0),
    feed_forward=replace(BASE.feed_forward, size=32),
    head_scale=0.25,
    dropout=0.0,
)
PAIRS = [
    [("a?", "yes"), ("bb", "no, never"), ("ccc c", "w"), ("d", "ee" * 5)][n % 4] for n in range(11)
]


def text(tokens):
    """Tokens as text; the end is a dot, and the padding token an underscore."""
    return "".join({END: ".", PAD: "_"}.get(token, chr(token)) for token in tokens.tolist())


def stored(folder, records, **settings):
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    source = Conversations(path=str(path), template=ChatTemplate(**settings))
    return build_stores(source, TOKENIZER, folder / "store")["all"]


def records_of(pairs):
    return [{"prompt": request, "completion": reply} for request, reply in pairs]


def read(rows, number):
    number = np.asarray(number)
    tokens, segments = rows.read(number, np.zeros_like(number))
    return tokens, segments, rows.spans(number, np.zeros_like(number))


def example_of(tokens, segments, spans, length=LENGTH):
    seeds = np.zeros(len(tokens), np.uint64)
    return OBJECTIVE.prepare(tokens, segments, seeds, LEXICON, length, spans)


def test_a_row_written_out(tmp_path):
    """A prefix, two turns, and a text, of which nothing is learned; the pairs in any order."""
    turns = [("user", "ab"), ("assistant", "c"), ("user", "d"), ("assistant", "ef")]
    messages = [{"role": role, "content": content} for role, content in turns]
    records = [{"messages": messages}, *records_of([("g", "hi")]), {"text": "jk"}]
    rows = RequestRows(stored(tmp_path, records, user=("q:{content}",)), 2 * LENGTH, LENGTH)
    assert rows.count == 1
    example = example_of(*read(rows, [0]))
    decoder, targets = example.inputs, example.targets
    found = set()
    for segment in (1, 2):
        here, there = (batch.segments[0] == segment for batch in (decoder, decoder.encoder))
        columns = decoder.tokens[0][here], targets.tokens[0][here], decoder.encoder.tokens[0][there]
        found.add(tuple(map(text, columns)))
        for batch, mask in ((decoder, here), (decoder.encoder, there)):
            np.testing.assert_array_equal(batch.positions[0][mask], np.arange(mask.sum()))
        assert targets.weights[0][here].all()
    assert found == {("_ef", "ef.", "q:abcq:d."), ("_hi", "hi.", "q:g.")}
    assert targets.weights.sum() == (decoder.segments > 0).sum() == 6


@given(
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=6),
    cut=st.integers(0, 12),
)
def test_pairs_are_those_of_a_loop(pairs, cut):
    """Documents with these many tokens of request and reply, in a row that begins anywhere."""
    tokens, segments, found, wanted = [], [], [], []
    for number, (request, reply) in enumerate(pairs, 1):
        first = len(tokens) + request
        tokens += range(len(tokens) + 1, len(tokens) + request + reply + 1)
        segments += [number] * (request + reply)
        if reply:
            found.append((first - cut, first + reply - cut))
        begin = max(first - request, cut)
        if reply and begin < first:
            wanted.append((tokens[begin:first], tokens[first : first + reply]))
    found = np.array([span for span in found if span[1] > 0], np.int64).reshape(-1, 2)
    kind = np.full(len(found), KINDS.index("assistant"))
    spans = RowSpans(np.zeros(len(found), np.int64), found[:, 0], found[:, 1], kind)
    row = np.zeros((2, 1, 60), np.int32)
    for line, values in zip(row, (tokens, segments), strict=True):
        line[0, : len(values[cut:])] = values[cut:]
    example = example_of(*row, spans, 60)
    decoder, targets = example.inputs, example.targets
    assert decoder.segments.max() == len(wanted)
    for number, (request, reply) in enumerate(wanted, 1):
        here, there = (batch.segments[0] == number for batch in (decoder, decoder.encoder))
        assert decoder.encoder.tokens[0][there].tolist() == [*request, END]
        assert targets.tokens[0][here].tolist() == reply
        assert decoder.tokens[0][here].tolist() == [PAD, *reply[:-1]]


def alone(store):
    """Example with a row for each document of a store."""
    count = len(store.offsets) - 1
    tokens = np.zeros((count, LENGTH), np.int32)
    segments, spans = np.zeros_like(tokens), []
    for row in range(count):
        begin, end = store.offsets[row : row + 2]
        tokens[row, : end - begin] = store.tokens[begin:end]
        segments[row, : end - begin] = 1
        spans += [
            (row, a - begin, b - begin, k) for a, b, k in zip(*store.spans) if begin <= a < end
        ]
    return example_of(tokens, segments, RowSpans(*np.array(spans).T))


def learner_of(layout, **settings):
    return Learner(MODEL, OBJECTIVE, AdamW(), lambda step: 1e-2, layout, **settings)


def gradients(example, mesh, rows=8, **settings):
    """Sum of the loss, of the weights, and the gradients."""
    filling = (-len(example.targets.weights)) % rows
    example = jax.tree.map(
        lambda a: np.concatenate([a, np.zeros((filling, *a.shape[1:]), a.dtype)]), example
    )
    with jax.set_mesh(mesh):
        layout = training_layout()
        learner = learner_of(layout, **settings)
        state = learner.init(seed=0)
        on_devices = to_devices(example, layout, MODEL.vocab_size)
        found, sums = jax.jit(learner.gradients)(state, on_devices, state.key)
        return float(sums.loss), float(sums.weight), jax.device_get(found)


def test_packed_pairs_are_single_ones(tmp_path):
    """On a mesh, accumulated: to 1e-6 of the largest gradient, the same sums in another order."""
    store = stored(tmp_path, records_of(PAIRS))
    packed = RequestRows(store, 2 * LENGTH, LENGTH)
    assert packed.count < len(PAIRS)
    single = gradients(alone(store), Mesh(fsdp=1).build(jax.devices()[:1]), rows=len(PAIRS))
    example = example_of(*read(packed, range(packed.count)))
    found = gradients(example, Mesh(data=2, fsdp=2, tensor=2).build(), microbatch=4)
    assert found[1] == single[1] == sum(len(reply) + 1 for _, reply in PAIRS)
    np.testing.assert_allclose(found[0], single[0], rtol=1e-6)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(single[2]))
    for a, b in zip(jax.tree.leaves(found[2]), jax.tree.leaves(single[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * scale)


def test_the_loss_is_that_of_transformers(tmp_path, one_device):
    """T5ForConditionalGeneration on padded rows, with its own shift of the labels: to 1e-5."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=TOKENIZER.vocab_size,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            pad_token_id=PAD,
            eos_token_id=END,
            decoder_start_token_id=PAD,
            initializer_factor=3.0,
        )
    ).eval()
    theirs.save_pretrained(tmp_path / "t5")

    def padded(rows, value):
        size = max(map(len, rows))
        return torch.tensor([row + [value] * (size - len(row)) for row in rows])

    requests = padded([[*TOKENIZER.encode(request), END] for request, _ in PAIRS], PAD)
    labels = padded([[*TOKENIZER.encode(reply), END] for _, reply in PAIRS], -100)
    with torch.no_grad():
        expected = theirs(
            input_ids=requests, attention_mask=(requests != PAD).long(), labels=labels
        ).loss.item()

    layout = training_layout()
    config, _, params = huggingface.read(tmp_path / "t5", layout)
    store = stored(tmp_path, records_of(PAIRS))
    packed = RequestRows(store, 2 * LENGTH, LENGTH)
    example = example_of(*read(packed, range(packed.count)))
    learner = Learner(config, OBJECTIVE, AdamW(), lambda step: 1e-2, layout)
    sums = jax.jit(learner.evaluate)(params, to_devices(example, layout, config.vocab_size))
    assert expected > 1
    np.testing.assert_allclose(float(sums.loss / sums.weight), expected, rtol=1e-5)


def test_a_model_without_an_encoder_is_refused():
    with pytest.raises(UserError, match="needs a model with an encoder and a decoder"):
        OBJECTIVE.check(gpt2())
