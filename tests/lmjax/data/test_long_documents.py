"""Documents that are too long are left out without being held, and counted."""

import gzip
import json
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.data import CleanedDocuments, JsonLines, TextFiles, files
from lmjax.data.cleaning import Collection, ExactDuplicates, JsonLinesOutput
from lmjax.data.cleaning.pipeline import CleaningPipeline
from lmjax.data.documents import Part
from lmjax.data.files import read_pieces

LONG = 12_000_000  # bytes of a document that is too long
LIMIT = 50_000


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 60), max_size=20),
    longest=st.integers(1, 40),
    block=st.integers(1, 50),
    step=st.integers(1, 70),
)
def test_pieces_are_those_of_the_whole_text_but_the_long_ones(
    tmp_path_factory, lengths, longest, block, step
):
    """Whatever the blocks and the ranges are that a file is read in."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    text = b"\n".join(bytes([97 + n % 26]) * length for n, length in enumerate(lengths))
    path.write_bytes(text)
    expected, at = [], 0
    for line in text.split(b"\n"):
        expected.append((at, line if len(line) <= longest else len(line)))
        at += len(line) + 1
    if not text or text.endswith(b"\n"):
        expected.pop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", block)
        patch.setattr(files, "TAIL", 5)
        found = [
            (piece.offset, piece.left_out or piece.data)
            for start in range(0, len(text), step)
            for piece in read_pieces(
                Part(str(path), start, min(start + step, len(text))), re.compile(rb"\n"), longest
            )
        ]
    assert found == expected


def write_lines(path, *texts):
    data = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)


def texts_of(source, told):
    parts = source.parts()
    return [document.text for part in parts for document in source.read(part, told.append)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_long_line_is_not_held(tmp_path, name):
    """It spans several ranges of the file; memory is that of a few blocks."""
    write_lines(tmp_path / name, "first", "x" * LONG, "last")
    source, told = JsonLines(path=str(tmp_path / name), longest=LIMIT), []
    tracemalloc.start()
    found = [
        document.text for part in source.parts() for document in source.read(part, told.append)
    ]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["first", "last"]
    (message,) = told
    assert f"{name}:18: {LONG + 12} bytes" in message and "longest" in message
    assert peak < 6 * files.BLOCK < LONG
    assert [len(one.text) for one in JsonLines(path=source.path).documents()] == [5, LONG, 4]


@pytest.mark.parametrize("split", ["file", "line", "paragraph"])
def test_a_long_text_is_not_held(tmp_path, split):
    break_ = "\n\n" if split == "paragraph" else "\n"
    (tmp_path / "a.txt").write_text(break_.join(["first", "x" * LONG, "last"]))
    (tmp_path / "b.txt").write_text("other")
    source, told = TextFiles(path=f"{tmp_path}/*.txt", split=split, longest=LIMIT), []
    tracemalloc.start()
    found = [
        document.text for part in source.parts() for document in source.read(part, told.append)
    ]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == (["other"] if split == "file" else ["first", "last", "other"])
    assert len(told) == 1 and peak < 6 * files.BLOCK
    with pytest.raises(UserError, match="longest=0: must be 1 or more"):
        TextFiles(path="a", longest=0)


def test_a_cleaning_counts_and_lists_them_and_goes_on(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    write_lines(tmp_path / "text" / "a.jsonl", *(f"document {n}" for n in range(50)), "x" * LONG)
    write_lines(tmp_path / "text" / "b.jsonl", "y" * (2 * LIMIT), "other")
    collection = Collection(name="c", source=JsonLines(path=f"{tmp_path}/text/*"))

    def clean(output):
        (tmp_path / output).mkdir(exist_ok=True)
        options = {"most_bytes": LIMIT}
        steps, written = (ExactDuplicates(),), JsonLinesOutput()
        pipeline = CleaningPipeline((collection,), steps, written, tmp_path / output, **options)
        return pipeline.run()

    summary = clean("one")
    total = summary.total()
    assert total.skipped == 1 and total.documents == 51
    assert total.steps["reading (c)"].reasons == {"longer than most_bytes": 1}
    with gzip.open(tmp_path / "one" / "left_out.jsonl.gz", "rt") as file:
        reasons = [json.loads(line)["reason"] for line in file]
    assert any("a.jsonl" in reason and "longest" in reason for reason in reasons)
    monkeypatch.setattr(ExactDuplicates, "apply", None)
    with pytest.raises(TypeError):
        clean("two")
    monkeypatch.undo()
    assert clean("two").total().documents == 51
    one, two = (list(CleanedDocuments(path=str(tmp_path / n)).documents()) for n in ("one", "two"))
    assert [d.text for d in one] == [d.text for d in two]
