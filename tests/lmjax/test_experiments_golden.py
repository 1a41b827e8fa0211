"""Every experiment's resolved settings against a text in tests/golden: what does a change move?

After an intended change: UPDATE_GOLDEN=1 python -m pytest tests/lmjax/test_experiments_golden.py
writes the texts anew, and their diff belongs in the review.
"""

import importlib
import os
from pathlib import Path

import pytest

from lmjax.config import (
    declare,
    fields,
    from_json,
    help_text,
    is_config,
    parse,
    to_json,
    to_text,
    values,
)

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
NAMES = sorted(
    path.stem
    for path in (ROOT / "experiments").glob("*.py")
    if "\nexperiment = " in path.read_text("utf-8")
)


def load(name: str):
    return importlib.import_module(f"experiments.{name}").experiment


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_as_before(name):
    text = to_text(load(name))
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text(text, "utf-8")
    assert golden.exists(), f"{golden.name} is missing; see the head of this file"
    # As lines, so that pytest shows which ones differ.
    assert text.splitlines() == golden.read_text("utf-8").splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_is_a_config_that_can_be_run_and_kept(name):
    experiment = load(name)
    assert is_config(experiment) and callable(experiment.run)
    assert from_json(to_json(experiment)) == experiment
    assert parse(experiment, to_text(experiment).splitlines()) == experiment
    assert importlib.import_module(f"experiments.{name}").__doc__


@pytest.mark.parametrize("name", NAMES)
def test_help_fits_the_screen(name):
    text = help_text(load(name), f"python -m experiments.{name}")
    assert [line for line in text.splitlines() if len(line) > 100] == []


def test_every_setting_has_its_line_of_help():
    declare.import_all()
    bare = [
        f"{cls.__module__}.{cls.__name__}.{field.name}"
        for cls in declare.registered().values()
        if isinstance(cls, type) and cls.__module__.startswith("lmjax.")
        for field in fields(cls).values()
        # A config is introduced by its class's docstring.
        if not field.doc and not any(map(is_config, values.members(field.type)))
    ]
    assert bare == []


def test_no_golden_text_without_its_experiment():
    assert {path.stem for path in GOLDEN.glob("*.txt")} <= set(NAMES)
