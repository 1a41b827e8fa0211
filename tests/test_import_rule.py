"""The order of the packages: each imports only what stands below it, and nothing upwards."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top of the house down. A line may import those after it.
ORDER = [
    "jobs",
    "annotation",
    "serving",
    "alignment",
    "compression",
    "evaluation",
    "generation",
    "interop",
    "scaling",
    "runs",
    "training",
    "objectives",
    "data",
    "models",
    "parallel",
    "launch",
    "remote",
    "files",
    "console",
    "config",
]
SEES_KERNELS = ORDER[: ORDER.index("models") + 1]
# The kernels can be lifted out and used elsewhere: jax, and what it brings or types it.
KERNELS_MAY_IMPORT = {"jax", "jaxtyping", "numpy", "pallas_kernels", *sys.stdlib_module_names}
FILES = sorted([*(ROOT / "lmjax").rglob("*.py"), *(ROOT / "pallas_kernels").rglob("*.py")])


def imported(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every import in a file, inside functions too."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            for alias in node.names:  # `from lmjax import data` names the package last
                yield node.lineno, f"{module}.{alias.name}"


def violations(path: Path, text: str) -> list[str]:
    """What a file imports against the rule, as messages with its line."""
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    found = []
    for line, name in imported(path, text):
        first, *others = name.split(".")
        if top == "pallas_kernels":
            allowed = first in KERNELS_MAY_IMPORT
        elif first in ("experiments", "tests", "benchmarks") or rest == ["__init__"]:
            allowed = first not in ("lmjax", "experiments", "tests", "benchmarks", "pallas_kernels")
        elif first == "pallas_kernels":
            allowed = rest[0] in SEES_KERNELS
        elif first == "lmjax":
            allowed = bool(others) and others[0] in ORDER[ORDER.index(rest[0]) :]
        else:
            allowed = True
        if not allowed:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    assert violations(path, path.read_text("utf-8")) == []


def test_every_package_has_its_place_in_the_order():
    inside = {path.relative_to(ROOT / "lmjax").parts[0] for path in (ROOT / "lmjax").rglob("*.py")}
    assert {name.removesuffix(".py") for name in inside} - {"__init__"} <= set(ORDER)


def module_of(path: Path) -> str:
    """The name that a file is imported by."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """The modules that a file imports of some, inside functions and for types too."""
    found = set()
    for _, name in imported(path, path.read_text("utf-8")):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", module_of(path)}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that reach each other, each in order."""
    reached = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            for name in graph[waiting.pop()] - seen:
                seen.add(name)
                waiting.append(name)
        reached[start] = seen
    found = {
        tuple(sorted(other for other in seen if name in reached[other]))
        for name, seen in reached.items()
        if name in seen
    }
    return [list(circle) for circle in sorted(found)]


def test_no_files_import_each_other_in_a_circle():
    modules = {module_of(path) for path in FILES}
    graph = {module_of(path): imports_of(path, modules) for path in FILES}
    assert circles(graph) == []


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert circles(graph) == [["b", "c"]]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("lmjax/models/llama.py", "from lmjax.training import step"),
        ("lmjax/models/llama.py", "def f():\n    import lmjax.data.loader"),
        ("lmjax/models/llama.py", "from lmjax import objectives"),
        ("lmjax/models/llama.py", "from ..training import step"),
        ("lmjax/parallel/mesh.py", "from pallas_kernels.attention import attention"),
        ("lmjax/config/declare.py", "from lmjax import parallel"),
        ("lmjax/launch/program.py", "from lmjax import jobs"),
        ("lmjax/launch/program.py", "from lmjax.parallel import Mesh"),
        ("lmjax/files.py", "from lmjax.launch import run"),
        ("lmjax/launch/program.py", "import experiments.debug"),
        ("lmjax/__init__.py", "from lmjax.config import config"),
        ("pallas_kernels/attention/chunked.py", "from lmjax.config import config"),
        ("pallas_kernels/attention/chunked.py", "import flax"),
    ],
)
def test_the_rule_finds_what_breaks_it(file, text):
    assert len(violations(ROOT / file, text)) == 1


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("lmjax/models/llama.py", "from lmjax.models import transformer\nfrom . import glm"),
        ("lmjax/objectives/causal.py", "from pallas_kernels.cross_entropy import cross_entropy"),
        ("lmjax/jobs/pretrain.py", "from lmjax.launch import run"),
        ("pallas_kernels/attention/chunked.py", "import jax.numpy\nfrom .mask import Mask"),
    ],
)
def test_the_rule_lets_pass_what_keeps_it(file, text):
    assert violations(ROOT / file, text) == []
