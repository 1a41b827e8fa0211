"""Names that are used exist; the names of dimensions in jaxtyping's strings need not."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def undefined(folder):
    """(file, line, column) of each name that ruff does not know, but for those inside strings."""
    command = "-m", "ruff", "check", "--no-cache", "--select", "F821", "--output-format", "json"
    run = subprocess.run(
        [sys.executable, *command, "--isolated", str(folder)], capture_output=True, text=True
    )
    assert run.returncode in (0, 1), run.stderr
    found = {}
    for hit in json.loads(run.stdout):
        at = hit["location"]["row"], hit["location"]["column"] - 1
        found.setdefault(hit["filename"], []).append(at)
    return [(file, *at) for file, places in found.items() for at in outside_strings(file, places)]


def outside_strings(file, places):
    """Places in a file, as (line, byte), that no string constant covers."""
    strings = [
        ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        for node in ast.walk(ast.parse(Path(file).read_bytes()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return [at for at in places if not any(first <= at < last for first, last in strings)]


@pytest.mark.parametrize(
    "folder", ["lmjax", "pallas_kernels", "experiments", "benchmarks", "tests"]
)
def test_every_name_is_defined(folder):
    assert undefined(ROOT / folder) == []


def test_an_undefined_name_is_found(tmp_path):
    (tmp_path / "a.py").write_text(
        "from jaxtyping import Array, Float\n\n\n"
        'def f(x: Float[Array, "rows"]):\n    return gone(x)\n'
    )
    assert undefined(tmp_path) == [(str(tmp_path / "a.py"), 5, 11)]
