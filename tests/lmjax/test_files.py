"""Errors of disks in words, whatever stands around them; paths, locks, and whole files."""

import errno
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.files import (
    errors_told,
    is_full,
    local_path,
    lock,
    os_error,
    reason,
    write_atomically,
)
from lmjax.launch import exit_on_user_error

FULL = OSError(errno.ENOSPC, "No space left on device")


def linked(*errors, by):
    """The first of the errors, each with the next behind it, and the last with the first."""
    for error, behind in zip(errors, [*errors[1:], errors[0]], strict=True):
        setattr(error, by, behind)
    return errors[0]


@pytest.mark.parametrize("by", ["__cause__", "__context__"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_chains_that_go_in_a_circle_end(by, length):
    circle = linked(*(ValueError(str(n)) for n in range(length)), by=by)
    assert os_error(circle) is None and not is_full(circle) and reason(circle) is None
    circle = linked(ValueError("a"), *(RuntimeError(str(n)) for n in range(length)), FULL, by=by)
    assert is_full(circle) and "No space left" in reason(circle)
    FULL.__cause__ = FULL.__context__ = None


@given(st.lists(st.integers(0, 7), min_size=8, max_size=8), st.integers(0, 8))
def test_any_chain_ends_and_finds_what_can_be_reached(behind, place):
    """Eight exceptions, each with any other behind it; one of them is perhaps the system's."""
    errors = [ValueError(str(n)) for n in range(8)]
    if place < 8:
        errors[place] = OSError(errno.EIO, "Input/output error")
    for error, other in zip(errors, behind, strict=True):
        error.__cause__ = errors[other]
    reached, at = set(), 0
    while at not in reached:
        reached.add(at)
        at = behind[at]
    assert (os_error(errors[0]) is not None) == (place in reached)


def test_the_nearest_error_is_told_but_a_full_disk_before_all():
    outer = PermissionError(errno.EACCES, "Permission denied", "/a/b")
    outer.__context__ = FileNotFoundError(errno.ENOENT, "No such file or directory", "/a")
    assert reason(outer) == "Permission denied: /a/b"
    outer.__context__.__cause__ = ExceptionGroup("several", [ValueError("x"), FULL])
    assert is_full(outer) and reason(outer) == "No space left on device"
    hidden = ValueError("told otherwise")
    hidden.__context__, hidden.__suppress_context__ = outer, True
    assert os_error(hidden) is None


def test_what_array_writers_in_c_say_is_understood():
    words = (
        "UNKNOWN: Error writing \"x/.zarray\": Input/output error [os_error_code='5'] [spec=...]"
    )
    assert os_error(ValueError(words)).errno == errno.EIO
    assert reason(ValueError(words)) == "Input/output error"
    assert is_full(RuntimeError("write failed: Disk quota exceeded"))
    assert reason(NotADirectoryError("no number: /a")) == "no number: /a"


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "link").symlink_to("/nowhere/at all")
    words = r"cannot save: .*link is a link to /nowhere/at all, which"
    with pytest.raises(UserError, match=words), errors_told("cannot save"):
        (tmp_path / "link" / "file").write_text("x")


@pytest.mark.parametrize(
    "url",
    [
        "gs://bucket/run",
        "s3://b",
        "GS://b",
        "hf://a/b",
        "https://a/b.txt",
        "file:///a",
        "abfs+x://c",
    ],
)
def test_urls_are_refused_with_the_reason(url):
    for given_ in (url, Path(url)):
        with pytest.raises(UserError, match=r"output=.*URL.*paths of this machine") as refused:
            local_path(given_, "output")
    if url.startswith("gs"):
        assert "gcsfuse" in str(refused.value)


@pytest.mark.parametrize(
    "path", ["", ".", "runs/a", "/runs/a", "C:/runs", "a:b/c", "./gs:/b", "data/**/*.txt"]
)
def test_paths_stay_as_they_are(path):
    assert local_path(path, "x") == Path(path)


def test_home_is_put_in_full_where_there_is_one(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~/runs", "output") == Path("/home/me/runs")
    with pytest.raises(UserError, match=r"output=~nobody-of-that-name/x: .*give the path in full"):
        local_path("~nobody-of-that-name/x", "output")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "notes.json"
    write_atomically(path, "first")

    def fail(descriptor):
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UserError, match=r"cannot write .*notes\.json: No space"):
            write_atomically(path, "second")
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["notes.json"]


def test_many_may_write_one_file_at_once(tmp_path):
    """Threads, and processes where no lock holds them off."""
    path = tmp_path / "notes.json"
    texts = [letter * 5000 for letter in "abcd"]
    path.write_text(texts[0])

    def write(text):
        found = []
        for _ in range(30):
            write_atomically(path, text)
            found.append(path.read_text())
        return found

    with ThreadPoolExecutor(len(texts)) as pool:
        for found in pool.map(write, texts):
            assert set(found) <= set(texts)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.json"]


@pytest.mark.parametrize(
    "code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, 524]
)
def test_a_file_system_without_locks_is_told_apart(tmp_path, monkeypatch, code):
    def flock(*arguments):
        raise OSError(code, os.strerror(code))

    with (tmp_path / "lock").open("w") as file, (tmp_path / "lock").open("w") as other:
        assert lock(file)
        with pytest.raises(BlockingIOError):
            lock(other)
        monkeypatch.setattr(fcntl, "flock", flock)
        assert not lock(file)
        code = errno.EIO
        with pytest.raises(OSError, match="Input/output"):
            lock(file)


def code_of(error):
    """The exit code of a program that ends with an error."""
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        raise error
    return ended.value.code


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO, errno.ESTALE, errno.EDQUOT])
def test_a_program_ends_with_one_line_where_the_disk_fails(capsys, code):
    behind = OSError(code, os.strerror(code), "runs/a")
    error = linked(ValueError("of an array writer"), behind, by="__cause__")
    assert code_of(error) == 2
    said = capsys.readouterr().err
    assert "runs/a" in said and "still there" in said and len(said.splitlines()) == 1


def test_a_mistake_of_ours_keeps_its_traceback():
    error = linked(FileNotFoundError(errno.ENOENT, "No such file"), KeyError(1), by="__cause__")
    with pytest.raises(FileNotFoundError), exit_on_user_error():
        raise error
