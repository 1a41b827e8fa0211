"""MinHash estimates the share of common n-grams, and bands find pairs as the formula says."""

from __future__ import annotations

import itertools
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.data.cleaning.near_duplicates import (
    NO_NGRAM,
    MinHash,
    first_of_cluster,
    kept,
    ngrams,
    tokens,
)

WORDS = [f"word{n}" for n in range(400)]


def edited(words: list[str], changes: int, random) -> list[str]:
    """The words with some of them changed."""
    words = list(words)
    for at in random.choice(len(words), changes, replace=False):
        words[at] = f"new{random.integers(10**6)}"
    return words


@pytest.fixture(scope="module")
def texts():
    """60 texts and a copy of each with 0 to 40 of its 200 words changed."""
    random = np.random.default_rng(0)
    found = []
    for n in range(60):
        words = [WORDS[i] for i in random.integers(0, 400, 200)]
        found += [" ".join(words), " ".join(edited(words, n * 2 // 3, random))]
    return found


def jaccard(one: str, other: str) -> float:
    a, b = ngrams(one, 5), ngrams(other, 5)
    return len(a & b) / len(a | b)


def test_estimates_are_unbiased_and_as_exact_as_they_can_be(texts):
    """Their error over sqrt(J (1 - J) / orders) has mean 0 and deviation 1."""
    settings = MinHash(bands=50, rows=8)
    found = settings.signatures(texts)
    errors = []
    for one in range(0, len(texts), 2):
        other = one + 1
        true = jaccard(texts[one], texts[other])
        if 0.05 < true < 0.95:
            error = (found[one] == found[other]).mean() - true
            errors.append(error / np.sqrt(true * (1 - true) / 400))
    errors = np.array(errors)
    assert len(errors) > 40
    assert abs(errors.mean()) < 4 / np.sqrt(len(errors))
    assert 0.75 < errors.std() < 1.3


def test_signatures_are_those_of_the_definition():
    """One text, n-gram by n-gram in plain Python."""
    text, settings = "The quick brown fox, the lazy dog; the quick brown fox!", MinHash(ngram=3)

    def mixed(x):
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = (x ^ (x >> 33)) * factor % 2**64
        return x ^ (x >> 33)

    hashes = []
    for gram in ngrams(text, 3):
        x = 0
        for word in gram:
            x = mixed(x ^ zlib.crc32(word.encode()))
        hashes.append(x >> 32)
    random = np.random.default_rng(settings.seed)
    factors = random.integers(0, 2**32, 112, np.uint32) | np.uint32(1)
    shifts = random.integers(0, 2**32, 112, np.uint32)
    pairs = zip(factors.tolist(), shifts.tolist())
    expected = [min((h * a + b) % 2**32 for h in hashes) for a, b in pairs]
    np.testing.assert_array_equal(settings.signatures([text])[0], expected)


texts_strategy = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "天", "气"]), max_size=12).map(" ".join), max_size=8
)


@settings(max_examples=100, deadline=None)
@given(texts_strategy)
def test_a_text_s_signature_depends_on_it_alone(texts):
    settings = MinHash(ngram=3, bands=3, rows=2)
    together = settings.signatures(texts)
    for text, signature in zip(texts, together):
        np.testing.assert_array_equal(settings.signatures([text])[0], signature)
        if not tokens(text):
            assert (signature == NO_NGRAM).all()
    for (one, a), (other, b) in itertools.combinations(zip(texts, together), 2):
        if ngrams(one, 3) == ngrams(other, 3):
            np.testing.assert_array_equal(a, b)


def test_many_texts_at_once_and_one_that_is_long():
    random = np.random.default_rng(1)
    sizes = [0, 3, 70_000, 2, 40_000, *random.integers(0, 2000, 60)]
    texts = [" ".join(map(str, random.integers(0, 500, size))) for size in sizes]
    settings = MinHash(bands=2, rows=2)
    whole = settings.signatures(texts)
    for at in (0, 1, 2, 3, 4, 30, 64):
        np.testing.assert_array_equal(settings.signatures([texts[at]])[0], whole[at])


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.9])
def test_bands_find_pairs_as_often_as_the_formula_says(similarity):
    """Signatures that agree at random: 4,000 pairs, a deviation of at most 0.008."""
    settings, random = MinHash(bands=5, rows=4), np.random.default_rng(2)
    one = random.integers(0, 2**32, (4000, 20), np.uint32)
    differ = random.random((4000, 20)) > similarity
    other = np.where(differ, random.integers(0, 2**32, (4000, 20), np.uint32), one)
    found = (settings.keys(one) == settings.keys(other)).any(axis=1).mean()
    assert abs(found - settings.detection(np.array(similarity))) < 0.032


def test_duplicates_are_found_and_the_first_is_kept(texts):
    keys = MinHash().keys(MinHash().signatures(texts))
    first = first_of_cluster(keys)
    for at in range(0, len(texts), 2):
        assert first[at] == at  # unlike texts are apart
        if jaccard(texts[at], texts[at + 1]) > 0.95:
            assert first[at + 1] == at
    assert kept(keys)[::2].all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2), min_size=1, max_size=12))
def test_clusters_are_those_of_a_graph(rows):
    """By repeated merging of sets; keys of different bands do not meet."""
    keys = np.array(rows, np.uint64)
    clusters = [{n} for n in range(len(rows))]
    for a, b in itertools.combinations(range(len(rows)), 2):
        if any(x == y for x, y in zip(rows[a], rows[b])):
            one, other = (next(c for c in clusters if n in c) for n in (a, b))
            if one is not other:
                clusters.remove(other)
                one |= other
    expected = [min(next(c for c in clusters if n in c)) for n in range(len(rows))]
    np.testing.assert_array_equal(first_of_cluster(keys), expected)


def test_settings_that_make_no_signature():
    with pytest.raises(UserError, match="rows=0: must be 1 or more"):
        MinHash(rows=0).validate()
