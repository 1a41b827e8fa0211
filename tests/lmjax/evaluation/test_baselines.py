"""The baselines against hand arithmetic, the gzip module, and a plain Python bigram."""

import gzip
import itertools
import math
from collections import Counter

import pytest

from lmjax.evaluation import baselines
from lmjax.evaluation.baselines import ByteBigram, gzip_bits_per_byte

TRAINING = [b"the cat sat on the mat", b"", "élan vital".encode(), b"the end"]
HELD_OUT = [b"the hat", "là-bas".encode(), b"\x00\xff"]


def plain_bigram_bits(training, held_out):
    """The same model with dictionaries, a pair at a time."""
    counts, before = Counter(), Counter()
    for document in training:
        symbols = [256, *document, 256]
        for pair in itertools.pairwise(symbols):
            counts[pair] += 1
            before[pair[0]] += 1
    bits = 0.0
    for document in held_out:
        symbols = [256, *document, 256]
        for first, second in itertools.pairwise(symbols):
            bits -= math.log2((counts[first, second] + 0.5) / (before[first] + 257 / 2))
    return bits / sum(map(len, held_out))


@pytest.mark.parametrize("block", [1, 10, 1 << 20])
def test_bigram_equals_the_plain_one(block, monkeypatch):
    monkeypatch.setattr(baselines, "BLOCK", block)
    measured = ByteBigram().fit(TRAINING).bits_per_byte(HELD_OUT)
    # Both sum the same float64 logarithms in another order.
    assert measured == pytest.approx(plain_bigram_bits(TRAINING, HELD_OUT), rel=1e-12)


def test_bigram_without_training_text_is_uniform():
    # One byte, and the end after it, each one of 257 symbols.
    assert ByteBigram().bits_per_byte([b"a"]) == pytest.approx(2 * math.log2(257), rel=1e-12)


def test_fitting_in_parts_is_fitting_at_once():
    parts = ByteBigram().fit(TRAINING[:2]).fit(TRAINING[2:])
    assert (parts.counts == ByteBigram().fit(TRAINING).counts).all()


def test_gzip_equals_the_gzip_module():
    text = [bytes(f"line {number}\n", "ascii") for number in range(1000)]
    joined = b"".join(text)
    assert gzip_bits_per_byte(text) == 8 * len(gzip.compress(joined, 9)) / len(joined)


@pytest.mark.parametrize("baseline", [gzip_bits_per_byte, ByteBigram().bits_per_byte])
def test_no_text_is_refused(baseline):
    with pytest.raises(ValueError, match="no text"):
        baseline([b"", b""])
