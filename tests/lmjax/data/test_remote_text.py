"""Text at URLs is the same text, and tokens at a URL are made once for all machines."""

import bz2
import gzip
import lzma
import os

import fsspec
import pytest
import zstandard

from lmjax.config import UserError
from lmjax.data import (
    Bytes,
    Data,
    Domain,
    JsonLines,
    TextFiles,
    TokenizerFolder,
    TrainedBPE,
    run_tokenizer,
)
from lmjax.data import files as data_files
from lmjax.data.hashes import FileHashes
from lmjax.data.preparation import prepare
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.remote import Objects
from tests import object_store

LINES = "".join(f"line {n} of the text, and {n * n}\n" for n in range(400)).encode()
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


@pytest.fixture(params=["memory", "late"])
def bucket(request, tmp_path, monkeypatch):
    """The URL of an empty place in each store."""
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(object_store.FOLDER, str(tmp_path / "objects"))
    (tmp_path / "objects").mkdir()
    yield f"{request.param}://bucket/text"
    fsspec.filesystem("memory").store.clear()


def fill(bucket, **files):
    """Objects of these names, listed by now, and files with the same in a folder."""
    objects = Objects(bucket)
    for name, data in files.items():
        objects.write(name, data)
    for _ in range(object_store.LATE):
        objects.listed()
    return objects


@pytest.mark.parametrize("ending", PACK)
def test_documents_at_a_url_are_those_of_a_file(bucket, tmp_path, monkeypatch, ending):
    monkeypatch.setattr(data_files, "RANGE", 1000)  # several parts, each sought in
    name, data = f"a.txt{ending}", PACK[ending](LINES)
    (tmp_path / name).write_bytes(data)
    fill(bucket, **{name: data})
    here = TextFiles(path=str(tmp_path / name), split="line")
    there = TextFiles(path=f"{bucket}/{name}", split="line")
    assert [d.text for d in there.documents()] == [d.text for d in here.documents()]
    assert len(there.parts()) == len(here.parts()) > (ending == "")
    assert there.fingerprint() == here.fingerprint()


def test_patterns_at_a_url(bucket, tmp_path):
    names = {"b/2.jsonl": b'{"text": "two"}\n', "b/1.jsonl": b'{"text": "one"}\n', "c.txt": b"no"}
    fill(bucket, **names)
    found = JsonLines(path=f"{bucket}/**/*.jsonl")
    assert [document.text for document in found.documents()] == ["one", "two"]
    with pytest.raises(UserError, match=r"no object matches .*\*\.csv"):
        TextFiles(path=f"{bucket}/*.csv").parts()
    with pytest.raises(UserError, match=r"is a folder; name the objects in it"):
        TextFiles(path=bucket).parts()
    (tmp_path / "d.jsonl").write_text('{"text": "three"}\n')
    both = JsonLines(path=(str(tmp_path / "d.jsonl"), f"{bucket}/b/*.jsonl"))
    assert [document.text for document in both.documents()] == ["three", "one", "two"]


def test_what_is_wrong_says_where(bucket):
    fill(bucket, **{"bad.jsonl": b'{"text": "one"}\nnot json\n', "cut.gz": PACK[".gz"](LINES)[:-9]})
    with pytest.raises(UserError, match=rf"{bucket}/bad.jsonl, line 2: not JSON"):
        list(JsonLines(path=f"{bucket}/bad.jsonl").documents())
    with pytest.raises(UserError, match=rf"{bucket}/cut.gz is damaged or cut short"):
        list(TextFiles(path=f"{bucket}/cut.gz").documents())


def test_objects_are_hashed_once_until_they_change(bucket, tmp_path):
    objects = fill(bucket, **{"a.txt": LINES})
    read = []
    hashes = FileHashes(tmp_path / "hashes", lambda what, done, total: read.append(done))
    first = hashes([f"{bucket}/a.txt"])
    assert read
    read.clear()
    assert hashes([f"{bucket}/a.txt"]) == first and not read
    objects.write("a.txt", LINES.replace(b"7", b"8"))
    assert hashes([f"{bucket}/a.txt"]) != first and read


def data_at(bucket, cache, tokenizer):
    source = TextFiles(path=f"{bucket}/a.txt", split="line")
    domains = (Domain(name="lines", source=source),)
    return Data(train=domains, tokenizer=tokenizer, held_out=0.2, length=16, cache=cache)


def test_tokens_at_a_url_are_made_by_one_machine_for_all(bucket, tmp_path, monkeypatch):
    fill(bucket, **{"a.txt": LINES})
    alone = prepare(
        data_at(bucket, str(tmp_path / "own"), TrainedBPE(vocab_size=300)), tmp_path / "0"
    )
    shared = data_at(bucket, f"{bucket}/cache", TrainedBPE(vocab_size=300))
    first = prepare(shared, tmp_path / "1")
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "another machine"))

    def never(*arguments):
        raise AssertionError("was made again")

    monkeypatch.setattr(run_tokenizer, "_Texts", never)
    monkeypatch.setattr("lmjax.data.tokenize.make_shards", never)
    second = prepare(shared, tmp_path / "2")
    for found in (first, second):
        for name in ("train", "held_out"):
            stores = getattr(found, name)["lines"], getattr(alone, name)["lines"]
            assert stores[0].tokens.tobytes() == stores[1].tokens.tobytes()
            assert stores[0].manifest == stores[1].manifest
        assert found.tokenizer.fingerprint == alone.tokenizer.fingerprint
    assert str(second.train["lines"].folder).startswith(str(tmp_path / "another machine"))


def test_tokens_that_were_not_sent_whole_are_made_anew(bucket, tmp_path, monkeypatch):
    fill(bucket, **{"a.txt": LINES})
    shared = data_at(bucket, f"{bucket}/cache", Bytes())
    folder = prepare(shared, tmp_path / "1").train["lines"].folder.parent
    objects = Objects(f"{bucket}/cache/tokens/{folder.name}")
    wanted = objects.read("train/tokens.bin")
    objects.delete("train/tokens.bin")
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "another machine"))
    prepare(shared, tmp_path / "2")
    assert objects.read("train/tokens.bin") == wanted


def test_a_tokenizer_at_a_url(bucket, tmp_path):
    made = ByteTokenizer()
    made.save(tmp_path / "bytes")
    fill(
        bucket,
        **{
            name: (tmp_path / "bytes" / name).read_bytes()
            for name in os.listdir(tmp_path / "bytes")
        },
    )
    assert TokenizerFolder(path=bucket).origin() == made.fingerprint
