"""Runs code that a model wrote in a process of its own, with limits and without a network."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import NamedTuple

SECONDS = 3.0  # of a program, unless it is said
MEMORY = 1 << 30  # bytes of address space
FILE_SIZE = 1 << 20  # bytes of the largest file that it writes
FILES = 32  # files that are open at once
PREPARE = """\
import os, resource, sys
for name, most in {limits!r}:
    resource.setrlimit(getattr(resource, name), (most, most))
said = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
program = sys.stdin.read()
exec(compile(program, "program", "exec"), {{"__name__": "__main__"}})
os.write(said, {token!r})
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
    limits = (
        ("RLIMIT_CPU", max(1, round(seconds) + 1)),
        ("RLIMIT_AS", MEMORY),
        ("RLIMIT_FSIZE", FILE_SIZE),
        ("RLIMIT_NOFILE", FILES),
        ("RLIMIT_CORE", 0),
    )
    token = secrets.token_hex(8).encode()  # which a program that leaves early does not say
    code = PREPARE.format(limits=limits, token=token)
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
            said, errors = process.communicate(program.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"more than {seconds:g} seconds")
        finally:
            _kill_group(process)
    if process.returncode == 0 and said.endswith(token):
        return Outcome(True, "")
    lines = errors.decode("utf-8", "replace").strip().splitlines()
    return Outcome(False, (lines[-1] if lines else f"exit code {process.returncode}")[:200])


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
