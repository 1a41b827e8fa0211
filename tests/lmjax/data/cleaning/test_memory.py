"""Memory of a cleaning: the same for twenty times the text, but for a number a document."""

import itertools
import json
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from lmjax.data.cleaning.clusters import NearDuplicates
from lmjax.data.cleaning.corpus_step import GrowingArray, StoredArrays
from lmjax.data.cleaning.duplicates import ExactDuplicates
from lmjax.data.cleaning.near_duplicates import MinHash
from lmjax.data.cleaning.substrings import ExactSubstrings

STATUS = Path("/proc/self/status")  # has the largest memory of a process on Linux
SCRIPT = """
import pathlib, sys
from lmjax.data.cleaning import Collection, ExactDuplicates, JsonLinesOutput, MinHash
from lmjax.data.cleaning import GopherRepetition, NearDuplicates
from lmjax.data.cleaning.pipeline import CleaningPipeline
from lmjax.data.sources import JsonLines

corpus, output = sys.argv[1:]
near = NearDuplicates(minhash=MinHash(bands=20, rows=6), similarity=0.7)
steps = (GopherRepetition(), ExactDuplicates(), ExactDuplicates(unit="paragraph"), near)
collection = Collection(name="all", source=JsonLines(path=corpus + "/*"))
CleaningPipeline((collection,), steps, JsonLinesOutput(), pathlib.Path(output)).run()
print(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(not STATUS.exists(), reason="the system does not tell the largest memory")
def test_twenty_times_the_text_takes_no_more_memory(tmp_path):
    """A tenth is left for what has to grow; where all marks were kept it was twice that."""
    rng, used = random.Random(0), {}
    words = [f"w{number}" for number in range(20_000)]
    for size in (300_000, 6_000_000):
        corpus, output = tmp_path / f"corpus-{size}", tmp_path / f"output-{size}"
        corpus.mkdir()
        output.mkdir()
        for part in range(16):
            texts = [" ".join(rng.choices(words, k=170)) for _ in range(size // 16 // 1000)]
            lines = [json.dumps({"text": text}) for text in texts]
            (corpus / f"{part}.jsonl").write_text("\n".join(lines))
        command = [sys.executable, "-c", SCRIPT, str(corpus), str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        used[size] = int(done.stdout)
    assert used[6_000_000] <= 1.1 * used[300_000]


def random_marks(folder, step, documents):
    """Marks of so many documents in four shards; every hundredth document is a copy."""
    rng = np.random.default_rng(0)
    for shard in range(4):
        rows = documents // 4
        source = np.where(np.arange(rows) % 100 == 0, 0, np.arange(rows))
        if isinstance(step, NearDuplicates):
            keys = rng.integers(0, 2**63, (rows, step.minhash.bands)).astype(np.uint64)
            arrays = {"keys": np.asfortranarray(keys[source])}
        else:
            width = 1 if isinstance(step, ExactSubstrings) else 2
            hashes = rng.integers(0, 2**63, (rows, width)).astype(np.uint64)
            arrays = {"hashes": hashes[source], "counts": np.ones(rows, np.int64)}
        StoredArrays.save(folder / str(shard), arrays)
    return [StoredArrays(folder / str(shard)) for shard in range(4)]


@pytest.mark.parametrize(
    ("step", "most"),
    [
        (ExactDuplicates(), 16),
        (NearDuplicates(minhash=MinHash(bands=3)), 16),
        (ExactSubstrings(), 12),  # a byte a run, and the count, which is mapped from its file
    ],
    ids=["exact", "near", "substrings"],
)
def test_a_decision_grows_by_a_number_a_document(tmp_path, step, most):
    peaks = []
    for documents in (20_000, 200_000):
        marks = random_marks(tmp_path / str(documents), step, documents)
        tracemalloc.start()
        step.decide(marks)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] <= most * 180_000


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_that_grow_are_those_that_are_saved_at_once(tmp_path, order):
    rng = np.random.default_rng(0)
    arrays = {
        "one": rng.integers(0, 99, 9),
        "two": np.asarray(rng.integers(0, 99, (9, 3)), order=order),
        "many": rng.random((9, 2, 2)),
    }
    for name, cuts in {"some": (2, 3, 3), "each": tuple(range(1, 9)), "none": ()}.items():
        writer = GrowingArray(tmp_path / name)
        edges = [0, *cuts, 9]
        for start, stop in itertools.pairwise(edges):
            part = {key: np.asarray(a[start:stop], order="K") for key, a in arrays.items()}
            part["two"] = np.asarray(part["two"], order=order)
            writer.add(part)
        writer.finish()
        found = StoredArrays(tmp_path / name)
        assert {*found} == {*arrays}
        for key, array in arrays.items():
            assert found[key].dtype == array.dtype and np.array_equal(found[key], array)
    writer = GrowingArray(tmp_path / "selected")
    mask = rng.random(9) < 0.5
    writer.select(arrays, "two", mask)
    writer.finish()
    assert np.array_equal(StoredArrays(tmp_path / "selected")["two"], arrays["two"][mask])
