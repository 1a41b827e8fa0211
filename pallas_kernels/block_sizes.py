"""Block sizes of kernels, from the table `block_sizes.json`.

The table has for each kernel a list of rows; the first row that fits is taken:

    {"chips": ["TPU v5 lite"], "up_to": {"head_dim": 128}, "sizes": {"query": 1024}}

`chips` are device kinds, none for all of them; `up_to` are the largest numbers of a call that the
row is for, none for all of them. The last row of a kernel is for everything.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.resources
import json
from collections.abc import Iterator
from typing import Any

_replaced: contextvars.ContextVar[dict[str, dict[str, int]] | None] = contextvars.ContextVar(
    "replaced", default=None
)


def block_sizes(kernel: str, chip: str, **call: int) -> dict[str, int]:
    """The sizes of a kernel on a kind of chip for a call with these numbers.

    Raises:
        LookupError: the table has no row for it.
    """
    if kernel in (replaced := _replaced.get() or {}):
        return dict(replaced[kernel])
    for row in table().get(kernel, ()):
        if fits(row, chip, call):
            return dict(row["sizes"])
    raise LookupError(f"block_sizes.json has no row of {kernel!r} for a {chip} and {call}")


def fits(row: dict[str, Any], chip: str, call: dict[str, int]) -> bool:
    """Returns whether a row is for a kind of chip and a call with these numbers."""
    if row.get("chips") and chip not in row["chips"]:
        return False
    return all(call[name] <= most for name, most in row.get("up_to", {}).items())


@functools.cache
def table() -> dict[str, list[dict[str, Any]]]:
    """The table, read once."""
    text = importlib.resources.files("pallas_kernels").joinpath("block_sizes.json").read_text()
    return json.loads(text)


@contextlib.contextmanager
def using(kernel: str, **sizes: int) -> Iterator[None]:
    """Calls of a kernel that are traced inside have these sizes, whatever the table says."""
    token = _replaced.set({**(_replaced.get() or {}), kernel: sizes})
    try:
        yield
    finally:
        _replaced.reset(token)
