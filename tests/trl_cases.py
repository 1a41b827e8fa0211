"""Marks of the tests that compare with TRL, in whose release they are known to hold."""

import importlib.metadata

import pytest

VERSION = "1.16.0"


def _installed() -> str | None:
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return None


NEEDS_TRL = [
    pytest.mark.slow,
    pytest.mark.skipif(
        _installed() != VERSION,
        reason=f"compares with trl {VERSION}, and has {_installed()}: pip install trl=={VERSION}",
    ),
]
