"""Nothing rests on jnp.max or jnp.min of floats: on CPUs they lose NaN in 4,096 numbers and more.

One NaN is passed over, and of nothing but NaN the maximum is -inf (jax 0.10.2 and 0.12.0, float32).
So no tolerance is checked with them, and each place that takes one has a reason to be right without
it: integers, or a NaN that comes through by another way, which `test_not_finite.py` in tests/lmjax
and in tests/pallas_kernels shows.
"""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = {"max", "min", "amax", "amin", "ptp", "nanmax", "nanmin", "fmax", "fmin"}
LAX = {"pmax", "pmin", "reduce_max", "reduce_min", "cummax", "cummin"}
NUMERIC = {"jnp", "jax", "lax"}  # what arrays of jax are made with
INTEGERS = "of integers"
BY_THE_SUM = "makes an exponential small; NaN comes through the sum of all of them"
# How often a file takes a maximum or minimum of arrays of jax, and why it may.
ALLOWED = {
    "lmjax/evaluation/likelihood_program.py": (2, f"{BY_THE_SUM}; {INTEGERS}"),
    "lmjax/generation/sampling.py": (
        3,
        f"the log-probability is NaN, and generation refuses it; {INTEGERS}",
    ),
    "lmjax/models/cache.py": (1, INTEGERS),
    "lmjax/models/label_heads.py": (2, INTEGERS),
    "lmjax/models/products.py": (1, "NaN is NaN in 8 bits too, whatever the scale"),
    "lmjax/models/rotary.py": (1, INTEGERS),
    "lmjax/models/stack.py": (1, INTEGERS),
    "lmjax/models/weight_codes.py": (1, "NaN where the sum beside it is not finite"),
    "lmjax/objectives/refilling.py": (2, INTEGERS),
    "lmjax/serving/choice.py": (1, "the log-probability is NaN, and the engine refuses it"),
    "pallas_kernels/attention/chunked.py": (1, BY_THE_SUM),
    "pallas_kernels/attention/hopper/forward.py": (1, BY_THE_SUM),
    "pallas_kernels/attention/tpu/forward_kernel.py": (1, BY_THE_SUM),
    "pallas_kernels/attention/streaming.py": (3, f"{BY_THE_SUM}; {INTEGERS}"),
    "pallas_kernels/decode_attention/cache.py": (1, "NaN where the sum beside it is not finite"),
    "pallas_kernels/decode_attention/kernel.py": (1, BY_THE_SUM),
    "pallas_kernels/decode_attention/plan.py": (1, INTEGERS),
    "pallas_kernels/decode_attention/reference.py": (1, BY_THE_SUM),
    "pallas_kernels/decode_attention/tpu.py": (1, "a NaN that it lost comes back by the sum"),
    "pallas_kernels/cross_entropy/api.py": (2, BY_THE_SUM),  # pmax
    "pallas_kernels/cross_entropy/chunked.py": (1, "log Z beside it is NaN, and so is the loss"),
    "pallas_kernels/cross_entropy/hopper.py": (1, BY_THE_SUM),
    "pallas_kernels/cross_entropy/hopper_kernels.py": (1, BY_THE_SUM),
    "pallas_kernels/cross_entropy/reference.py": (1, "log Z beside it is NaN, and so is the loss"),
    "pallas_kernels/cross_entropy/tpu_kernels.py": (4, f"{BY_THE_SUM}; {INTEGERS}"),
}
FOLDERS = ("lmjax", "pallas_kernels", "tests", "benchmarks", "experiments", "findings")
FILES = sorted(
    [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    + list((ROOT / "notebooks").glob("*.ipynb"))
)


def mentions(node: ast.AST, names: set[str]) -> bool:
    """Whether one of the names stands in an expression."""
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))


def extremes(text: str) -> Iterator[tuple[int, str]]:
    """Line and words of each maximum or minimum over an array of jax."""
    tree = ast.parse(text)
    floats = {
        id(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "float"
        and node.args
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, of = node.func.attr, node.func.value
        if name in LAX:
            found = mentions(of, NUMERIC)
        else:  # a function of jnp, or a method: of numpy's arrays nobody takes `float` of it
            numeric = mentions(of, NUMERIC) or id(node) in floats
            found = name in NAMES and numeric and not mentions(of, {"np"})
        if found:
            yield node.lineno, ast.unparse(node)


def source(path: Path) -> str:
    """The program of a file; of a notebook, that of its cells."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    lines = "\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", lines)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_maximum_of_floats_is_relied_on(path):
    count, _ = ALLOWED.get(path.relative_to(ROOT).as_posix(), (0, ""))
    found = list(extremes(source(path)))
    assert len(found) == count, (
        f"{path}: {found}; compare in numpy, use isfinite, or say in ALLOWED why NaN is not lost"
    )


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "lmjax")], ids=str)
def test_traced_arrays_have_no_methods_called_so(path):
    """`x.max()` does not say what x is: files that compute with jax.numpy write jnp.max(x)."""
    text = source(path)
    if "import jax.numpy" in text:
        methods = re.sub(r"\b(?:jnp|np|math)\.\w+\(", "", text)
        assert not re.findall(r"\w\)?\.(?:max|min)\(", methods)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("assert jnp.abs(a - b).max() < 1e-6", 1),
        ("assert jnp.max(jnp.abs(a - b)) < 1e-6", 1),
        ("error = float((a - b).max())", 1),
        ("low = jnp.nanmin(a)", 1),
        ("top = jax.lax.pmax(a, 'x')", 1),
        ("assert jnp.exp(a).min() > 0", 1),
        ("assert np.abs(np.asarray(jnp.exp(a)) - b).max() < 1e-6", 0),
        ("assert np.max(np.asarray(jax.jit(f)(a))) < 1e-6", 0),
        ("x = jnp.maximum(a, b); y = max(1, 2)", 0),
        ("float(np.asarray(a).max())", 0),
    ],
)
def test_the_rule_sees_what_it_is_for(text, count):
    assert len(list(extremes(text))) == count
