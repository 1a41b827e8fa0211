"""A cleaning of sources with every kind of damage: clear, counted, listed, and gone on with."""

import gzip
import json

import pytest

from lmjax.config import UserError, replace
from lmjax.data import CleanedDocuments, HtmlFiles, JsonLines, TextFiles, WebArchives
from lmjax.data.cleaning import Collection, ExactDuplicates, JsonLinesOutput, LanguageFilter
from lmjax.data.cleaning.pipeline import CleaningPipeline
from tests.lmjax.data.test_web_sources import answer

ENGLISH = "It was a bright day in the harbour, and number {} of the boats came home."
MOST_BYTES = 2000


def text(number):
    return ENGLISH.format(["one", "two", "three", "four", "five", "six", "seven"][number])


@pytest.fixture
def sources(tmp_path):
    """Of each kind a good document, and what is wrong."""
    pytest.importorskip("fastwarc")
    long = "x" * (3 * MOST_BYTES + 100)
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "a.html").write_text(text(0))
    (pages / "b.html.gz").write_bytes(gzip.compress(text(1).encode() * 99)[:-9])
    (pages / "c.html").write_bytes(b"\x7fELF\0\0")
    (pages / "d.html").write_text(long)
    (pages / "e.html").touch()
    records = [answer("https://a.example/1", one.encode()) for one in (text(2), long, text(3))]
    (tmp_path / "a.warc").write_bytes(b"".join(records)[:-30])
    lines = [{"text": text(4)}, {"body": "none"}, {"text": "1234 !!!"}, {"text": long}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "a.txt").write_bytes(text(5).encode() + b"\n\ngr\xfc\n\n" + long.encode())
    found = {
        "pages": HtmlFiles(path=str(pages)),
        "archives": WebArchives(path=str(tmp_path / "a.warc")),
        "lines": JsonLines(path=str(tmp_path / "a.jsonl")),
        "texts": TextFiles(path=str(tmp_path / "a.txt"), split="paragraph"),
    }
    return {name: Collection(name=name, source=source) for name, source in found.items()}


def skipping(collection):
    return replace(collection, source=replace(collection.source, on_error="skip"))


def run(output, collections):
    output.mkdir(exist_ok=True)
    steps = (LanguageFilter(keep=("en",), least_score=0.0), ExactDuplicates())
    options = {"most_bytes": MOST_BYTES}
    pipeline = CleaningPipeline(tuple(collections), steps, JsonLinesOutput(), output, **options)
    return pipeline.run()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pages", r"b\.html\.gz is damaged or cut short"),
        ("archives", r"a\.warc:\d+: the record has \d+ bytes in place of \d+"),
        ("lines", r"a\.jsonl, line 2: there is no field 'text'"),
        ("texts", r"a\.txt is not UTF-8: byte 0xfc at offset \d+"),
    ],
)
def test_damage_is_told_with_its_file_and_position(sources, tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", [sources[name]])
    assert not (tmp_path / "out" / "documents").exists()


def test_damage_is_counted_and_listed_and_the_rest_is_made(sources, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(UserError, match="on_error=skip"):
        run(output, sources.values())
    summary = run(output, map(skipping, sources.values()))
    with gzip.open(output / "left_out.jsonl.gz", "rt") as file:
        listed = [json.loads(line) for line in file]
    reasons = {name: [] for name in sources}
    for line in listed:
        reasons[line["collection"]].append(line["reason"])
    expected = {
        "pages": ("b.html.gz is damaged", "c.html is no page", "d.html: 6100 bytes"),
        "archives": ("bytes or more are above `longest`", "the record has"),
        "lines": ("no field 'text'", "bytes or more are above `longest`", "another language"),
        "texts": ("is not UTF-8", "bytes or more are above `longest`"),
    }
    for name, words in expected.items():
        for one in words:
            assert sum(one in reason for reason in reasons[name]) == 1, (name, one, reasons)
    assert summary.total().skipped == sum(line["step"] == "reading" for line in listed)
    assert [name.rpartition("/")[2] for name in summary.empty] == ["e.html"]
    kept = {document.text for document in CleanedDocuments(path=str(output)).documents()}
    assert kept == {text(number) for number in (0, 2, 4, 5)}
    assert run(output, map(skipping, sources.values())) == summary
