"""Pages, web archives and Parquet: every document with its origin, and damage told and counted."""

import gzip
import itertools
import json
import sys

import pytest

from lmjax.config import UserError
from lmjax.data import HtmlFiles, ParquetFiles, WebArchives
from lmjax.data.cleaning import MainText, RepairText
from lmjax.data.documents import Document
from lmjax.data.encodings import decode_page

PAGE = "<html><head><meta charset='{0}'></head><body><p>Gr\u00fc\u00dfe {1}</p></body></html>"


def read(source):
    """All documents, and what was left out."""
    skipped = []
    found = [d for part in source.parts() for d in source.read(part, skipped.append)]
    return found, skipped


@pytest.mark.parametrize(
    ("data", "server", "text"),
    [
        ("na\u00efve \u4e2d\u6587".encode(), None, "na\u00efve \u4e2d\u6587"),
        ("na\u00efve".encode("utf-16"), None, "na\u00efve"),
        (b"\xef\xbb\xbfplain", "latin-1", "plain"),
        ("<meta charset=gb2312>\u4e2d\u6587".encode("gb18030"), None, "\u4e2d\u6587"),
        ("<meta charset='iso-8859-1'>\u201cna\u00efve\u201d".encode("cp1252"), None, "na\u00efve"),
        ("\u65e5\u672c\u8a9e".encode("cp932"), "Shift_JIS", "\u65e5\u672c\u8a9e"),
        # UTF-8 that says it is something else.
        ("<meta charset=iso-8859-1>na\u00efve".encode(), "latin-1", "na\u00efve"),
        # A name that no one knows, and one of Python's that is no encoding of text.
        ("na\u00efve, d\u00e9j\u00e0 vu".encode("cp1252"), "x-none", "na\u00efve"),
        (b"plain \xff", "rot13", "plain"),
    ],
)
def test_the_encoding_of_a_page(data, server, text):
    assert text in decode_page(data, server)


def test_pages_of_a_folder_and_their_names(tmp_path):
    for number, (name, encoding) in enumerate({"b/2.HTM": "cp1252", "a.html": "utf-8"}.items()):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(PAGE.format(encoding, number).encode(encoding))
    (tmp_path / "c.html.gz").write_bytes(gzip.compress(PAGE.format("utf-8", 2).encode()))
    (tmp_path / "picture.png").write_bytes(b"\0\0")
    (tmp_path / "empty.html").touch()
    found, skipped = read(HtmlFiles(path=str(tmp_path)))
    names = [str(tmp_path / name) for name in ("a.html", "b/2.HTM", "c.html.gz")]
    assert [document.identity for document in found] == names and not skipped
    assert all("Gr\u00fc\u00dfe" in document.text for document in found)
    assert found[0].metadata == {"file": names[0]}


def test_pages_that_are_none(tmp_path):
    (tmp_path / "a.html").write_bytes(b"\x7fELF\0\0\0")
    (tmp_path / "b.html.gz").write_bytes(gzip.compress(b"<p>" + b"text " * 999)[:-9])
    (tmp_path / "c.html").write_bytes(b"<p>text</p>")
    with pytest.raises(UserError, match=r"a\.html is no page.*\n.*on_error=skip"):
        read(HtmlFiles(path=str(tmp_path)))
    found, skipped = read(HtmlFiles(path=str(tmp_path), on_error="skip"))
    assert [document.text for document in found] == ["<p>text</p>"]
    assert len(skipped) == 2 and "cut short" in skipped[1]
    with pytest.raises(UserError, match="has no file that ends with"):
        ParquetFiles(path=str(tmp_path)).parts()


def record(kind, url, body, content_type):
    """A record of an archive."""
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\n"
        f"WARC-Date: 2024-05-01T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:{len(url):032x}>\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


def answer(url, body, *headers, status="200 OK", kind="text/html; charset=utf-8"):
    """A record of an answer by a server."""
    lines = (f"HTTP/1.1 {status}", f"Content-Type: {kind}", *headers, "", "")
    content_type = "application/http; msgtype=response"
    return record("response", url, "\r\n".join(lines).encode() + body, content_type)


def chunked(data):
    """As a server sends it piece by piece."""
    pieces = [data[at : at + 10] for at in range(0, len(data), 10)]
    return b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in pieces) + b"0\r\n\r\n"


HTML = "<html><body><p>Gr\u00fc\u00dfe und mehr.</p></body></html>".encode()
RECORDS = (
    record("warcinfo", "", b"software: test\r\n", "application/warc-fields"),
    answer("https://a.example/1", HTML),
    answer("https://a.example/2", gzip.compress(HTML, mtime=0), "Content-Encoding: gzip"),
    answer("https://a.example/3", chunked(HTML), "Transfer-Encoding: chunked"),
    # Stored decoded, under the headers of before.
    answer("https://a.example/4", HTML, "Content-Encoding: gzip"),
    answer("https://a.example/5", HTML, "Transfer-Encoding: chunked"),
    answer("https://a.example/gone", HTML, status="404 Not Found"),
    answer("https://a.example/picture", b"\x89PNG", kind="image/png"),
    record("request", "https://a.example/1", b"GET / HTTP/1.1\r\n\r\n", "application/http"),
    record("conversion", "https://a.example/text", "Gr\u00fc\u00dfe".encode(), "text/plain"),
)


@pytest.fixture
def library():
    """Where it is not installed, the tests of archives are left out."""
    pytest.importorskip("fastwarc")


@pytest.mark.parametrize("kind", ["plain", "gz", "one member"])
def test_archives_of_pages_and_texts(tmp_path, library, kind):
    path = tmp_path / ("a.warc" if kind == "plain" else "a.warc.gz")
    members = [b"".join(RECORDS)] if kind == "one member" else RECORDS
    path.write_bytes(b"".join(members if kind == "plain" else map(gzip.compress, members)))
    found, skipped = read(WebArchives(path=str(tmp_path)))
    assert not skipped
    urls = [f"https://a.example/{n}" for n in (1, 2, 3, 4, 5, "text")]
    assert [document.metadata["url"] for document in found] == urls
    assert [document.text for document in found] == [HTML.decode()] * 5 + ["Gr\u00fc\u00dfe"]
    assert len({document.identity for document in found}) == 6
    assert found[0].metadata["date"] == "2024-05-01T00:00:00Z"
    assert found[0].identity.startswith(str(path))
    pages, _ = read(WebArchives(path=str(path), records="pages"))
    texts, _ = read(WebArchives(path=str(path), records="texts"))
    assert pages == found[:5] and texts == found[5:]


def test_archives_of_a_list(tmp_path, library):
    for number in range(3):
        (tmp_path / f"{number}.warc").write_bytes(RECORDS[1 + number])
    (tmp_path / "warc.paths.gz").write_bytes(gzip.compress(b"2.warc\n0.warc\n"))
    source = WebArchives(segments=str(tmp_path / "warc.paths.gz"), root=f"{tmp_path}/")
    found, _ = read(source)
    assert [document.metadata["url"][-1] for document in found] == ["3", "1"]
    with pytest.raises(UserError, match="path or segments"):
        WebArchives()


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_an_archive_that_was_cut_anywhere_gives_whole_documents_and_tells(tmp_path, library, name):
    """At a record's border nothing can be noticed; anywhere else it must be."""
    members = [gzip.compress(one, mtime=0) if name.endswith("gz") else one for one in RECORDS]
    whole, borders = b"".join(members), {0, *itertools.accumulate(map(len, members))}
    path = tmp_path / name
    silent = []
    for cut in range(1, len(whole), 7):
        path.write_bytes(whole[:cut])
        found, skipped = read(WebArchives(path=str(path), on_error="skip"))
        assert {document.text for document in found} <= {HTML.decode(), "Gr\u00fc\u00dfe"}
        if not skipped and cut not in borders:
            silent.append(cut)
    # Without compression, what ends with a line may be whole.
    assert [cut for cut in silent if name.endswith("gz") or whole[cut - 1 : cut] != b"\n"] == []


def test_an_archive_that_is_none(tmp_path, library):
    path = tmp_path / "a.warc"
    path.write_bytes(b"hello\n" * 100)
    with pytest.raises(UserError, match=r"a\.warc.*\n.*on_error=skip"):
        read(WebArchives(path=str(path)))
    found, skipped = read(WebArchives(path=str(path), on_error="skip"))
    assert not found and len(skipped) == 1


@pytest.fixture
def table(tmp_path):
    """A Parquet file of three groups of rows, with one row that has no text."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"text {number}" for number in range(25)]
    texts[7] = None
    columns = {"text": texts, "url": [f"https://a.example/{n}" for n in range(25)]}
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table(columns), path, row_group_size=10)
    return path


def test_rows_of_parquet(table):
    with pytest.raises(UserError, match=r"a\.parquet:7: column 'text' has NoneType, not text"):
        read(ParquetFiles(path=str(table)))
    source = ParquetFiles(path=str(table.parent), metadata=("url", "none"), on_error="skip")
    assert len(source.parts()) == 3
    found, skipped = read(source)
    assert len(skipped) == 1 and len(found) == 24
    numbers = [n for n in range(25) if n != 7]
    assert [d.text for d in found] == [f"text {n}" for n in numbers]
    assert [d.identity for d in found] == [f"{table}:{n}" for n in numbers]
    assert found[0].metadata == {"url": "https://a.example/0"}
    with pytest.raises(UserError, match=r"no column 'body'; the columns are text, url"):
        read(ParquetFiles(path=str(table), field="body"))


def test_parquet_that_is_damaged(table):
    data = table.read_bytes()
    table.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="is damaged or no Parquet"):
        read(ParquetFiles(path=str(table)))
    found, skipped = read(ParquetFiles(path=str(table), on_error="skip"))
    assert not found and len(skipped) == 1


def test_a_source_is_known_by_what_its_files_hold(tmp_path, table):
    one = ParquetFiles(path=str(table))
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "b.parquet"
    copy.write_bytes(table.read_bytes())
    assert ParquetFiles(path=str(copy)).fingerprint() == one.fingerprint()
    assert ParquetFiles(path=str(copy), field="url").fingerprint() != one.fingerprint()
    page = tmp_path / "a.html"
    page.write_text(json.dumps("page"))
    before = HtmlFiles(path=str(page)).fingerprint()
    page.write_text("other")
    assert HtmlFiles(path=str(page)).fingerprint() != before


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("fastwarc", lambda path: read(WebArchives(path=path))),
        ("pyarrow", lambda path: read(ParquetFiles(path=path))),
        ("resiliparse.extract.html2text", lambda path: MainText()(Document("<p>text", ""))),
        ("ftfy", lambda path: RepairText()(Document("caf\u00c3\u00a9", ""))),
    ],
)
def test_a_missing_library_is_told_with_its_extra(tmp_path, monkeypatch, module, use):
    (tmp_path / "a").write_bytes(b"text")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'lmjax\[data\]'"):
        use(str(tmp_path / "a"))
