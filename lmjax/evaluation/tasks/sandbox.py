"""Runs code that a model wrote in a process of its own, with limits and without a network."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import IO, NamedTuple

from lmjax.config import UserError

SECONDS = 3.0  # of a program, unless it is said
CELL_SECONDS = 10.0  # of a cell and those before
MEMORY = 1 << 30  # bytes of address space
FILE_SIZE = 1 << 20  # bytes of the largest file that it writes
FILES = 32  # files that are open at once
OUTPUT = 4000  # characters of what a cell prints that are kept
KEPT = 1 << 16  # bytes of an output's beginning, and of its end, that are read into memory
LIMITS = """\
import os, resource, sys
for name, most in {limits!r}:
    resource.setrlimit(getattr(resource, name), (most, most))
"""
# Landlock (Linux 5.13 and later): nothing outside the folder is written, removed or made. Rights by
# the version of the kernel's interface: 2 links and renames between folders, 3 truncation, 4 ports
# of TCP, 6 sockets without a file and signals to others. The numbers are those of linux/landlock.h.
FOLDER_ONLY = """\
import ctypes, struct
def keep_to(folder):
    library = ctypes.CDLL(None, use_errno=True)
    call = lambda number, *given: library.syscall(ctypes.c_long(number), *given)
    version = call(444, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        return
    change = 1 << 1 | (1 << 14 if version >= 3 else 0)
    write = change | 0b1_1111_1111_0000 | (1 << 13 if version >= 2 else 0)
    rules = struct.pack("QQQ", write, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    rules = rules[: 24 if version >= 6 else 16 if version >= 4 else 8]
    wall = call(444, rules, ctypes.c_size_t(len(rules)), ctypes.c_uint(0))
    for path, rights in ((folder, write), (os.devnull, change)):
        place = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", rights, place)
        failed = call(445, ctypes.c_int(wall), ctypes.c_int(1), rule, ctypes.c_uint(0))
        os.close(place)
        if failed:
            sys.exit("the limits of files cannot be set")
    library.prctl(38, *map(ctypes.c_ulong, (1, 0, 0, 0)))  # no new privileges
    if call(446, ctypes.c_int(wall), ctypes.c_uint(0)):
        sys.exit("the limits of files cannot be set")
    os.close(wall)
keep_to(".")
"""
PREPARE = """\
said = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
program = sys.stdin.read()
exec(compile(program, "program", "exec"), {{"__name__": "__main__"}})
os.write(said, {token!r})
"""


# Cells before are run again without a word; an expression at the end of the last one is shown.
CELLS = """\
import ast, contextlib, io, json, traceback
*before, cell = json.load(sys.stdin)
names = {"__name__": "__main__"}
with contextlib.redirect_stdout(io.StringIO()):
    for one in before:
        exec(compile(one, "cell", "exec"), names)
try:
    tree = ast.parse(cell, "cell")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        print(repr(value) if value is not None else "", end="")
except BaseException as error:
    print("".join(traceback.format_exception_only(error)).strip())
    sys.exit(1)
"""


class Outcome(NamedTuple):
    """End of a program.

    Attributes:
      passed: it came to its end without an error.
      reason: the last line of its errors, or the limit that it broke; empty where it passed.
    """

    passed: bool
    reason: str


def run_program(program: str, seconds: float = SECONDS, allow_network: bool = False) -> Outcome:
    """Runs a Python program in an empty folder that is removed afterwards.

    It is stopped after `seconds`, has limits of memory, of files and their size, and no environment
    of ours. It has no network. Where the system allows it, it ends with all that it started (Linux,
    user namespaces), and writes no file outside its folder (Linux 5.13, Landlock). It can read what
    we can. That keeps accidents of generated code away. It is no wall against an attacker: use a
    virtual machine for that.

    Args:
      program: Python.
      seconds: that it may take.
      allow_network: run it also where its network cannot be taken away.

    Raises:
      UserError: its network cannot be taken away.
    """
    token = secrets.token_hex(8).encode()  # which a program that leaves early does not say
    ended = _run(PREPARE.format(token=token), program, seconds, allow_network)
    if isinstance(ended, str):
        return Outcome(False, ended)
    code, said, errors = ended
    if code == 0 and bytes(said).endswith(token):
        return Outcome(True, "")
    lines = bytes(errors).decode("utf-8", "replace").strip().splitlines()
    return Outcome(False, (lines[-1] if lines else f"exit code {code}")[:200])


def run_cell(
    cell: str,
    before: Sequence[str] = (),
    seconds: float = CELL_SECONDS,
    allow_network: bool = False,
) -> tuple[bool, str]:
    """Runs a cell of a notebook as `run_program` does, and returns whether it ended, and its words.

    Args:
      cell: Python; an expression at its end is shown.
      before: cells that came to their end, which are run again for what they define.
      seconds: for all of them.
      allow_network: see `run_program`.
    """
    ended = _run(CELLS, json.dumps([*before, cell]), seconds, allow_network)
    if isinstance(ended, str):
        return False, ended
    code, said, errors = ended
    shown = said if said.count else errors
    text = bytes(shown).decode("utf-8", "replace").strip()
    if len(text) > OUTPUT:
        size = f"{shown.count:,} bytes" if shown.count > 2 * KEPT else f"{len(text):,} characters"
        text = f"{text[:OUTPUT]} ... ({size})"
    return code == 0, text or ("" if code == 0 else f"exit code {code}")


def check_isolation(allow_network: bool) -> None:
    """Raises UserError where the network of code cannot be taken away, and must be."""
    if not (allow_network or isolation()):
        raise UserError(
            "code would be run with our network: this system takes it away from no program (that "
            "needs Linux with user namespaces, and unshare of util-linux). Run it in a container "
            "without a network; allow_network=true then runs it"
        )


def _run(
    script: str, given: str, seconds: float, allow_network: bool
) -> tuple[int, ProgramOutput, ProgramOutput] | str:
    """Exit code, output and errors of a script under limits, or the limit of time that it broke."""
    check_isolation(allow_network)
    limits = (
        ("RLIMIT_CPU", max(1, round(seconds) + 1)),
        ("RLIMIT_AS", MEMORY),
        ("RLIMIT_FSIZE", FILE_SIZE),
        ("RLIMIT_NOFILE", FILES),
        ("RLIMIT_CORE", 0),
    )
    code = LIMITS.format(limits=limits) + FOLDER_ONLY + script
    command = [*isolation(), sys.executable, "-I", "-c", code]
    with tempfile.TemporaryDirectory(prefix="lmjax-code-") as folder:
        environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            said, errors = _communicate(process, given.encode("utf-8", "replace"), seconds)
        except subprocess.TimeoutExpired:
            return f"more than {seconds:g} seconds"
        finally:
            _kill_group(process)
    return process.returncode, said, errors


class ProgramOutput:
    """Beginning and end of what a program writes, however long it is.

    Attributes:
      count: bytes of all.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        """Reads in a thread of its own until the stream ends."""
        self.count, self._head, self._tail, self._stream = 0, b"", b"", stream
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Waits for the end: a process that the program has left behind may hold the stream."""
        self._thread.join(max(0.0, seconds))

    def __bytes__(self) -> bytes:
        return self._head + self._tail

    def _read(self) -> None:
        with self._stream:
            while data := self._stream.read1(KEPT):
                self.count += len(data)
                room = KEPT - len(self._head)
                self._head += data[:room]
                self._tail = (self._tail + data[room:])[-KEPT:]


def _communicate(
    process: subprocess.Popen, given: bytes, seconds: float
) -> tuple[ProgramOutput, ProgramOutput]:
    """Output and errors of a process. subprocess.TimeoutExpired: it has not ended in time."""
    until = time.monotonic() + seconds
    found = ProgramOutput(process.stdout), ProgramOutput(process.stderr)

    def give() -> None:
        with contextlib.suppress(OSError), process.stdin:  # it may end before it has read all
            process.stdin.write(given)

    threading.Thread(target=give, daemon=True).start()
    process.wait(seconds)
    for one in found:
        one.wait(until - time.monotonic())
    return found


def _kill_group(process: subprocess.Popen) -> None:
    """Ends the process and all that it started; it is the leader of a group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@functools.cache
def isolation() -> tuple[str, ...]:
    """A command in front of another one that takes its network away; empty where there is none.

    If possible it has processes of its own too, which end with the first of them.
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    for processes in (("--pid", "--fork", "--kill-child"), ()):
        command = (unshare, "--net", *processes, "--map-root-user", "--")
        if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return ()
