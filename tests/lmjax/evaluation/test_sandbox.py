"""The sandbox: no network, no file outside its folder, no process that outlives it, its limits."""

import contextlib
import ctypes
import functools
import os
import socket
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from lmjax.config import UserError
from lmjax.evaluation.tasks import HumanEval, sandbox
from lmjax.evaluation.tasks.sandbox import isolation

# Also where the system takes no network away.
run_program = functools.partial(sandbox.run_program, allow_network=True)
run_cell = functools.partial(sandbox.run_cell, allow_network=True)
SECONDS = 20.0  # of a program that ends by itself, on a busy machine
LANDLOCK = sys.platform == "linux" and ctypes.CDLL(None).syscall(444, None, 0, 1) > 0

isolated = pytest.mark.skipif(not isolation(), reason="the system has no user namespaces")
guarded = pytest.mark.skipif(not LANDLOCK, reason="the system has no Landlock")


def test_limits_of_time_memory_and_files():
    for endless in ("while True: pass", "import time; time.sleep(60)"):
        assert run_program(endless, 1.0).reason == "more than 1 seconds"
    assert run_program("x = 'a' * (1 << 31)", SECONDS).reason == "MemoryError"
    code = "open('f', 'w').write('a' * (1 << 22))"
    assert "File too large" in run_program(code, SECONDS).reason
    code = "files = [open(str(n), 'w') for n in range(40)]"
    assert "Too many open files" in run_program(code, SECONDS).reason
    code = "import os; assert 'SECRET' not in os.environ; assert os.listdir('.') == []"
    assert run_program(code, SECONDS).passed


def test_endless_output_is_not_kept():
    """Eighty megabytes of errors, and as much of a cell's words: the ends stay, and the count."""
    code = "import sys\nfor _ in range(80): sys.stderr.write('a' * 1_000_000)\nraise ValueError"
    tracemalloc.start()
    found = run_program(code, SECONDS)
    ended, said = run_cell("for _ in range(80): print('a' * 999_999)", seconds=SECONDS)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == (False, "ValueError")
    assert ended and said.startswith("aaa") and said.endswith("... (80,000,000 bytes)")
    assert most < 4_000_000


def test_code_is_refused_where_its_network_cannot_be_taken_away(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", tuple)
    for call in (sandbox.run_program, sandbox.run_cell):
        with pytest.raises(UserError, match=r"with our network.*allow_network=true"):
            call("1")
    with pytest.raises(UserError, match="with our network"):
        HumanEval(path="x", run_code=True).questions()
    assert run_program("x = 1", SECONDS).passed


@contextlib.contextmanager
def listening(kind):
    """A socket of this machine that nobody has spoken to."""
    with socket.socket(socket.AF_INET, kind) as own:
        own.bind(("127.0.0.1", 0))
        own.settimeout(0.2)
        if kind == socket.SOCK_STREAM:
            own.listen()
        yield own, own.getsockname()[1]


@isolated
def test_nobody_is_reached_by_tcp():
    with listening(socket.SOCK_STREAM) as (server, port):
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)"
        found = run_program(code, SECONDS)
        assert not found.passed and "Error" in found.reason
        assert run_cell(code, seconds=SECONDS)[0] is False
        with pytest.raises(TimeoutError):
            server.accept()


SEND = "import socket; socket.socket(2, 2).sendto(b'who is there?', ('127.0.0.1', {}))"


@isolated
def test_nobody_is_asked_for_a_name(monkeypatch):
    """Names are asked for by UDP. The same program outside of its network does reach the socket."""
    with listening(socket.SOCK_DGRAM) as (server, port):
        assert "unreachable" in run_program(SEND.format(port), SECONDS).reason
        with pytest.raises(TimeoutError):
            server.recv(64)
        monkeypatch.setattr(sandbox, "isolation", tuple)
        assert run_program(SEND.format(port), SECONDS).passed
        assert server.recv(64) == b"who is there?"
    names = "import socket; socket.getaddrinfo('example.com', 80)"
    monkeypatch.undo()
    assert "gaierror" in run_program(names, SECONDS).reason


@guarded
@pytest.mark.parametrize(
    "change",
    [
        "open({there!r}, 'w')",
        "open({there!r}, 'a').write('more')",
        "os.truncate({there!r}, 0)",
        "os.remove({there!r})",
        "os.rename({there!r}, {there!r} + '2')",
        "os.rename({there!r}, 'here')",
        "open({there!r} + 'new', 'w')",
        "os.mkdir({there!r} + 'new')",
        "os.symlink('x', {there!r} + 'new')",
        "subprocess.run(['sh', '-c', 'echo > ' + {there!r}], check=True)",
    ],
)
def test_nothing_outside_its_folder_is_written(tmp_path, change):
    path = tmp_path / "kept"
    path.write_text("words")
    code = f"import os, subprocess\n{change.format(there=str(path))}"
    found = run_program(code, SECONDS)
    assert not found.passed
    assert (
        "ermission denied" in found.reason
        or "cross-device" in found.reason
        or "CalledProcess" in found.reason
    )
    assert [one.name for one in tmp_path.iterdir()] == ["kept"] and path.read_text() == "words"


@guarded
def test_its_own_folder_is_written():
    code = """
import os, pathlib, tempfile
pathlib.Path("a").mkdir()
pathlib.Path("a/b").write_text("words")
os.rename("a/b", "b")
with tempfile.NamedTemporaryFile("w") as file:
    file.write("x")
open(os.devnull, "w").write("x")
assert pathlib.Path("b").read_text() == "words"
"""
    assert run_program(code, SECONDS) == (True, "")


@pytest.mark.skipif("--pid" not in isolation(), reason="the system has no namespaces of processes")
def test_what_it_started_ends_with_it():
    """Also a process with a session of its own, which would outlive its group."""
    mark = f"lmjax-outlives-{os.getpid()}"
    sleeper = ["sh", "-c", f"sleep 60; : {mark}"]
    code = f"import subprocess; subprocess.Popen({sleeper!r}, start_new_session=True)"
    assert run_program(code, SECONDS).passed
    assert "more than" in run_program(f"{code}\nwhile True: pass", 1.5).reason
    # The system ends them behind our back; it may take a moment.
    until = time.monotonic() + 10
    while (alive := running(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive and running("pytest")


def running(word):
    """Numbers of the processes with a word in their command."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in entry.read_bytes():
                found.append(entry.parent.name)
    return found
