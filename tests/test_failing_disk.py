"""Every system call of what a run writes fails in turn: it is told, and nothing is lost by it."""

import sys

import pytest

from tests import failing_disk

KINDS = "save", "replace", "stores", "prepare"
SLOW = [pytest.param(work, marks=pytest.mark.slow) for work in KINDS]


@pytest.mark.parametrize("work", ["folder", *SLOW])
def test_every_system_call_may_fail(work):
    if sys.platform != "linux" or failing_disk.compiler() is None:
        pytest.skip("needs Linux and a C compiler (cc), to stand before the C library")
    done = failing_disk.run(work)
    assert done.returncode == 0, done.stderr
    *wrong, calls = done.stdout.splitlines()
    assert wrong == []
    assert int(calls.split()[0]) > 50
    # Whatever goes on in the background: the exception says it all.
    assert "Traceback" not in done.stderr and "never" not in done.stderr, done.stderr
