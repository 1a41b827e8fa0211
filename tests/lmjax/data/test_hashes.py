"""What files hold: the same for copies, another for any change, and read once."""

import hashlib
import json
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.data import hashes
from lmjax.data.hashes import FileHashes


def settle(*paths):
    """Gives files the times of an hour ago; the time of the last change of times stays new."""
    for path in paths:
        os.utime(path, (time.time() - 3600,) * 2)


@pytest.fixture
def reads(monkeypatch):
    """The blocks that were read; and every file counts as settled."""
    found = []
    hash_block = hashes._hash_block

    def counted(block):
        found.append(block)
        return hash_block(block)

    monkeypatch.setattr(hashes, "_hash_block", counted)
    monkeypatch.setattr(hashes, "SETTLED", -(10**12))
    return found


@given(content=st.binary(max_size=200), block=st.integers(1, 64), piece=st.integers(1, 64))
def test_a_hash_is_that_of_the_blocks_hashes(tmp_path_factory, content, block, piece):
    path = tmp_path_factory.mktemp("hash") / "a"
    path.write_bytes(content)
    blocks = [content[n : n + block] for n in range(0, max(len(content), 1), block)]
    expected = hashlib.sha256(b"".join(hashlib.sha256(b).digest() for b in blocks)).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashes, "BLOCK", block)
        patch.setattr(hashes, "PIECE", piece)
        assert FileHashes()([str(path)]) == [f"{len(content)}-{expected[:32]}"]


def test_copies_are_alike_and_changes_are_not(tmp_path):
    names = [tmp_path / name for name in ("a", "copy", "longer", "other", "empty")]
    for name, content in zip(names, (b"one", b"one", b"one\n", b"onf", b""), strict=True):
        name.write_bytes(content)
    settle(names[1])
    found = FileHashes()(list(map(str, names)))
    assert found[0] == found[1] and len(set(found)) == 4
    assert FileHashes()([str(names[3]), str(names[0])]) == [found[3], found[0]]


def test_a_file_is_read_once_as_long_as_nothing_touches_it(tmp_path, reads):
    files = [str(tmp_path / name) for name in "abc"]
    for name in files:
        Path(name).write_text(name)
    cache = tmp_path / "cache"
    first = FileHashes(cache)(files)
    assert len(reads) == 3
    assert FileHashes(cache)(files) == FileHashes(cache)(files) == first and len(reads) == 3
    assert FileHashes(cache)(files[:1]) == first[:1] and len(reads) == 3
    Path(files[1]).write_text("B" * len(files[1]))  # the same size
    second = FileHashes(cache)(files)
    assert [block[0] for block in reads[3:]] == [files[1]] and second[1] != first[1]
    # The same size and the same time of change, as a copy with times leaves it.
    before = os.stat(files[2])
    Path(files[2]).write_text("C" * before.st_size)
    os.utime(files[2], ns=(before.st_atime_ns, before.st_mtime_ns))
    third = FileHashes(cache)(files)
    assert [block[0] for block in reads[4:]] == [files[2]] and third[2] != first[2]


def alike(folder):
    """Two files of one size and the very same times, as a disk image or a quick copy has them."""
    for attempt in range(200):
        pair = [folder / f"{name}{attempt}" for name in "ab"]
        for path in pair:
            path.write_text(path.name)
            settle(path)
        for path in pair:
            os.utime(path, ns=(0, 0))
        if len({path.stat().st_ctime_ns for path in pair}) == 1:
            return pair
    pytest.skip("this disk never gives two files the same time")


@pytest.mark.parametrize("of", ["file", "folder"])
def test_a_link_that_leads_to_another_file(tmp_path, reads, of):
    """`current` is version 1, and then version 2: the files are alike but for what they hold."""
    pair = alike(tmp_path)
    if of == "folder":
        for number, path in enumerate(pair):
            (tmp_path / f"v{number}").mkdir()
            os.link(path, tmp_path / f"v{number}" / "text")
    link, cache = tmp_path / "current", tmp_path / "cache"
    found = []
    for number, path in enumerate(pair):
        link.unlink(missing_ok=True)
        link.symlink_to(path if of == "file" else tmp_path / f"v{number}")
        found += FileHashes(cache)([str(link if of == "file" else link / "text")])
    assert found == FileHashes()(list(map(str, pair))) and found[0] != found[1]


def test_a_file_of_another_number_at_the_same_place_is_read_again(tmp_path, reads):
    first, second = alike(tmp_path)
    path, cache = tmp_path / "text", tmp_path / "cache"
    for original in (first, second):
        path.unlink(missing_ok=True)
        os.link(original, path)
        if original is first:
            before = FileHashes(cache)([str(path)])
    marks = {path: hashes._mark(str(path)) for path in (first, second)}
    assert marks[first] != marks[second]
    assert FileHashes(cache)([str(path)]) != before


def test_the_times_of_a_file_that_was_just_written_are_not_trusted(tmp_path):
    """It may be written again within the clock's step, and keep its size and its times."""
    path, cache = tmp_path / "a", tmp_path / "cache"
    path.write_text("one")
    FileHashes(cache)([str(path)])
    (known,) = cache.glob("*.json")
    assert json.loads(known.read_text()) == {}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', "null"])
def test_a_cache_that_makes_no_sense_is_passed_over(tmp_path, reads, content):
    path, cache = tmp_path / "a", tmp_path / "cache"
    path.write_text("one")
    expected = FileHashes(cache)([str(path)])
    (known,) = cache.glob("*.json")
    known.write_text(content)
    assert FileHashes(cache)([str(path)]) == expected


@pytest.mark.parametrize("place", ["/dev/null/cache", "/proc/cache"])
def test_a_cache_that_cannot_be_written_keeps_nothing(tmp_path, place):
    path = tmp_path / "a"
    path.write_text("one")
    assert FileHashes(Path(place))([str(path)]) == FileHashes()([str(path)])


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("one")
    hash_block = hashes._hash_block

    def changing(block):
        path.write_text("two, and more")
        return hash_block(block)

    monkeypatch.setattr(hashes, "_hash_block", changing)
    with pytest.raises(UserError, match="was changed while it was read"):
        FileHashes(tmp_path / "cache")([str(path)])


def test_what_was_read_before_a_failure_is_kept(tmp_path, reads):
    files = [str(tmp_path / name) for name in "ab"]
    Path(files[0]).write_text("a")
    os.mkfifo(files[1])
    os.unlink(files[1])
    with pytest.raises(UserError, match="cannot read the text: No such file"):
        FileHashes(tmp_path / "cache")(files)
    Path(files[1]).mkdir()
    with pytest.raises(UserError, match="cannot read the text: Is a directory"):
        FileHashes(tmp_path / "cache")(files)
    assert len(reads) == 2
    FileHashes(tmp_path / "cache")(files[:1])
    assert len(reads) == 2


def test_two_at_once_read_it_once(tmp_path, reads):
    path = tmp_path / "a"
    path.write_text("one")
    found, said = [], []

    def progress(what, done, total):
        said.append(what)
        if what.startswith("hashing"):
            time.sleep(0.3)

    hash_files = FileHashes(tmp_path / "cache", progress)
    threads = [
        threading.Thread(target=lambda: found.append(hash_files([str(path)]))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1 and found[0] == found[1] == found[2]
    assert any(what.startswith("waiting for another process") for what in said)
