"""Answers and turns beside the tokens: in stores, in rows, and on their way to an objective."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, config
from lmjax.data import build_stores
from lmjax.data.documents import Document, Part, Source
from lmjax.data.loader import Loader
from lmjax.data.mixture import Mixture
from lmjax.data.plan import make_plan
from lmjax.data.rows import EvaluationRows, Ring
from lmjax.data.sources import JsonPrompts
from lmjax.data.spans import KINDS, RowSpans, Span, join_spans
from lmjax.data.store import TokenStore
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer

TOKENIZER = ExtendedTokenizer(ByteTokenizer(), ("[MASK]", "<|endofpiece|>", "<user>", "<bot>"))
MASK, EOP, USER, BOT = range(257, 261)
PARTS = 3


@config
class Listed(Source):
    """Documents that stand in the settings: text, and (first, end, kind, opening, closing)."""

    texts: tuple[tuple[str, tuple[tuple[int, int, str, str, str], ...]], ...]

    def parts(self):
        return tuple(Part("list", start, size=1) for start in range(PARTS))

    def read(self, part, on_skip):
        for number in range(part.start, len(self.texts), PARTS):
            text, spans = self.texts[number]
            yield Document(text, f"document {number}", spans=tuple(Span(*span) for span in spans))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_store_knows_the_borders_of_turns(tmp_path, workers):
    """The tokens of a span are those of its text, whatever stands around it."""
    conversation = "hi! hällo, what now? bye"
    spans = (
        *[(0, 3, "user", "<user>", ""), (4, 10, "assistant", "<bot>", "<|endofpiece|>")],
        *[(10, 19, "user", "", ""), (21, 24, "assistant", "<bot>", "")],
    )
    texts = (("plain", ()), (conversation, spans), ("", ()), ("all", ((0, 3, "tool", "", ""),)))
    stores = build_stores(Listed(texts=texts), TOKENIZER, tmp_path / "s", workers=workers)
    store = TokenStore(stores["all"].folder)
    found = [
        (TOKENIZER.decode(store.tokens[first:end].tolist()), KINDS[kind])
        for first, end, kind in store.spans.T
    ]
    # Parts hold documents 0 and 3, 1, and 2.
    assert found == [
        *[("all", "tool"), ("hi!", "user"), ("hällo,", "assistant")],
        *[(" what now", "user"), ("bye", "assistant")],
    ]
    expected = [
        *[256, *b"plain", 256, *b"all", 256, USER, *b"hi!", *b" ", BOT, *"hällo,".encode(), EOP],
        *[*b" what now", *b"? ", BOT, *b"bye", 256],
    ]
    assert store.tokens.tolist() == expected
    assert store.text_bytes == sum(len(text.encode()) for text, _ in texts)


def test_a_store_without_spans_has_no_file_of_them(tmp_path):
    store = build_stores(Listed(texts=(("plain", ()),)), TOKENIZER, tmp_path / "s")["all"]
    assert store.spans.shape == (3, 0) and not (store.folder / "spans.npy").exists()


@pytest.mark.parametrize("wrong", [((3, 1),), ((0, 3), (2, 4)), ((0, 7),), ((-1, 2),)], ids=str)
def test_spans_that_cannot_be_are_told(tmp_path, wrong):
    spans = tuple((first, end, "user", "", "") for first, end in wrong)
    with pytest.raises(UserError, match=r"document 0: spans have to rise .* of 6 characters, got"):
        build_stores(Listed(texts=(("sixsix", spans),)), TOKENIZER, tmp_path / "s")


def prompts(folder, lengths):
    """A store of prompts and answers of these lengths, and of texts where an answer has none."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = []
    for prompt, answer, rest in lengths:
        span = (prompt, prompt + answer, "answer", "[MASK]", "<|endofpiece|>")
        texts.append(("p" * prompt + "a" * answer + "r" * rest, (span,) if answer else ()))
    return build_stores(Listed(texts=tuple(texts)), TOKENIZER, folder / "store")["all"]


LENGTHS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=8
)


@settings(max_examples=60)
@given(
    lengths=LENGTHS,
    row_length=st.integers(2, 40),
    overlap=st.just(1) | st.integers(1, 39),
    start=st.floats(0, 0.999),
)
def test_rows_have_the_spans_that_their_tokens_show(
    tmp_path_factory, lengths, row_length, overlap, start
):
    """Where the letter a stands in a row, a span does, and its marks where they stand beside it."""
    store = prompts(tmp_path_factory.mktemp("rows"), lengths)
    rows = Ring(store, row_length, min(overlap, row_length - 1))
    start, number = int(start * store.manifest.tokens), np.arange(rows.count)
    tokens, segments = rows.read(number, start)
    spans = rows.spans(number, start)
    for row in range(rows.count):
        size = int((segments[row] > 0).sum())
        inside, opens, closes = np.zeros((3, row_length + 2), bool)  # from the place before the row
        for first, end in spans.of(row, "answer"):
            assert 0 < end - first < 10 and end >= 0 and first <= size
            inside[max(first, 0) + 1 : min(end, size) + 1] = True
            opens[min(max(first - 1, -1), row_length) + 1] = True
            closes[min(max(end, -1), row_length) + 1] = True
        shown = slice(1, size + 1)
        np.testing.assert_array_equal(tokens[row, :size] == ord("a"), inside[shown])
        np.testing.assert_array_equal(tokens[row, :size] == MASK, opens[shown])
        np.testing.assert_array_equal(tokens[row, :size] == EOP, closes[shown])
    # Each row by itself, and in another order.
    order = np.random.default_rng(0).permutation(rows.count)
    one, other = rows.spans(order, start), spans.take(order)
    for name in ("row", "first", "end", "kind"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_spans_of_several_sets_are_joined_by_row():
    one = RowSpans(*np.array([[0, 5, 7, 0], [0, 9, 11, 1], [2, -1, 2, 0]]).T)
    other = RowSpans(*np.array([[1, 3, 4, 0]]).T)
    joined = join_spans([np.array([4, 5, 0]), np.array([3, 2])], [one, other])
    assert np.stack([joined.row, joined.first, joined.end, joined.kind], 1).tolist() == [
        *[[0, -1, 2, 0], [2, 3, 4, 0], [4, 5, 7, 0], [4, 9, 11, 1]]
    ]
    assert joined.of(4, "answer").tolist() == [[5, 7]] and not len(joined.of(1, "answer"))
    assert len(join_spans([], []).row) == 0


def keep(tokens, segments, seeds, spans):
    return {"tokens": tokens, "spans": spans}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_hands_the_spans_of_each_host_s_rows_over(tmp_path, workers):
    stores = {
        "prompts": prompts(tmp_path / "one", [(n % 9 + 1, n % 5, n % 3) for n in range(40)]),
        "plain": prompts(tmp_path / "two", [(9, 0, 0)] * 30),
    }
    readers = {name: Ring(store, 16) for name, store in stores.items()}
    mixture = Mixture(readers, {"prompts": 0.7, "plain": 0.3})
    shown = 0
    for host in range(2):
        loader = Loader(make_plan(1, 8), mixture, keep, host, 2, workers, spans=True)
        with loader.iterate(3) as batches:
            for _ in range(4):
                _, batch = next(batches)
                for row, tokens in enumerate(batch["tokens"]):
                    inside = np.zeros(16, bool)
                    for first, end in batch["spans"].of(row, "answer"):
                        inside[max(first, 0) : max(end, 0)] = True
                    np.testing.assert_array_equal(tokens == ord("a"), inside)
                    shown += inside.sum()
    assert shown > 50


def test_evaluation_rows_have_their_spans(tmp_path):
    rows = EvaluationRows(Ring(prompts(tmp_path / "one", [(3, 4, 1)] * 5), 16))
    (tokens, _), spans = rows.read(1, len(rows) + 1), rows.spans(1, len(rows) + 1)
    assert spans.row.max() == len(rows) - 2  # none in filling
    for row in range(len(rows) + 1):
        found = [n for first, end in spans.of(row, "answer") for n in range(first, end)]
        shown = [n for n in found if 0 <= n < 16 and tokens[row, n]]
        assert shown == np.flatnonzero(tokens[row] == ord("a")).tolist()


def test_answers_of_prompts_are_spans(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [{"prompt": f"{n}? ", "answer": "yes" * n} for n in range(1, 30)]
    path.write_text("\n".join(map(json.dumps, lines)))
    stores = build_stores(JsonPrompts(path=str(path)), TOKENIZER, tmp_path / "s", held_out=0.3)
    texts = [
        TOKENIZER.decode(store.tokens[first:end].tolist())
        for store in stores.values()
        for first, end, kind in store.spans.T
    ]
    assert sorted(texts) == sorted(f" {line['answer']}" for line in lines)
