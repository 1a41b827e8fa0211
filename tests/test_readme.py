"""What the README and the guides show of Python runs as it stands there."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lmjax import data
from lmjax.runs.metrics import read_metrics

ROOT = Path(__file__).parents[1]
PATTERNS = ("README.md", "*/README.md", "lmjax/*/README.md")
GUIDES = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
README = "\n".join(path.read_text("utf-8") for path in GUIDES)
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
# Rows of the table of parts: what, its base class, what to define.
PARTS = [
    line.strip("| ").split(" | ")
    for line in README.partition("| what | base class |")[2].partition("\n\n")[0].splitlines()[2:]
]
SMALL = (
    *("steps=2", "schedule.warmup=1", "model.num_layers=1", "data.length=16"),
    *("data.batch_size=2", "evaluation.tokens=100", "evaluation.sample_length=2"),
)


def block(words: str) -> str:
    """The one snippet with these words."""
    (found,) = [text for text in BLOCKS if words in text]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that has `squared.py`, and `mine.py` with the steps to an assistant."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "squared.py").write_text(block("class SquaredReLU"), "utf-8")
    (folder / "mine.py").write_text(block("PolicyOptimization("), "utf-8")
    return folder


@pytest.fixture(scope="module")
def python(folder):
    """Runs Python in that folder, and fails unless it does well."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return python


@pytest.fixture(scope="module")
def told(python):
    """What `squared.py` says when it is run, with small numbers."""
    return python("-m", "squared", *SMALL)


def test_an_own_part_is_trained_and_gives_text_as_the_run_says(python, told):
    (command,) = re.findall(r"^ *python (-m lmjax\.generation .*?)  ", told, re.M)
    assert "imports=squared" in command and command.endswith('prompt="..."')
    written = python(*shlex.split(command.replace("...", "The list")), "max_tokens=2")
    assert written.startswith("The list")


@pytest.mark.usefixtures("told")
def test_a_trained_model_is_an_object(python):
    snippet = block("model.search").replace("runs/quickstart", "runs/squared")
    checks = """
assert len(texts) == 6 and not any("\\n" in text for text in texts)
assert len(scored) == 4 and [score for _, score in scored] == sorted(
    (score for _, score in scored), reverse=True
)
assert len(rows[0].tokens) == len(rows[0].log_probabilities) > 0
"""
    python("-c", f"import squared\n{snippet}{checks}")


def test_snippets_run_as_they_are(python):
    """In one process, each with names of its own; configs are built and validated.

    An own family is known by its model_type and by its chat format. An own kernel of attention is
    equal to the reference to 1e-5, summed in another order, and refuses grouped heads.
    """
    cleaning = "from lmjax.data import *\nfrom lmjax.data.cleaning import *\n"
    cleaning += "from lmjax.jobs.cleaning import Cleaning\n"
    snippets = [
        block("heads = ("),
        cleaning + block("cleaning = Cleaning("),
        block("Classify("),
        "from mine import *\n" + block("class Brief"),  # no file is read before they run
        block("ChatStyle") + FAMILY_CHECKS,
        block("register(Implementation") + KERNEL_CHECKS,
    ]
    python("-c", AS_MODULES + "".join(f"run({text!r})\n" for text in snippets))


AS_MODULES = """
import sys, types
def run(text):
    module = types.ModuleType(f"shown_{len(sys.modules)}")
    sys.modules[module.__name__] = module
    exec(text, module.__dict__)
"""


FAMILY_CHECKS = """
from lmjax.data.chat.catalogue import chat_template
from lmjax.interop.families import family_for
from lmjax.models import llama
settings = LLAMA_FAMILY.write(llama()) | {"model_type": "tiny_llama"}
family = family_for(settings)
assert family.architecture == "TinyLlamaForCausalLM"
assert family.read(family.settings(settings)) == llama()
assert chat_template("turns").stop == ("<|turn|>",)
"""
KERNEL_CHECKS = """
import numpy as np
from pallas_kernels.attention import CannotServe, Mask, attention, implementations
q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 8))
mask = Mask(causal=True)
given, reference = (
    attention(q, k, v, mask, implementation=name) for name in ("plain", "reference")
)
assert np.abs(np.asarray(given - reference)).max() < 1e-5 and implementations()[-1] == "plain"
grouped = q, k[:, :, :2], v[:, :, :2], mask
attention(*grouped)
try:
    attention(*grouped, implementation="plain")
except CannotServe as error:
    assert "grouped" in str(error)
else:
    raise AssertionError
"""


def test_the_data_settings_are_allowed():
    names: dict[str, object] = {}
    exec("from lmjax.data import *\n" + block("Stage("), names)
    assert isinstance(names["data"], data.Data)


@pytest.mark.slow  # three trainings compile
@pytest.mark.usefixtures("told")
def test_the_steps_to_an_assistant_run(python, folder):
    """On lines as the README shows them, many times, and a small model."""
    names = ("talks", "pairs", "asks")
    shown = re.search(r"^```\n(\{.*?)^```", README, re.M | re.S)[1].splitlines()
    for name, line in zip(names, shown, strict=True):
        old = "Hello" if name == "talks" else "Name a"
        lines = [line.replace(old, f"{old} {n}") for n in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
    small = [
        *("jobs.0.begin_with=runs/squared", "jobs.0.epochs=none", "jobs.0.steps=2"),
        *("jobs.1.epochs=none", "jobs.1.steps=2", "jobs.2.steps=2", "jobs.2.reply_length=4"),
        *("jobs.2.samples=2", "jobs.2.allow_cut_off=true", "jobs.2.evaluate_requests=2"),
        *(
            f"jobs.{n}.data.{setting}"
            for n in range(3)
            for setting in ("length=120", "batch_size=2")
        ),
    ]
    command = "import runpy, squared; runpy.run_module('mine', run_name='__main__', alter_sys=True)"
    python("-c", command, *small)
    records = read_metrics(folder / "runs" / "mine" / "policy")
    assert {"reward", "reply_kl"} <= records[-1].keys() | records[0].keys()


@pytest.mark.parametrize("row", PARTS, ids=lambda row: row[0])
def test_the_base_class_of_every_part_has_what_is_to_be_defined(row):
    """The classes of the table's second column, and the methods and fields of its third."""
    _, bases, methods = row
    modules = re.findall(r"`((?:lmjax|pallas_kernels)[\w.]*)\.(\w+)`", bases)
    classes = [getattr(importlib.import_module(module), name) for module, name in modules]
    others = re.findall(r"`([A-Z]\w+)`", bases)
    home = modules[0][0] if modules else "lmjax.models.family"
    classes += [getattr(importlib.import_module(home), name) for name in others]
    assert classes
    for name in re.findall(r"`([a-z_]+)`", methods.partition("Used")[0]):
        assert any(hasattr(one, name) or name in one.__annotations__ for one in classes), name


def test_the_table_of_parts_is_found():
    assert len(PARTS) > 15


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(guide):
    """Of this repository: what is on the web is not asked."""
    for target in re.findall(r"\]\(([^)]+)\)", guide.read_text("utf-8")):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        path = (guide.parent / name).resolve() if name else guide
        assert path.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
            assert heading in [one.lower().replace(" ", "-") for one in headings], target
