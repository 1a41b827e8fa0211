"""Names and docstrings: one class a name, standard words, and a verb or a noun first."""

import ast
import collections
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for folder in ("lmjax", "pallas_kernels", "benchmarks", "experiments")
    for path in (ROOT / folder).rglob("*.py")
)
PACKAGES = [
    path for path in FILES if path.relative_to(ROOT).parts[0] in ("lmjax", "pallas_kernels")
]
INTERROGATIVE = re.compile(r"(what|whether|which|how|where|when|who|whose|why)\b", re.IGNORECASE)
# It had eight meanings: a position, an index, a shard, a folder, ...
VAGUE = re.compile(r"_*(place|places|placed)(_.*)?|.*_(place|places|placed)")


def documented(text: str) -> Iterator[tuple[int, str]]:
    """Line and docstring of a module and of all its classes and functions."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
            yield node.body[0].lineno, docstring


def vague_names(text: str) -> list[str]:
    """Identifiers that say nothing."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [t.string for t in tokens if t.type == tokenize.NAME and VAGUE.fullmatch(t.string)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_and_names_of_a_file(path):
    text = path.read_text("utf-8")
    begun = [(line, doc[:40]) for line, doc in documented(text) if INTERROGATIVE.match(doc)]
    assert begun == []
    assert vague_names(text) == []


def test_no_public_class_has_the_name_of_another():
    """Not of one in another module: a name says one thing in the whole house."""
    found = collections.defaultdict(set)
    for path in PACKAGES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].add(str(path.relative_to(ROOT)))
    assert {name: files for name, files in found.items() if len(files) > 1} == {}


def test_the_rules_find_what_breaks_them():
    text = (
        '"""What it is."""\n\n\ndef place(x_place):\n    """How."""\n    return x_place, replace\n'
    )
    assert [INTERROGATIVE.match(doc) is not None for _, doc in documented(text)] == [True, True]
    assert vague_names(text) == ["place", "x_place", "x_place"]
