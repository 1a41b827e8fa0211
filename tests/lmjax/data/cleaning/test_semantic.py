"""Duplicates in meaning, beside brute force; curves of MinHash beside numbers of the field."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.data import CleanedDocuments, JsonLines
from lmjax.data.balance import TagBalance
from lmjax.data.cleaning import Collection, GivenVectors, HashedWords, NearDuplicates
from lmjax.data.cleaning.near_duplicates import MinHash
from lmjax.data.cleaning.semantic import SemanticDuplicates, first_near, k_means, nearest
from lmjax.data.cleaning.step import Dropped
from lmjax.data.documents import Document
from lmjax.data.tokenize import build_stores
from lmjax.data.tokenizers.base import ByteTokenizer
from lmjax.jobs.cleaning import Cleaning
from lmjax.jobs.error_curves import curve_table, curve_tables, error_areas, similarity_found


def unit(rows):
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def decided(step, shards):
    """The step's results on shards of vectors, as documents or drops."""
    documents = [
        [Document("t", f"{n}.{m}", metadata={"embedding": row}) for m, row in enumerate(rows)]
        for n, rows in enumerate(shards)
    ]
    marks = [step.mark(some) for some in documents]
    found = step.decide(marks)
    applied = [
        list(step.apply(some, {**found.common, **verdict}, lambda *_: None))
        for some, verdict in zip(documents, found.verdicts, strict=True)
    ]
    return found, [one for some in applied for one in some]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=14))
def test_near_vectors_are_those_of_brute_force(rows):
    """In one cluster every pair is compared; whole numbers, so that no cosine is at the edge."""
    rows = [row if any(row) else [1, 0, 0] for row in rows]
    step = SemanticDuplicates(embedder=GivenVectors(), clusters=1, similarity=0.9)
    _, results = decided(step, [rows[: len(rows) // 2], rows[len(rows) // 2 :]])
    vectors = unit(unit(rows).astype(np.float16))
    for number, result in enumerate(results):
        cosines = [float(vectors[number] @ vectors[other]) for other in range(number)]
        near = [other for other, cosine in enumerate(cosines) if cosine >= 0.9 - 1e-6]
        if near:
            assert result == ("in meaning an earlier document", f"document {near[0]}")
        elif all(abs(cosine - 0.9) > 1e-3 for cosine in cosines):
            assert result.metadata["cluster"] == "0"


def groups(count=6, each=12, width=16, seed=0):
    """Vectors around directions that are far from each other; their groups in turn."""
    rng = np.random.default_rng(seed)
    directions = np.eye(width)[:count]
    found = [
        directions[n % count] + 0.2 * rng.standard_normal(width) / 4 for n in range(count * each)
    ]
    return unit(found), np.arange(count * each) % count


def test_clusters_are_those_that_the_vectors_have():
    vectors, group = groups()
    centers = k_means(vectors, 6, 50, seed=3)
    own, cosine = nearest(vectors, centers)
    np.testing.assert_array_equal(own, (vectors @ centers.T).argmax(1))
    np.testing.assert_allclose(cosine, (vectors @ centers.T).max(1), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-5)
    # A center without vectors moves, so that no group shares its cluster with another for long.
    purity = sum(np.bincount(group[own == c]).max() for c in np.unique(own)) / len(group)
    assert purity >= 5 / 6
    np.testing.assert_array_equal(first_near(vectors, 1.1), np.arange(len(vectors)))


def test_clusters_divide_the_work_and_lose_no_copies():
    vectors, _ = groups()
    rows = np.concatenate([vectors, vectors[::-1]]).tolist()
    step = SemanticDuplicates(embedder=GivenVectors(), similarity=0.9999)
    found, results = decided(step, [rows[:50], rows[50:100], [], rows[100:]])
    assert [isinstance(one, Dropped) for one in results] == [False] * 72 + [True] * 72
    assert len(found.pairs) == 12
    assert all(one.metadata["cluster_score"] <= 1.001 for one in results[:72])
    assert len({one.metadata["cluster"] for one in results[:72]}) <= 12  # square root of 144


def test_vectors_that_are_none():
    step = SemanticDuplicates(embedder=GivenVectors(field="v"))
    for value in (None, "text", [0.0, 0.0], [float("nan")]):
        with pytest.raises(UserError, match="d1: the metadata 'v' is no list of numbers"):
            step.mark([Document("t", "d1", metadata={"v": value})])
    with pytest.raises(UserError, match="d1: 3 numbers, those before have 2"):
        step.mark([Document("t", f"d{n}", metadata={"v": [1.0] * (4 - n)}) for n in (2, 1)])
    with pytest.raises(UserError, match="similarity=2"):
        replace(step, similarity=2.0).validate()


WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in ("ran", "tol", "mis")]


def lines(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return JsonLines(path=str(path))


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    """Two collections of which the second repeats texts of the first in another order of words."""
    folder, rng = tmp_path_factory.mktemp("semantic"), random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=60)) for _ in range(40)]
    moved = [" ".join([*text.split()[30:], *text.split()[:30]]) for text in texts[:10]]
    fresh = [" ".join(rng.choices(WORDS, k=60)) for _ in range(10)]
    step = SemanticDuplicates(embedder=HashedWords(width=256), clusters=3, similarity=0.9)
    first = Collection(name="first", source=lines(folder / "a.jsonl", texts))
    second = Collection(name="second", source=lines(folder / "b.jsonl", moved + fresh))
    Cleaning(output=str(folder / "one"), sources=(first, second), steps=(step,)).run()
    later = Collection(
        name="later", source=lines(folder / "c.jsonl", moved[:5] + fresh[:5] + ["new"])
    )
    again = replace(step, earlier=(str(folder / "one"),))
    Cleaning(output=str(folder / "two"), sources=(later,), steps=(again,)).run()
    return folder


def counts(folder):
    summary = json.loads((folder / "summary.json").read_text())
    return {name: sum(one["lengths"].values()) for name, one in summary["ledgers"].items()}


def test_across_collections_and_cleanings(cleaned):
    assert counts(cleaned / "one") == {"first": 40, "second": 10}
    assert counts(cleaned / "two") == {"later": 1}


def test_clusters_become_weights(cleaned, tmp_path):
    """Documents of small clusters are read more often."""
    documents = CleanedDocuments(path=str(cleaned / "one"))
    found = list(documents.documents())
    sizes = {name: sum(d.metadata["cluster"] == name for d in found) for name in "012"}
    assert sum(sizes.values()) == 50
    store = build_stores(documents, ByteTokenizer(), tmp_path / "store")["all"]
    coverage = TagBalance(field="cluster", exponent=0.0).of_store(store)
    times = {name: reads / count for name, count, reads in coverage.rows(1)}
    largest, least = max(sizes, key=sizes.get), min((n for n in sizes if sizes[n]), key=sizes.get)
    assert times[least] >= times[largest] and times[largest] >= 1


@pytest.mark.parametrize(
    ("bands", "rows", "half"), [(14, 8, 0.685), (20, 6, 0.569), (9, 13, 0.819)]
)
def test_the_curve_is_that_of_bands_and_rows(bands, rows, half):
    """FineWeb's 14 x 8 catch half of the pairs at 0.685, 0.772 at 0.75 and 0.924 at 0.8."""
    minhash = MinHash(bands=bands, rows=rows)
    assert similarity_found(minhash, 0.5) == pytest.approx(half, abs=2e-3)
    assert minhash.detection(np.array([similarity_found(minhash, 0.9)]))[0] == pytest.approx(0.9)
    if bands == 14:
        found = minhash.detection(np.array([0.75, 0.8]))
        np.testing.assert_allclose(found, [0.772, 0.924], atol=1e-3)
    missed, vain = error_areas(minhash, 0.7)
    # By an independent rule: the mean over random similarities, to four standard deviations.
    s = np.random.default_rng(0).random(400_000)
    p = 1 - (1 - s**rows) ** bands
    assert missed == pytest.approx(np.where(s >= 0.7, 1 - p, 0).mean(), abs=2e-3)
    assert vain == pytest.approx(np.where(s < 0.7, p, 0).mean(), abs=2e-3)


def test_the_report_draws_a_curve_for_each_kind_of_minhash(cleaned):
    steps = (NearDuplicates(), NearDuplicates(minhash=MinHash(bands=20, rows=6)), NearDuplicates())
    tables = list(curve_tables(steps))
    assert [table.title for table in tables] == ["MinHash, 14 bands of 8", "MinHash, 20 bands of 6"]
    table = curve_table(MinHash(), similarity=0.8)
    assert table.picture == "lines" and table.rows[0] == ("0.00", 0.0, 0.0)
    assert table.rows[-1] == ("1.00", 1.0, 1.0)
    assert table.rows[40][2] == 1.0 and table.rows[39][2] == 0.0
