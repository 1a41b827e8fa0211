"""Sources: every layout of files, compressed or cut into ranges, and each way they can be wrong."""

import bz2
import errno
import gzip
import io
import json
import lzma
import re

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.data import files, sources
from lmjax.data.documents import Document, in_split, is_held_out
from lmjax.data.sources import JsonLines, JsonPrompts, TextFiles
from lmjax.data.spans import Span

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def texts(source):
    return [document.text for document in source.documents()]


def read_with_skips(source):
    skipped = []
    found = [
        document.text for part in source.parts() for document in source.read(part, skipped.append)
    ]
    return found, skipped


@pytest.mark.parametrize("ending", COMPRESS)
def test_text_files_one_document_a_file(tmp_path, ending):
    (tmp_path / f"b.txt{ending}").write_bytes(COMPRESS[ending]("zwei\nZeilen é".encode()))
    (tmp_path / f"a.txt{ending}").write_bytes(COMPRESS[ending](b"one"))
    assert texts(TextFiles(path=f"{tmp_path}/*.txt*")) == ["one", "zwei\nZeilen é"]


@pytest.mark.parametrize("ending", COMPRESS)
def test_json_lines_in_every_compression(tmp_path, ending):
    lines = [json.dumps({"text": f"Zeile {n} é\n", "id": n}) for n in range(50)]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](("\n".join(lines) + "\n\n").encode()))
    assert texts(JsonLines(path=str(path))) == [f"Zeile {n} é\n" for n in range(50)]


def test_zstd_frames_one_after_another(tmp_path):
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "a.txt.zst").write_bytes(compress(b"one, ") + compress(b"two"))
    assert texts(TextFiles(path=f"{tmp_path}/a.txt.zst")) == ["one, two"]


def test_splits_of_text_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufefffirst\nline\n\n\n  second\r\n \r\nthird\n".encode())
    assert texts(TextFiles(path=str(path), split="paragraph")) == [
        "first\nline",
        "  second",
        "third\n",
    ]
    assert texts(TextFiles(path=str(path), split="line")) == ["first", "line", "  second", "third"]
    assert texts(TextFiles(path=str(path))) == ["first\nline\n\n\n  second\r\n \r\nthird\n"]
    path.write_text("a\n<|endoftext|>\nb c<|endoftext|>d")
    assert texts(TextFiles(path=str(path), split="separator")) == ["a", "b c", "d"]


def test_paragraphs_begin_behind_all_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\n \t\n  two\n \n\r\n\t\nb\xe9d\n\n   \n")
    source = TextFiles(path=str(path), split="paragraph", on_error="replace")
    assert texts(source) == ["one", "  two", "b\ufffdd"]
    found, skipped = read_with_skips(replace(source, on_error="skip"))
    assert found == ["one", "  two"]
    assert f"0xe9 at offset {path.read_bytes().index(0xE9)} " in skipped[0]


def test_span_takes_a_stretch_of_the_characters(tmp_path):
    text = "".join(chr(200 + n) for n in range(101))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    first = TextFiles(path=f"{tmp_path}/a.txt", span=(0.0, 0.9))
    last = TextFiles(path=f"{tmp_path}/a.txt", span=(0.9, 1.0))
    assert (texts(first), texts(last)) == ([text[:90]], [text[90:]])
    assert first.fingerprint() != last.fingerprint()


@settings(max_examples=60)
@given(
    lines=st.lists(st.text(st.sampled_from("ab é\r"), max_size=12), min_size=1, max_size=30),
    size=st.integers(1, 40),
    block=st.integers(1, 30),
)
def test_ranges_of_a_file_share_no_line_and_lose_none(tmp_path_factory, lines, size, block):
    path = tmp_path_factory.mktemp("ranges") / "a.txt"
    path.write_bytes("\n".join(lines).encode())
    source = TextFiles(path=str(path), split="line")
    expected = [line.removesuffix("\r") for line in lines[:-1]] + lines[-1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "RANGE", size)
        patch.setattr(files, "BLOCK", block)
        if path.stat().st_size:
            assert texts(source) == [line for line in expected if line and not line.isspace()]


@settings(deadline=None, max_examples=150)
@given(
    words=st.lists(st.sampled_from(["a", "<", "<|", "<|end|>", "\n", "\r\n", "\r", " ", "é"])),
    split=st.sampled_from(["line", "paragraph", "separator"]),
    separator=st.sampled_from(["<|end|>", "<<", "\n", "\n<", "\r\n\r\n", "é"]),
    block=st.integers(1, 30),
)
def test_pieces_are_those_of_a_split(tmp_path_factory, words, split, separator, block):
    """Of the whole text at once by the rule's regular expression; of line breaks in any system."""
    text = "".join(words)
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    rules = {"line": r"\r?\n", "paragraph": r"\r?\n[ \t]*\r?\n"}
    rule = rules.get(split, rf"(?:\r?\n)?{re.escape(separator)}(?:\r?\n)?")
    parted = re.split(rule, text)
    if split == "paragraph":
        parted = [re.sub(r"^(?:[ \t]*\r?\n)*", "", one) for one in parted]
    expected = [one for one in parted if one.strip()]
    source = TextFiles(path=str(path), split=split, separator=separator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", block)
        found = [] if not text else list(source.documents())
    assert [document.text for document in found] == expected
    for document in found:  # its identity says where it begins
        offset = int(document.identity.rpartition(":")[2])
        data = document.text.encode()
        assert text.encode()[offset : offset + len(data)] == data
    if split == "separator" and "\n" not in text + separator:
        assert expected == [one for one in text.split(separator) if one.strip()]


def test_malformed_line_is_named_with_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RANGE", 100)  # the line stands in a later range of the file
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": f"number {n}"}) for n in range(40)]
    bad = [*good[:30], '{"text": "cut', *good[30:]]
    path.write_text("\n".join(bad))
    with pytest.raises(UserError, match=r"a\.jsonl, line 31: not JSON"):
        texts(JsonLines(path=str(path)))
    found, skipped = read_with_skips(JsonLines(path=str(path), on_error="skip"))
    assert found == [f"number {n}" for n in range(40)]
    assert len(skipped) == 1 and "line 31" in skipped[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"body": "x", "id": 1}', "there is no field 'text'; the fields are 'body', 'id'"),
        (b'{"text": 3}', "field 'text' is int, not text"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"text": "a\xff"}', "not UTF-8: byte 0xff at offset 26"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_lines_that_are_not_as_they_should(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n' + line)
    with pytest.raises(UserError) as raised:
        texts(JsonLines(path=str(path)))
    assert message in str(raised.value) and "line 2" in str(raised.value)
    found, skipped = read_with_skips(JsonLines(path=str(path), on_error="skip"))
    assert found == ["ok"] and message in skipped[0]


def test_prompts_have_their_answer_at_the_mask_or_at_the_end(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        {"q": "Capital of France? ", "a": "Paris"},
        {"q": "Paris is [MASK]'s capital.", "a": "France"},
        {"q": "Say\n[MASK]", "a": "é"},
        {"q": "", "a": "nothing was asked"},
        {"q": "nothing is answered", "a": ""},
    ]
    written = [json.dumps(line) + "\n" for line in lines]
    path.write_text("".join(written))
    second = len(written[0])
    third = second + len(written[1])
    source = JsonPrompts(path=str(path), field="q", answer="a", closing="<eop>")
    marks = "[MASK]", "<eop>"
    assert list(source.documents()) == [
        Document(
            "Capital of France? Paris",
            f"{path}:0",
            "Capital of France? ",
            (Span(18, 24, "answer", *marks),),
        ),
        Document(
            "Paris is France's capital.",
            f"{path}:{second}",
            "Paris is [MASK]'s capital.",
            (Span(8, 15, "answer", *marks),),
        ),
        Document("Say\né", f"{path}:{third}", "Say\n[MASK]", (Span(4, 5, "answer", *marks),)),
    ]
    others = [
        JsonLines(path=str(path), field="q"),
        JsonPrompts(path=str(path), field="a", answer="q", closing="<eop>"),
        JsonPrompts(path=str(path), field="q", answer="a", closing="<eop>", mask="[gMASK]"),
        JsonPrompts(path=str(path), field="q", answer="a"),
    ]
    assert len({source.fingerprint(), *(other.fingerprint() for other in others)}) == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "text": "b"}, "there is no field 'answer'; the fields are 'prompt', 't"),
        ({"answer": "a"}, "there is no field 'prompt'; the fields are 'answer'"),
        ({"prompt": "a", "answer": ["b"]}, "field 'answer' is list, not text"),
        ({"prompt": "[MASK] and [MASK]", "answer": "b"}, "field 'prompt' has [MASK] 2 times"),
    ],
)
def test_prompts_that_are_not_as_they_should(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "fine ", "answer": "thanks"}) + "\n" + json.dumps(line))
    with pytest.raises(UserError) as raised:
        texts(JsonPrompts(path=str(path)))
    assert message in str(raised.value) and "line 2" in str(raised.value)
    found, skipped = read_with_skips(JsonPrompts(path=str(path), on_error="skip"))
    assert found == ["fine thanks"] and message in skipped[0]
    with pytest.raises(UserError, match="two different names"):
        JsonPrompts(path=str(path), answer="prompt")


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfgood\nb\xe9d\nfine")
    for split in ("file", "line"):
        with pytest.raises(UserError, match=r"a\.txt is not UTF-8: byte 0xe9 at offset 9 "):
            texts(TextFiles(path=str(path), split=split))
    found, skipped = read_with_skips(TextFiles(path=str(path), split="line", on_error="skip"))
    assert found == ["good", "fine"] and "offset 9" in skipped[0]
    assert texts(TextFiles(path=str(path), on_error="replace")) == ["good\nb\ufffdd\nfine"]


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_compressed_files(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    lines = b"".join(json.dumps({"text": f"number {n}"}).encode() + b"\n" for n in range(9999))
    for data in (COMPRESS[ending](lines)[:-20], b"this is not compressed at all"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.jsonl"):
            texts(JsonLines(path=str(path)))
        with pytest.raises(UserError, match=r"a\.jsonl"):
            texts(TextFiles(path=str(path)))
        found, skipped = read_with_skips(JsonLines(path=str(path), on_error="skip"))
        assert found == [f"number {n}" for n in range(len(found))]
        assert "left out" in skipped[-1]


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_streams_one_after_another_of_which_one_is_damaged(tmp_path, ending):
    """As parallel compressors and `cat` make them: the rest is not taken for the end."""
    path = tmp_path / f"a.jsonl{ending}"
    first, second = (
        COMPRESS[ending](b"".join(b'{"text": "%d"}\n' % n for n in numbers))
        for numbers in (range(9), range(9, 20))
    )
    source = JsonLines(path=str(path))
    path.write_bytes(first + second)
    assert texts(source) == [str(n) for n in range(20)]
    for damaged in (b"\xff\xff" + second[2:], b"not compressed", second[:20], second[:3]):
        path.write_bytes(first + damaged)
        with pytest.raises(UserError, match=rf"a\.jsonl{ending} is damaged or cut short"):
            texts(source)
        found, skipped = read_with_skips(replace(source, on_error="skip"))
        assert found == [str(n) for n in range(len(found))] and "left out" in skipped[-1]


@pytest.mark.parametrize("block", [3, 1 << 16])
def test_xz_streams_may_have_padding_between_and_behind(tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "PACKED", block)
    path, zeros = tmp_path / "a.txt.xz", bytes(8)
    path.write_bytes(lzma.compress(b"one, ") + zeros + lzma.compress(b"two") + zeros)
    assert texts(TextFiles(path=str(path))) == ["one, two"]


def test_missing_and_empty_corpora(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="no file matches"):
        TextFiles(path=f"{tmp_path}/*.nothing").parts()
    with pytest.raises(UserError, match="is a folder"):
        TextFiles(path=str(tmp_path)).parts()
    with pytest.raises(UserError, match="no text"):
        TextFiles(path=f"{tmp_path}/empty.txt").parts()
    with pytest.raises(UserError, match="names no file"):
        JsonLines(path=()).parts()


def test_settings_that_make_no_sense():
    for wrong in ({"span": (0.5, 0.5)}, {"span": (0.0, 0.5), "split": "line"}, {"separator": ""}):
        with pytest.raises(UserError):
            TextFiles(path="a", **wrong)


def test_fingerprint_follows_settings_and_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    source = TextFiles(path=str(path))
    before = source.fingerprint()
    assert before == TextFiles(path=str(path)).fingerprint()
    assert before != TextFiles(path=str(path), split="line").fingerprint()
    path.write_text("longer")
    assert before != source.fingerprint()


def test_held_out_does_not_depend_on_order_and_is_about_the_fraction():
    documents = [Document(f"text {n}", f"file {n}") for n in range(4000)]
    chosen = {document.text for document in documents if is_held_out(document, 0.1)}
    # Binomial: 400 expected, standard deviation 19.
    assert 300 < len(chosen) < 500
    assert chosen == {d.text for d in reversed(documents) if in_split(d, "held_out", 0.1)}
    # A larger fraction holds out more, never other documents; a copy of a text goes with it.
    assert chosen < {document.text for document in documents if is_held_out(document, 0.2)}
    assert all(is_held_out(Document(text, "copy"), 0.1) for text in chosen)
    assert not any(is_held_out(document, 0.0) for document in documents)
    train = [document for document in documents if in_split(document, "train", 0.1)]
    assert len(train) + len(chosen) == 4000
    assert all(in_split(document, "all", 0.1) for document in documents)


@pytest.mark.parametrize("source", [TextFiles, JsonLines])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("ending", ["", ".gz", ".bz2"])
def test_a_disk_that_fails_is_no_damaged_text(tmp_path, monkeypatch, source, on_error, ending):
    """What cannot be read just now is never left out: the rest would be kept as if it were all."""
    lines = [json.dumps({"text": f"number {n}"}) for n in range(40)]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(COMPRESS[ending]("\n".join(lines).encode()))

    class Unplugged(io.BytesIO):
        def read(self, size=-1):
            raise OSError(errno.EIO, "Input/output error")

        readline = read

    monkeypatch.setattr(files, "open_file", lambda name: Unplugged())
    monkeypatch.setattr(sources, "open_file", lambda name: Unplugged())
    monkeypatch.setattr(files, "RANGE", 100)
    reading = source(path=str(path), on_error=on_error)
    for part in reading.parts():
        with pytest.raises(UserError, match=rf"cannot read .*a\.jsonl{ending}: Input/output error"):
            list(reading.read(part, pytest.fail))


def test_a_folder_that_links_lead_to_again_is_read_once(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    for name in ("a.txt", "z.txt", "inner/m.txt"):
        (tmp_path / name).write_text(name)
    expected = texts(TextFiles(path=f"{tmp_path}/**/*.txt"))
    assert sorted(expected) == ["a.txt", "inner/m.txt", "z.txt"]
    (tmp_path / "latest").symlink_to(".")
    assert texts(TextFiles(path=f"{tmp_path}/**/*.txt")) == expected
    monkeypatch.chdir(tmp_path)
    paths = ("a.txt", "./a.txt", f"{tmp_path}/*.txt", "latest/z.txt")
    assert texts(TextFiles(path=paths)) == ["a.txt", "z.txt"]
    # A file that is linked to is another name for a text that is wanted, as in caches of downloads.
    (tmp_path / "b.txt").symlink_to("a.txt")
    assert texts(TextFiles(path="*.txt")) == ["a.txt", "a.txt", "z.txt"]
