"""Configs written out and read again: as JSON, and as overrides. Any values, by hypothesis."""

import re
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, config, fingerprint, from_json, parse, to_json, to_text


@config
class PaperRule: ...


@config
class PaperAdam(PaperRule):
    decay: float = 0.1


@config
class PaperFactored(PaperRule):
    decay: float = 0.0
    rate: float = 0.8


@config
class PaperFiles:
    weight: float = 1.0
    path: str


@config
class PaperNormConfig:
    epsilon: float = 1e-5


@config
class PaperNet:
    layers: int = 2
    dtype: Literal["float32", "bfloat16"] = "float32"
    windows: tuple[int | None, ...] = (None,)
    shapes: tuple[tuple[int, ...], ...] = ()
    norm: PaperNormConfig = PaperNormConfig()


@config
class PaperJob:
    steps: int = 10
    note: str | None = None
    words: tuple[str | None, ...] = ()
    fast: bool = False
    model: PaperNet = PaperNet()
    rule: PaperRule = PaperAdam()
    average: PaperRule | None = None
    train: tuple[PaperFiles, ...] = (PaperFiles(path="a"),)


@pytest.fixture(autouse=True)
def only_toys(monkeypatch):
    """A name that is not found is looked for in the whole package, which is not needed here."""
    monkeypatch.setattr("lmjax.config.declare.import_all", lambda: None)


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["none", "None", "'none'", '"a"', r'"\n"', "a,b", "(", "1", "true", " x ", "it's", "\\"]
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
RULES = st.builds(PaperAdam, decay=FLOATS) | st.builds(
    PaperFactored, decay=FLOATS, rate=FLOATS.map(abs)
)
NETS = st.builds(
    PaperNet,
    layers=st.integers(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    windows=st.lists(st.none() | st.integers(), max_size=3).map(tuple),
    shapes=st.lists(st.lists(st.integers(), max_size=2).map(tuple), max_size=2).map(tuple),
    norm=st.builds(PaperNormConfig, epsilon=FLOATS),
)
JOBS = st.builds(
    PaperJob,
    steps=st.integers(),
    note=st.none() | WORDS,
    words=st.lists(st.none() | WORDS, max_size=3).map(tuple),
    fast=st.booleans(),
    model=NETS,
    rule=RULES,
    average=st.none() | RULES,
    train=st.lists(st.builds(PaperFiles, path=WORDS, weight=FLOATS), max_size=2).map(tuple),
)


@given(JOBS)
@settings(max_examples=40)
def test_json_round_trip_is_exact(job):
    again = from_json(to_json(job))
    assert again == job and repr(again) == repr(job)  # repr also tells 1 from 1.0 and 0.0 from -0.0
    assert fingerprint(again) == fingerprint(job) and len(fingerprint(job)) == 12


@given(JOBS)
@settings(max_examples=40)
def test_written_as_overrides_it_comes_back(job):
    lines = to_text(job).split("\n")[:-1]
    assert repr(parse(PaperJob(train=()), lines)) == repr(job)
    assert repr(parse(job, lines[::-1])) == repr(job)


@given(JOBS, JOBS)
@settings(max_examples=8)
def test_overriding_leaves_the_rest_alone(job, other):
    for line in to_text(other).split("\n")[:-1]:
        if re.match(r"(steps|note|words|fast|model[.]\w+)=", line) and "norm" not in line:
            path = line.partition("=")[0]
            lines = dict(text.split("=", 1) for text in to_text(job).split("\n")[:-1])
            lines[path] = line.partition("=")[2]
            expected = "".join(f"{key}={value}\n" for key, value in lines.items())
            assert to_text(parse(job, [line])) == expected


# JSON


def test_json_is_readable():
    text = to_json(PaperJob(note="日本", rule=PaperAdam(decay=1)))
    assert '"class": "PaperAdam",\n    "decay": 1.0' in text and '"日本"' in text
    assert '"norm": {\n      "class": "PaperNorm"' in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "{", "not valid JSON: line 1"),
        (
            '"PaperNorm"',
            '"PaperNorn"',
            "at model.norm: no config class is called 'PaperNorn'; near: Pape",
        ),
        (
            '"PaperNorm"',
            '"preset_7"',
            "at model.norm: no config class is called 'preset_7'; one of your own is known once",
        ),
        ('"PaperNorm"', '"os:system"', "no config class is called 'os:system'"),
        ('"PaperNorm"', "3", 'at model.norm: expected an object with "class"'),
        (
            '"PaperNorm"',
            '"PaperAdam"',
            "at model.norm: PaperAdam has no field 'epsilon'; it has: decay",
        ),
        (
            '"steps": 10',
            '"step": 10',
            "at the top level: PaperJob has no field 'step'; did you mean",
        ),
        ('"steps": 10', '"steps": "10"', "at steps: expected int, got '10' (str)"),
        ('"steps": 10', '"steps": NaN', "at steps: expected int, got nan"),
        ('"layers": 2', '"layers": 2.5', "at model.layers: expected int, got 2.5 (float)"),
        ('"path": "a"', '"path": 1', "at train.0.path: expected str, got 1"),
        (',\n      "path": "a"', "", "at train.0: PaperFiles needs path"),
    ],
)
def test_json_that_does_not_fit_is_told_where(old, new, message):
    text = to_json(PaperJob(train=(PaperFiles(path="a", weight=2),)))
    with pytest.raises(UserError) as caught:
        from_json(text.replace(old, new) if old else new)
    assert message in str(caught.value)


def test_a_field_added_since_gets_its_default():
    assert from_json('{"class": "PaperAdam"}') == PaperAdam()
    for text in ("[]", "3", '"x"'):
        with pytest.raises(UserError, match="expected a JSON object"):
            from_json(text)
