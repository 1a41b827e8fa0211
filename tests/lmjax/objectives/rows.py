"""Rows of random documents, and what the objectives need to know of their tokens."""

import numpy as np
from hypothesis import strategies as st

from lmjax.data.spans import KINDS, RowSpans
from lmjax.objectives import TokenTable

VOCABULARY, BEGIN, END = 500, 1, 2
NAMES = ("[MASK]", "[sMASK]", "[gMASK]", "<|startofpiece|>", "<|endofpiece|>", "[dBLOCK]")
NAMES = (*NAMES, "[CLS]", "[SEP]", "<pad>")
MASK, SMASK, GMASK, SOP, EOP, DBLOCK, CLS, SEP, PAD = range(3, 12)
SENTINEL = 400  # the first of those that stand for spans; they go downwards
WORDS = np.arange(20, 300)
IDS = np.arange(VOCABULARY)
SPECIAL = dict(zip(NAMES, range(3, 12), strict=True))
SPECIAL |= {f"<extra_id_{number}>": SENTINEL - number for number in range(100)}


def lexicon(begin: int | None = BEGIN) -> TokenTable:
    """Sentences end with multiples of 10, words begin with even numbers; 290 and on is space."""
    return TokenTable(
        special=SPECIAL,
        begin=begin,
        end=END,
        words=WORDS,
        ends_sentence=(IDS % 10 == 0) & (IDS >= 20),
        begins_word=(IDS % 2 == 0) | (IDS < 20),
        ends_word=IDS < 20,
        is_space=(IDS >= 290) & (IDS < 300),
    )


LEXICON = lexicon()


def make_row(lengths: list[int], row_length: int, rng: np.random.Generator):
    """Tokens and segments of a row that documents of these many words are cut into."""
    documents = [[BEGIN, *rng.choice(WORDS, length), END] for length in lengths]
    tokens = np.concatenate(documents)[:row_length].astype(np.int32)
    segments = np.repeat(np.arange(1, len(lengths) + 1), [len(d) for d in documents])[:row_length]
    filling = (0, row_length - len(tokens))
    return np.pad(tokens, filling), np.pad(segments, filling).astype(np.int32)


def answered_row(lengths: list[int], row_length: int, rng: np.random.Generator):
    """`make_row` of prompts with answers, behind which the prompt of every other one goes on."""
    documents = []
    for number, length in enumerate(lengths):
        prompt, answer, rest = (rng.choice(WORDS, n) for n in (length, length % 7 + 1, number % 2))
        documents.append([BEGIN, *prompt, MASK, *answer, EOP, *rest, END])
    segments = np.repeat(np.arange(1, len(lengths) + 1), [len(d) for d in documents])
    tokens = np.concatenate(documents)[:row_length]
    return tokens.astype(np.int32), segments[:row_length].astype(np.int32)


def answers_of(tokens, segments) -> RowSpans:
    """The answers of such rows, as a store would tell them: found by the tokens around them."""
    found = []
    for row, (ids, numbers) in enumerate(zip(tokens, segments, strict=True)):
        for document in range(1, numbers.max() + 1):
            here = np.flatnonzero(numbers == document)
            marks = [place for place in here if ids[place] in (MASK, EOP)]
            if not marks:
                continue
            begins = ids[marks[0]] == MASK
            first = marks[0] + 1 if begins else here[0] - 1  # before the row
            closed = [place for place in marks if ids[place] == EOP]
            end = closed[0] if closed else here[-1] + 2  # behind the row
            found.append((row, first, end, KINDS.index("answer")))
    return RowSpans(*np.array(found, np.int64).reshape(-1, 4).T)


@st.composite
def batches(draw, row_length: int, rows: int = 2):
    """(tokens, segments, seeds) of documents of all lengths; the last row may have padding."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    made = []
    for _ in range(rows):
        lengths = draw(st.lists(st.integers(1, row_length), min_size=1, max_size=6))
        made.append(make_row(lengths, row_length, rng))
    tokens, segments = map(np.stack, zip(*made, strict=True))
    return tokens, segments, rng.integers(0, 2**63, rows).astype(np.uint64)


def full_batch(row_length: int, rows: int, seed: int = 0, longest: int = 300, make=make_row):
    """(tokens, segments, seeds) of rows without padding."""
    rng = np.random.default_rng(seed)
    made = [make([*rng.integers(1, longest, row_length)], row_length, rng) for _ in range(rows)]
    tokens, segments = map(np.stack, zip(*made, strict=True))
    return tokens, segments, rng.integers(0, 2**63, rows).astype(np.uint64)
