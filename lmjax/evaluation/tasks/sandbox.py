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
from collections.abc import Sequence
from typing import NamedTuple

SECONDS = 3.0  # of a program, unless it is said
CELL_SECONDS = 10.0  # of a cell and those before
MEMORY = 1 << 30  # bytes of address space
FILE_SIZE = 1 << 20  # bytes of the largest file that it writes
FILES = 32  # files that are open at once
OUTPUT = 4000  # characters of what a cell prints that are kept
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


def run_program(program: str, seconds: float = SECONDS) -> Outcome:
    """Runs a Python program in an empty folder that is removed afterwards.

    It is stopped after `seconds`, has limits of memory, of files and their size, and no environment
    of ours. Where the system allows it, it has no network and ends with all that it started (Linux,
    user namespaces), and writes no file outside its folder (Linux 5.13, Landlock). It can read what
    we can. That keeps accidents of generated code away. It is no wall against an attacker: use a
    virtual machine for that.
    """
    token = secrets.token_hex(8).encode()  # which a program that leaves early does not say
    ended = _run(PREPARE.format(token=token), program, seconds)
    if isinstance(ended, str):
        return Outcome(False, ended)
    code, said, errors = ended
    if code == 0 and said.endswith(token):
        return Outcome(True, "")
    lines = errors.decode("utf-8", "replace").strip().splitlines()
    return Outcome(False, (lines[-1] if lines else f"exit code {code}")[:200])


def run_cell(
    cell: str, before: Sequence[str] = (), seconds: float = CELL_SECONDS
) -> tuple[bool, str]:
    """Runs a cell of a notebook as `run_program` does, and returns whether it ended, and its words.

    Args:
      cell: Python; an expression at its end is shown.
      before: cells that came to their end, which are run again for what they define.
      seconds: for all of them.
    """
    ended = _run(CELLS, json.dumps([*before, cell]), seconds)
    if isinstance(ended, str):
        return False, ended
    code, said, errors = ended
    text = (said or errors).decode("utf-8", "replace").strip()
    if len(text) > OUTPUT:
        text = f"{text[:OUTPUT]} ... ({len(text):,} characters)"
    return code == 0, text or ("" if code == 0 else f"exit code {code}")


def _run(script: str, given: str, seconds: float) -> tuple[int, bytes, bytes] | str:
    """Exit code, output and errors of a script under limits, or the limit of time that it broke."""
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
            said, errors = process.communicate(given.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"more than {seconds:g} seconds"
        finally:
            _kill_group(process)
    return process.returncode, said, errors


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
