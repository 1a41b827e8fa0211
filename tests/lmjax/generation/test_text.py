"""Tokens to text as they come: whole characters, stop strings, the same text however cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.data.tokenizers import ByteTokenizer, CharacterTokenizer
from lmjax.generation import Generator, TextGenerator, TextStream, prompt_tokens


class Scripted(Generator):
    """Says what it is told to, a few tokens at a time, and counts them."""

    def __init__(self, rows):
        self.rows, self.said = rows, 0

    def stream(
        self,
        prompts,
        sampling=None,
        max_tokens=100,
        stop_tokens=(),
        interval=None,
        samples=1,
        sources=None,
    ):
        assert len(prompts) * samples == len(self.rows) and sources is None
        interval = interval or 1
        for begin in range(0, max(map(len, self.rows)), interval):
            self.said = begin + interval
            yield [row[begin : begin + interval] for row in self.rows]


def cut(text, stops):
    """The text before the stop string that is complete first; character by character."""
    for end in range(len(text) + 1):
        found = [len(s) for s in stops if text[:end].endswith(s)]
        if found:
            return text[: end - max(found)]
    return text


@given(
    st.text("abé漢🙂", max_size=12),
    st.lists(st.text("abé漢🙂", min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(1, 5)),
)
def test_the_text_does_not_depend_on_the_pieces(text, stops, sizes):
    tokens = list(text.encode())
    stream, pieces = TextStream(ByteTokenizer(), stops), []
    for size in [*sizes, len(tokens)]:
        pieces.append(stream.add(tokens[:size]))
        tokens = tokens[size:]
    pieces.append(stream.rest())
    assert "".join(pieces) == cut(text, stops)
    assert stream.stopped == any(stop in text for stop in stops)
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_said_to_be_one():
    """As `Tokenizer.decode` does with bytes that are no UTF-8."""
    stream = TextStream(ByteTokenizer())
    assert stream.add(list("漢".encode()[:2])) == ""
    assert stream.rest() == "\ufffd"


def test_streaming_holds_back_no_more_than_it_must():
    stream = TextStream(ByteTokenizer(), ["end"])
    assert [stream.add([byte]) for byte in b"a en end"] == ["a", " ", "", "", "en ", "", "", ""]
    assert stream.stopped and stream.rest() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="empty"):
        TextStream(ByteTokenizer(), [""])


def test_generating_stops_when_every_row_has():
    rows = [list(b"one. two"), list(b"a longer one. and more") + [32] * 100]
    generator = Scripted(rows)
    texts = TextGenerator(generator, ByteTokenizer()).generate(["x", "y"], stop=["."])
    assert texts == ["one", "a longer one"]
    assert generator.said < 100


def test_every_sample_ends_at_its_own_stop_string():
    """Rows of two prompts, two samples each; the stop strings come in different pieces."""
    said = ["one STOP two", "three", "four. STOP", "STO" + 30 * "P"]
    text = TextGenerator(Scripted([list(row.encode()) for row in said]), ByteTokenizer())
    found = text.generate(["x", "y"], stop=["STOP", "."], samples=2)
    assert found == ["one ", "three", "four", ""]


def test_streamed_pieces_are_the_generated_text():
    rows = [list("naïve 漢字 🙂".encode())]
    text = TextGenerator(Scripted(rows), ByteTokenizer())
    assert "".join(text.stream("x")) == text.generate(["x"])[0] == "naïve 漢字 🙂"
    assert list(text.stream("x", stop=["字"])) == ["n", "a", "ï", "v", "e", " ", "漢"]


def test_a_prompt_begins_a_document():
    assert prompt_tokens(ByteTokenizer(), "hi") == [256, 104, 105]
    assert prompt_tokens(CharacterTokenizer("hi"), "") == [2]


def test_where_no_token_begins_a_text():
    tokenizer = ByteTokenizer()
    tokenizer.begin = None
    assert prompt_tokens(tokenizer, "hi") == [104, 105]
    assert prompt_tokens(tokenizer, "") == [tokenizer.end]  # the place behind another document
    tokenizer.encode_batch = lambda texts: [[] for _ in texts]
    with pytest.raises(UserError, match="makes no token of the prompt's text"):
        prompt_tokens(tokenizer, "\u200b")
