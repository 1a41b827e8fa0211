"""Documents that are too long are left out without being held, and counted."""

import gzip
import io
import json
import re
import tarfile
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.data import (
    CleanedDocuments,
    CodeFiles,
    HtmlFiles,
    JsonLines,
    LatexFiles,
    ParquetFiles,
    TextFiles,
    WebArchives,
    WuDaoFiles,
    files,
)
from lmjax.data.cleaning import Collection, ExactDuplicates, JsonLinesOutput
from lmjax.data.cleaning.pipeline import CleaningPipeline
from lmjax.data.documents import Part
from lmjax.data.files import read_pieces
from tests.lmjax.data.test_web_sources import answer, record

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


def measured(source):
    """Texts of all documents, what was told, and the most bytes that were held at once."""
    told = []
    tracemalloc.start()
    found = [
        document.text for part in source.parts() for document in source.read(part, told.append)
    ]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found, told, peak


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_long_line_is_not_held(tmp_path, name):
    """It spans several ranges of the file; memory is that of a few blocks."""
    write_lines(tmp_path / name, "first", "x" * LONG, "last")
    source = JsonLines(path=str(tmp_path / name), longest=LIMIT)
    found, told, peak = measured(source)
    assert found == ["first", "last"]
    (message,) = told
    assert f"{name}:18: {LONG + 12} bytes" in message and "longest" in message
    assert peak < 6 * files.BLOCK < LONG
    assert [len(one.text) for one in JsonLines(path=source.path).documents()] == [5, LONG, 4]


@pytest.mark.parametrize("split", ["file", "line", "paragraph", "separator"])
def test_a_long_text_is_not_held(tmp_path, split):
    break_ = {"paragraph": "\n\n", "separator": "<|endoftext|>\n"}.get(split, "\n")
    (tmp_path / "a.txt").write_text(break_.join(["first", "x" * LONG, "last"]))
    (tmp_path / "b.txt").write_text("other")
    found, told, peak = measured(TextFiles(path=f"{tmp_path}/*.txt", split=split, longest=LIMIT))
    assert found == (["other"] if split == "file" else ["first", "last", "other"])
    assert len(told) == 1 and peak < 6 * files.BLOCK
    with pytest.raises(UserError, match="longest=0: must be 1 or more"):
        TextFiles(path="a", longest=0)


def archive_of(*papers):
    """A tar file with a picture, which counts for nothing, and papers of so many letters."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for number, letters in enumerate(papers):
            text = rb"\begin{document}" + b"x" * letters
            for name, one in ((f"{number}.png", b"\0" * LONG), (f"{number}.tex", text)):
                member = tarfile.TarInfo(name)
                member.size = len(one)
                archive.addfile(member, io.BytesIO(one))
    return data.getvalue()


FILES = {
    "page": (HtmlFiles, "{}.html", lambda n: b"<p>" + b"x" * n),
    "packed page": (HtmlFiles, "{}.html.gz", lambda n: gzip.compress(b"<p>" + b"x" * n, 1)),
    "code": (CodeFiles, "{}.py", lambda n: b"x" * n),
    "paper": (LatexFiles, "{}.tex", lambda n: rb"\begin{document}" + b"x" * n),
    "papers": (LatexFiles, "{}.tar", archive_of),
    "packed papers": (LatexFiles, "{}.tgz", lambda n: gzip.compress(archive_of(n), 1)),
    "array": (WuDaoFiles, "{}.json", lambda n: json.dumps([{"content": "x" * n}]).encode()),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_long_file_is_not_held(tmp_path, kind):
    """The files beside it are read, and a file that is just short enough."""
    source, name, content = FILES[kind]
    sizes = {"a": 5, "b": LONG, "c": LIMIT - 100}
    for each, size in sizes.items():
        (tmp_path / name.format(each)).write_bytes(content(size))
    long = str(tmp_path / name.format("b"))
    found, told, peak = measured(source(path=str(tmp_path), longest=LIMIT))
    assert [text.count("x") for text in found] == [5, LIMIT - 100]
    (message,) = told
    assert message.startswith(f"{long}: ") and "above `longest`" in message
    assert peak < 8 * files.BLOCK < LONG
    (whole,) = source(path=long).documents()
    assert whole.text.count("x") == LONG


def test_a_long_file_that_a_paper_reads_is_not_held(tmp_path):
    (tmp_path / "a.tex").write_text(r"\begin{document}\input{b}\input{c}")
    (tmp_path / "b.tex").write_text("x" * LONG)
    (tmp_path / "c.tex").write_text("short")
    found, told, peak = measured(LatexFiles(path=str(tmp_path / "a.tex"), longest=LIMIT))
    assert found == [r"\begin{document}\input{b}short"] and peak < 6 * files.BLOCK
    assert len(told) == 1 and f"b.tex: {LONG} bytes" in told[0]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_a_long_record_is_not_held(tmp_path, name):
    """Of a picture nothing is told, however long it is; a packed page counts unpacked."""
    pytest.importorskip("fastwarc")
    packed = gzip.compress(b"y" * LONG)
    records = [
        answer("https://a.example/1", b"first"),
        answer("https://a.example/long", b"x" * LONG),
        answer("https://a.example/picture", b"\x89" * LONG, kind="image/png"),
        answer("https://a.example/gone", b"x" * LONG, status="404 Not Found"),
        answer("https://a.example/packed", packed, "Content-Encoding: gzip"),
        record("conversion", "https://a.example/text", b"z" * LONG, "text/plain"),
        answer("https://a.example/last", b"last"),
    ]
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(b"".join(gzip.compress(one, 1) for one in records))
    else:
        path.write_bytes(b"".join(records))
    del records
    found, told, peak = measured(WebArchives(path=str(path), longest=LIMIT))
    assert found == ["first", "last"] and len(told) == 3
    assert all(re.match(rf"{re.escape(str(path))}:\d+: \d+ bytes", one) for one in told)
    assert peak < 6 * files.BLOCK
    assert len(list(WebArchives(path=str(path)).documents())) == 5


def test_long_rows_are_left_out_before_they_are_text(tmp_path):
    """A group of long rows alone is not even decoded."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    letters = {3: 6000, 10: 80_000, 11: 90_000}
    texts = ["é" * letters.get(n, 100 + n) for n in range(16)]
    texts[5] = None
    kinds = {"string": pyarrow.string(), "large": pyarrow.large_string()}
    kinds["dictionary"] = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    for kind, type_ in kinds.items():
        path = tmp_path / f"{kind}.parquet"
        groups = [
            pyarrow.array(texts[first:end], pyarrow.string()).cast(type_)
            for first, end in ((0, 10), (10, 12), (12, 16))
        ]
        with parquet.ParquetWriter(path, pyarrow.schema({"text": type_})) as file:
            for group in groups:
                file.write_table(pyarrow.table({"text": group}))
        source = ParquetFiles(path=str(path), on_error="skip", longest=10_000)
        found, told, _ = measured(source)
        kept = [n for n in range(16) if n not in (5, *letters)]
        assert found == [texts[n] for n in kept]
        assert len(told) == 3 and f"{path}:3: 12000 bytes or more are above" in told[0]
        assert "NoneType" in told[1] and f"{path}: group 1 of 2 rows: " in told[2]
        assert len(list(ParquetFiles(path=str(path), on_error="skip").documents())) == 15


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
