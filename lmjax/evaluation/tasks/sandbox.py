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

    It is stopped after `seconds`, has limits of memory, of files and their size, no environment of
    ours and, where the system allows it (Linux, user namespaces), no network. That keeps accidents
    of generated code away. It is no wall against an attacker: use a virtual machine for that.
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
    code = LIMITS.format(limits=limits) + script
    command = [*without_network(), sys.executable, "-I", "-c", code]
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
def without_network() -> tuple[str, ...]:
    """A command in front of another one that takes its network away; empty where there is none."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, "--net", "--map-root-user", "--")
    tried = subprocess.run([*command, "true"], capture_output=True)
    return command if tried.returncode == 0 else ()
