"""Pictures of examples: what is drawn is what the example says, for every objective."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot

from lmjax.config import UserError
from lmjax.data.tokenizers import SEPARATOR, ByteTokenizer
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer
from lmjax.evaluation.example_picture import draw_example
from lmjax.evaluation.example_stack import CONTEXT, PADDING, WRITTEN, token_texts
from lmjax.models import Batch, plain_batch
from lmjax.objectives import (
    BlankInfilling,
    CausalLM,
    DocumentBlank,
    Example,
    MaskedLM,
    Mixed,
    PermutationLM,
    PrefixLM,
    SpanCorruption,
    TokenTable,
)

matplotlib.use("agg")
NAMES = ("[MASK]", "[gMASK]", "<|startofpiece|>", "<|endofpiece|>", "[CLS]", "[SEP]", "<pad>")
TOKENIZER = ExtendedTokenizer(
    ByteTokenizer(), (*NAMES, *(f"<extra_id_{number}>" for number in range(9)))
)
LEXICON = TokenTable.of(TOKENIZER)
LENGTH = 28
BLANKS = BlankInfilling()
OBJECTIVES = {
    "causal": (CausalLM(), True),
    "prefix": (PrefixLM(), True),
    "blanks": (BLANKS, True),
    "document": (BlankInfilling(blanks=DocumentBlank()), True),
    "masked": (MaskedLM(), False),
    "pairs": (MaskedLM(pair="sentence order"), False),
    "spans": (SpanCorruption(), True),
    "spans of documents": (SpanCorruption(cross_documents=False), True),
    "permutation": (PermutationLM(), True),
    "mixed": (Mixed(objectives=(PrefixLM(), BLANKS), weights=(1.0, 1.0)), True),
}


def make(objective, length: int = LENGTH) -> Example:
    """Two rows: a document and a second one, and a single one with padding behind it."""
    size = objective.row_length(length)
    tokens, segments = np.zeros((2, size), np.int32), np.zeros((2, size), np.int32)
    for row, texts in enumerate((["ab cd. ef g", "hi\tjk lm"], ["nop, qr st. uv"])):
        documents = [[TOKENIZER.begin, *TOKENIZER.encode(text)] for text in texts]
        line = np.concatenate(documents)[:size]
        tokens[row, : len(line)] = line
        numbers = np.repeat(np.arange(len(texts)) + 1, list(map(len, documents)))
        segments[row, : len(line)] = numbers[:size]
    return objective.prepare(tokens, segments, np.array([5, 6], np.uint64), LEXICON, length)


def drawn(figure, name: str):
    """The axes of this label, one of them."""
    (axes,) = [axes for axes in figure.axes if axes.get_label() == name]
    return axes


def cells(figure, name: str) -> np.ndarray:
    """The values of a matrix."""
    (image,) = drawn(figure, name).images
    return np.asarray(image.get_array())


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def readable(token: int) -> str:
    """A token of these tests, all of which are ASCII or special."""
    names = {number: name for name, number in TOKENIZER.special.items()}
    signs = {0: "<00>", ord(" "): "▁", ord("\t"): "→"}
    return names.get(token) or signs.get(token, chr(token))


def sees(batch: Batch, row: int, causal: bool) -> np.ndarray:
    """The mask as `Batch` describes it, pair by pair."""
    segments = batch.segments[row]
    ranks = range(len(segments)) if batch.ranks is None else batch.ranks[row]
    return np.array(
        [
            [
                segments[i] == segments[j] != 0 and (not causal or ranks[j] <= ranks[i])
                for j in range(len(segments))
            ]
            for i in range(len(segments))
        ]
    )


def plain(tokens) -> Example:
    """Rows without targets."""
    return Example(plain_batch(tokens), None)


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


@pytest.mark.parametrize(
    ("name", "row"), [*((name, 0) for name in OBJECTIVES), ("blanks", 1), ("spans", 1)]
)
def test_the_picture_is_the_example(name, row):
    """Mask, texts, rows of numbers, targets and weights, for the encoder too."""
    objective, causal = OBJECTIVES[name]
    example = make(objective)
    batch, targets = example.inputs, example.targets
    figure = draw_example(example, TOKENIZER, causal, row)
    stacks = [("", batch, causal)]
    if batch.encoder is not None:
        stacks = [("encoder ", batch.encoder, False), ("decoder ", batch, causal)]
        cross = batch.segments[row][:, None] == batch.encoder.segments[row]
        cross &= batch.segments[row][:, None] != 0
        np.testing.assert_array_equal(cells(figure, "cross-attention mask") > 0, cross)
    keys = [axes for axes in figure.axes if axes.get_label() == "keys"]
    queries = [axes for axes in figure.axes if axes.get_label() == "queries"]
    for number, (whose, part, part_causal) in enumerate(stacks):
        words = [readable(token) for token in part.tokens[row].tolist()]
        np.testing.assert_array_equal(
            cells(figure, f"{whose}mask") > 0, sees(part, row, part_causal)
        )
        assert texts(drawn(figure, f"{whose}text")) == words
        assert texts(keys[number]) == texts(queries[number]) == words
        positions = [axes for axes in figure.axes if axes.get_label() == "position"][number]
        assert texts(positions) == [str(place) for place in part.positions[row]]
    rows = {"rank": "ranks", "block position": "block_positions", "token type": "token_types"}
    for title, field in rows.items():
        values = getattr(batch, field)
        if values is not None:
            assert texts(drawn(figure, title)) == [str(value) for value in values[row]]
    words = [readable(token) for token in targets.tokens[row].tolist()]
    assert texts(drawn(figure, "target")) == words
    assert [float(text) for text in texts(drawn(figure, "weight"))] == targets.weights[row].tolist()


@pytest.mark.filterwarnings("error")
def test_every_sign_for_what_cannot_be_read_is_in_the_font():
    tokens = np.array([[32, 9, 10, 0xE4, ord("$"), ord("$")]])
    draw_example(plain(tokens), TOKENIZER).canvas.draw()


def test_colours_are_the_parts():
    """Blanks' contents, what stands before them, padding; segments in two shades in turn."""
    example = make(BLANKS, 40)
    batch = example.inputs
    figure = draw_example(example, TOKENIZER, row=0)
    mask = cells(figure, "mask")
    segments, inside = batch.segments[0], batch.block_positions[0] > 0
    assert set(segments) == {0, 1, 2} and inside.any()
    for key in np.flatnonzero(segments):
        part = WRITTEN if inside[key] else CONTEXT
        assert set(mask[:, key]) == {0, 2 * part + (segments[key] + 1) % 2}
    legend = " ".join(texts(drawn(figure, "legend")))
    assert all(word in legend for word in ("context", "one by one", "padding", "target"))
    alone = draw_example(plain(batch.tokens), TOKENIZER, causal=False)
    assert set(cells(alone, "mask").ravel()) == {2 * CONTEXT}
    assert texts(drawn(alone, "legend")) == ["context: sees all of the context"]
    assert 2 * PADDING not in mask  # nobody sees it


def test_an_example_on_the_device_and_without_targets():
    tokens = np.array([list(b"one two"), list(b"six ten")])
    example = jax.tree.map(jnp.asarray, plain(tokens))
    figure = draw_example(example, TOKENIZER, row=1)
    assert texts(drawn(figure, "keys")) == list("six▁ten")
    np.testing.assert_array_equal(cells(figure, "mask") > 0, np.tri(7, dtype=bool))
    assert not {"target", "weight", "segment"} & {axes.get_label() for axes in figure.axes}


def test_targets_of_another_kind_are_not_drawn():
    """Such as rewards of whole rows, or one number for all of them."""
    tokens = np.array([list(b"one two"), list(b"six ten")])
    targets = {"rewards": np.ones(2), "baseline": np.float32(0.5)}
    figure = draw_example(Example(plain_batch(tokens), targets), TOKENIZER, row=1)
    assert texts(drawn(figure, "keys")) == list("six▁ten")
    assert not {"target", "weight"} & {axes.get_label() for axes in figure.axes}


@pytest.mark.parametrize("row", [0, 1])
def test_the_title_has_the_label_of_a_pair(row):
    example = make(OBJECTIVES["pairs"][0])
    figure = draw_example(example, TOKENIZER, causal=False, row=row)
    assert figure.texts[0].get_text() == f"row {row}, label {example.targets.labels[row]}"
    figure = draw_example(make(MaskedLM()), TOKENIZER, causal=False, row=row)
    assert figure.texts[0].get_text() == f"row {row}"


def test_a_long_row_has_a_mask_without_words():
    tokens = np.arange(300)[None] % 90 + 33
    figure = draw_example(plain(tokens), TOKENIZER)
    np.testing.assert_array_equal(cells(figure, "mask") > 0, np.tri(300, dtype=bool))
    np.testing.assert_array_equal(cells(figure, "position"), np.arange(300)[None])
    assert not texts(drawn(figure, "queries"))
    assert max(figure.get_size_inches()) < 20
    both = dataclasses.replace(plain_batch(tokens[:, :5]), encoder=plain_batch(tokens))
    figure = draw_example(Example(both, None), TOKENIZER)
    assert cells(figure, "cross-attention mask").shape == (5, 300)
    assert (cells(figure, "cross-attention mask") > 0).all()


def test_tokens_as_they_can_be_read():
    tokens = np.array([*b"a b\t\n", 0xC3, 7, 256, TOKENIZER.special["[MASK]"]])
    assert token_texts(TOKENIZER, tokens) == [*"a▁b→↵", "<C3>", "<07>", SEPARATOR, "[MASK]"]


def test_what_cannot_be_drawn_says_why(monkeypatch):
    example = make(BLANKS)
    with pytest.raises(UserError, match=r"row=2: the batch has the rows 0 to 1"):
        draw_example(example, TOKENIZER, row=2)
    with pytest.raises(UserError, match="causal=False, but the batch has ranks"):
        draw_example(example, TOKENIZER, causal=False)
    several = {"chosen": example.inputs, "rejected": example.inputs}
    with pytest.raises(UserError, match="not one batch: draw_example"):
        draw_example(Example(several, None), TOKENIZER)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'lmjax\[notebook\]'"):
        draw_example(example, TOKENIZER)
