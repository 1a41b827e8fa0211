"""Token stores: what is in them, and that they are made whole, alike, and again after a kill."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from lmjax.config import UserError, config
from lmjax.data import shards, tokenize
from lmjax.data.documents import Document, Part, Source, is_held_out
from lmjax.data.sources import JsonLines, JsonPrompts, TextFiles
from lmjax.data.store import FORMAT, TokenStore, open_store
from lmjax.data.tokenize import build_stores
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer

BYTES = ByteTokenizer()
TEXTS = [f"document {n}: " + "grüße " * (n % 17) for n in range(400)]


@pytest.fixture
def source(tmp_path):
    for start in range(0, 400, 40):
        lines = [json.dumps({"text": text}) for text in TEXTS[start : start + 40]]
        (tmp_path / f"part{start:03d}.jsonl").write_text("\n".join(lines) + "\n")
    return JsonLines(path=f"{tmp_path}/*.jsonl")


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_store_holds_the_documents_in_order(source, tmp_path):
    store = build_stores(source, BYTES, tmp_path / "s")["all"]
    expected = [token for text in TEXTS for token in (256, *text.encode())]
    assert store.tokens.tolist() == expected
    assert store.tokens.dtype == np.uint16
    assert [store.text(n, BYTES) for n in range(400)] == TEXTS
    assert store.document_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert store.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert (store.tokens[store.offsets[:-1]] == 256).all()
    assert (store.manifest.documents, store.manifest.tokens) == (400, len(expected))


@pytest.mark.parametrize("wrong", [-1, 150, 195, 70_000, 2**40])
def test_ids_beyond_the_vocabulary_are_refused(source, tmp_path, wrong):
    class Wrong(ByteTokenizer):
        vocab_size, begin, end = 150, 149, 149

        def encode_batch(self, texts):
            return [[1, 2, wrong] for _ in texts]

    with pytest.raises(UserError, match=rf"the id {wrong}.* vocab_size=150"):
        build_stores(source, Wrong(), tmp_path / "s")
    assert not (tmp_path / "s").exists() and not (tmp_path / "s.partial").exists()


def test_begin_and_end_that_differ_stand_round_a_document(source, tmp_path):
    class TwoMarks(ByteTokenizer):
        vocab_size, begin, end = 258, 256, 257

    store = build_stores(source, TwoMarks(), tmp_path / "s")["all"]
    document = store.tokens[store.offsets[5] : store.offsets[6]].tolist()
    assert document == [256, *TEXTS[5].encode(), 257]


@pytest.mark.parametrize("workers", [0, 2])
def test_answers_stand_between_their_tokens(tmp_path, workers):
    """Held out by the prompt: whatever its answers are, they stand on one side."""
    path = tmp_path / "a.jsonl"
    lines = [
        {"prompt": f"{n}, [MASK]!" if n % 2 else f"{n}?", "answer": answer}
        for n in range(50)
        for answer in ("yes", "no")
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    source = JsonPrompts(path=str(path), closing="<eop>")
    tokenizer = ExtendedTokenizer(BYTES, ("[MASK]", "<eop>"))
    stores = build_stores(source, tokenizer, tmp_path / "s", held_out=0.3, workers=workers)
    found = {}
    for name, store in stores.items():
        assert store.text_bytes == sum(store.document_bytes)
        for n in range(store.manifest.documents):
            tokens = store.tokens[store.offsets[n] : store.offsets[n + 1]].tolist()
            found.setdefault(name, []).append(tokens)
            assert store.document_bytes[n] == len(tokens) - 3
    expected = [
        [
            *(256, *(f"{n}," if n % 2 else f"{n}?").encode()),
            *(257, *(f" {a}" if n % 2 else a).encode()),
            *(258, *(b"!" if n % 2 else b"")),
        ]
        for n in range(50)
        for a in ("yes", "no")
    ]
    assert sorted(found["train"] + found["held_out"]) == sorted(expected)
    assert 5 < len(found["held_out"]) // 2 < 25
    for documents in found.values():
        prompts = [tuple(d[: d.index(257)]) for d in documents]
        assert all(prompts.count(prompt) == 2 for prompt in prompts)


def test_answers_need_their_tokens(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Why?", "answer": "Because."}')
    tokenizer = ExtendedTokenizer(BYTES, ("[MASK]",))
    with pytest.raises(UserError, match=r"a\.jsonl:0: .*lacks '<.endofpiece.>' .its special tok"):
        build_stores(JsonPrompts(path=str(path)), tokenizer, tmp_path / "s")


def test_large_vocabularies_take_four_bytes(source, tmp_path):
    class Large(ByteTokenizer):
        vocab_size, begin, end = 70_000, 69_999, 69_999

    store = build_stores(source, Large(), tmp_path / "s")["all"]
    assert store.tokens.dtype == np.uint32 and store.tokens[0] == 69_999


def test_held_out_documents_go_into_a_store_of_their_own(source, tmp_path):
    stores = build_stores(source, BYTES, tmp_path / "s", held_out=0.2)
    chosen = {d.text for d in source.documents() if is_held_out(d, 0.2)}
    for name, expected in (
        ("held_out", [text for text in TEXTS if text in chosen]),
        ("train", [text for text in TEXTS if text not in chosen]),
    ):
        store = stores[name]
        assert [store.text(n, BYTES) for n in range(store.manifest.documents)] == expected


@pytest.mark.parametrize("early", [0, 2_000, 10**9])
@pytest.mark.parametrize("kept", [1, 700, 10**9])
def test_the_text_of_the_first_documents_is_kept(source, tmp_path, monkeypatch, kept, early):
    """Whole documents until so many bytes are reached; training text from the first shards."""
    monkeypatch.setattr(shards, "TEXT_BYTES", kept)
    monkeypatch.setattr(tokenize, "TEXT_BYTES", kept)
    monkeypatch.setattr(shards, "EARLY", early)
    stores = build_stores(source, BYTES, tmp_path / "s", held_out=0.3)
    parts, before, begins = source.parts(), 0, []  # each a shard
    for part in parts:
        begins.append(before)
        before += part.size
    for name, store in stores.items():
        expected, size = [], 0
        for begin, part in zip(begins, parts):
            if name == "train" and begin >= early:
                break
            for document in source.read(part, lambda message: None):
                if is_held_out(document, 0.3) == (name == "held_out") and size < kept:
                    expected.append(document.text.encode())
                    size += len(expected[-1])
        assert list(store.source_texts()) == expected
        assert len(expected) == store.manifest.documents or size >= kept or early < before


def test_any_number_of_workers_makes_the_same_files(source, tmp_path):
    for workers in (0, 2):
        build_stores(source, BYTES, tmp_path / f"s{workers}", held_out=0.1, workers=workers)
    assert contents(tmp_path / "s0") == contents(tmp_path / "s2")


def test_a_finished_store_is_not_made_again(source, tmp_path, monkeypatch):
    build_stores(source, BYTES, tmp_path / "s")
    monkeypatch.setattr(tokenize, "make_shards", None)
    assert build_stores(source, BYTES, tmp_path / "s")["all"].manifest.documents == 400


KILLED = """
import os, signal, sys
from lmjax.data import JsonLines, build_stores
from lmjax.data.tokenizers import ByteTokenizer

def progress(what, done, total):
    if done > float(sys.argv[3]) * total:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    source, workers = JsonLines(path=sys.argv[1]), int(sys.argv[4])
    build_stores(source, ByteTokenizer(), sys.argv[2], 0.1, workers, progress)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_after_a_kill(source, tmp_path, workers, monkeypatch):
    build_stores(source, BYTES, tmp_path / "whole", held_out=0.1)
    (tmp_path / "killed.py").write_text(KILLED)
    arguments = [source.path, str(tmp_path / "s"), "0.5", str(workers)]
    # Returns only when every process that inherited the pipes has ended: no worker is left behind.
    killed = subprocess.run(
        [sys.executable, str(tmp_path / "killed.py"), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "s").exists()
    finished = len(list((tmp_path / "s.partial").glob("shard-??????")))
    assert finished >= 5
    written = []
    write = shards._write_shard
    monkeypatch.setattr(shards, "_write_shard", lambda *task: written.append(write(*task)))
    build_stores(source, BYTES, tmp_path / "s", held_out=0.1)
    assert len(written) == 10 - finished
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    assert not (tmp_path / "s.partial").exists()


def test_shards_of_something_else_are_not_used(source, tmp_path):
    (tmp_path / "s.partial" / "shard-000000").mkdir(parents=True)
    (tmp_path / "s.partial" / "made_from.json").write_text("[]")
    assert build_stores(source, BYTES, tmp_path / "s")["all"].manifest.documents == 400


def test_two_at_once_wait_for_each_other(source, tmp_path):
    found = []

    def build():
        found.append(build_stores(source, BYTES, tmp_path / "s")["all"].manifest)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and found[0] == found[1] == found[2]


def test_mismatch_is_refused(source, tmp_path):
    store = build_stores(source, BYTES, tmp_path / "s")["all"]
    folder, made_from = store.folder, store.manifest
    assert open_store(folder, made_from.source, made_from.tokenizer).text_bytes > 0
    with pytest.raises(UserError, match="made from another tokenizer"):
        open_store(folder, made_from.source, "other")
    with pytest.raises(UserError, match="made from another source"):
        open_store(folder, "other", made_from.tokenizer)
    other = JsonLines(path=source.path, on_error="skip")
    with pytest.raises(UserError, match="made from another source"):
        build_stores(other, BYTES, tmp_path / "s")


def test_damage_is_noticed(source, tmp_path):
    folder = build_stores(source, BYTES, tmp_path / "s")["all"].folder
    tokens = folder / "tokens.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"damaged: tokens\.bin should have \d+ bytes and has"):
        TokenStore(folder)
    tokens.unlink()
    with pytest.raises(UserError, match="is missing"):
        TokenStore(folder)
    tokens.write_bytes(whole)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    for wrong, message in (
        (text[:50], "cannot be read"),
        ("[]", "cannot be read"),
        (text.replace(f'"format": {FORMAT}', '"format": 99'), "has format 99"),
    ):
        manifest.write_text(wrong)
        with pytest.raises(UserError, match=message):
            TokenStore(folder)
    manifest.unlink()
    with pytest.raises(UserError, match="there is no token store"):
        TokenStore(folder)


def test_bad_input_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": \n{"text": "two"}\n')
    for workers in (0, 1):
        with pytest.raises(UserError, match="line 2"):
            build_stores(JsonLines(path=str(path)), BYTES, tmp_path / "s", workers=workers)
        assert not (tmp_path / "s").exists() and not (tmp_path / "s.partial").exists()
    source = JsonLines(path=str(path), on_error="skip")
    manifest = build_stores(source, BYTES, tmp_path / "s")["all"].manifest
    assert (manifest.documents, manifest.skipped) == (2, 1)
    assert "line 2" in manifest.skipped_first[0]


def test_empty_parts_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("only one document")
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"held_out=0\.5 the"):
        build_stores(TextFiles(path=f"{tmp_path}/a.txt"), BYTES, tmp_path / "s", held_out=0.5)
    with pytest.raises(UserError, match="the corpus is empty"):
        build_stores(TextFiles(path=f"{tmp_path}/blank.txt"), BYTES, tmp_path / "s")
    assert not list(tmp_path.glob("s*"))[1:]  # the lock file alone


def test_full_disk_is_told_and_finished_shards_are_kept(source, tmp_path, monkeypatch):
    class Full(type(BYTES)):
        calls = 0

        def encode_batch(self, texts):
            self.calls += 1
            if self.calls == 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            return BYTES.encode_batch(texts)

    with pytest.raises(UserError, match=r"disk is full while tokenizing into .*GB free"):
        build_stores(source, Full(), tmp_path / "s")
    assert len(list((tmp_path / "s.partial").glob("shard-*"))) == 3
    assert build_stores(source, BYTES, tmp_path / "s")["all"].manifest.documents == 400
    # Known beforehand, when the shards are joined.
    usage = tokenize.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tokenize.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(UserError, match="disk is full"):
        build_stores(source, BYTES, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_text_that_changes_while_it_is_tokenized_is_told(source, tmp_path):
    """Its download goes on: what is kept would be known by the hash of something else."""

    class Slow(ByteTokenizer):
        def encode_batch(self, texts):
            with (tmp_path / "part000.jsonl").open("a") as file:
                file.write('{"text": "more"}\n')
            return super().encode_batch(texts)

    with pytest.raises(UserError, match="the text was changed while it was tokenized"):
        build_stores(source, Slow(), tmp_path / "s")
    assert not (tmp_path / "s").exists() and not (tmp_path / "s.partial").exists()
    assert build_stores(source, BYTES, tmp_path / "s")["all"].manifest.documents > 400


def test_a_shard_that_a_power_cut_has_shortened_is_not_joined(source, tmp_path, monkeypatch):
    def cut(*arguments):
        folders = shards.make_shards(*arguments)
        path = folders[3] / "all.tokens"
        os.truncate(path, path.stat().st_size - 2)
        return folders

    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "make_shards", cut)
        with pytest.raises(UserError, match=r"shards in .*s\.partial are damaged.*same command"):
            build_stores(source, BYTES, tmp_path / "s")
    assert build_stores(source, BYTES, tmp_path / "s")["all"].manifest.documents == 400


@config
class Deadly(Source):
    """Four parts; what reads the third one is killed, the first time."""

    flag: str

    def parts(self):
        return tuple(Part("part", start, size=1) for start in range(4))

    def read(self, part, on_skip):
        path = pathlib.Path(self.flag)
        if part.start == 2 and not path.exists():
            while not [*path.parent.glob("s.partial/shard-??????")]:
                time.sleep(0.01)
            path.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield Document(f"text {part.start}", f"part {part.start}")


def test_a_worker_that_is_killed_is_told_and_finished_shards_are_kept(tmp_path):
    source = Deadly(flag=str(tmp_path / "flag"))
    with pytest.raises(UserError, match=r"a process that was tokenizing has died.*same command"):
        build_stores(source, BYTES, tmp_path / "s", workers=2)
    assert [*tmp_path.glob("s.partial/shard-??????")]
    store = build_stores(source, BYTES, tmp_path / "s", workers=2)["all"]
    assert [store.text(n, BYTES) for n in range(4)] == [f"text {n}" for n in range(4)]
