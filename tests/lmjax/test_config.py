"""Configs: what a class may hold, overrides, help. All with toy classes declared here."""

import functools
import re
from typing import Literal

import pytest

from lmjax.config import (
    UserError,
    choices,
    config,
    fields,
    fingerprint,
    help_text,
    parse,
    preset,
    registered,
    replace,
)


@config
class ToyOptimizer:
    """How the toy learns."""


@config
class ToyAdam(ToyOptimizer):
    """Two moments."""

    decay: float = 0.1  # weight decay
    betas: tuple[float, float] = (0.9, 0.99)


@config
class ToyFactored(ToyOptimizer):
    """Rows and columns."""

    decay: float = 0.0
    rate: float = 0.8

    def validate(self) -> None:
        if self.rate < 0:
            raise UserError(f"rate is {self.rate}; it cannot be negative")


@config
class ToySource:
    """Where text comes from."""

    weight: float = 1.0


@config
class ToyFiles(ToySource):
    path: str


@config
class ToyNormConfig:
    epsilon: float = 1e-5
    dtype: Literal["float32", "bfloat16"] = "float32"


@config
class ToyNet:
    """A small net."""

    layers: int = 2  # blocks
    dtype: Literal["float32", "bfloat16"] = "float32"
    # for each layer in turn,
    # none = all of the past
    windows: tuple[int | None, ...] = (None,)
    shapes: tuple[tuple[int, ...], ...] = ()
    norm: ToyNormConfig = ToyNormConfig()


@config
class ToyJob:
    """Everything."""

    steps: int = 10  # optimizer steps
    note: str | None = None
    words: tuple[str | None, ...] = ()
    fast: bool = False
    model: ToyNet = ToyNet()
    optimizer: ToyOptimizer = ToyAdam()
    average: ToyOptimizer | None = None
    train: tuple[ToySource, ...] = (ToyFiles(path="a"),)


@preset
def toy_net(size: Literal["1B", "7B"], dtype: str = "float32") -> ToyNet:
    """The sizes of the paper."""
    return ToyNet(layers=int(size[0]) * 10, dtype=dtype)


JOB = ToyJob(optimizer=ToyAdam(decay=0.3))


def changed(*argv: str) -> ToyJob:
    return parse(JOB, argv)


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(JOB, argv)
    return str(caught.value)


@pytest.fixture(autouse=True)
def only_toys(monkeypatch):
    """A name that is not found is looked for in the whole package, which is not needed here."""
    monkeypatch.setattr("lmjax.config.declare.import_all", lambda: None)


# Classes


def test_a_config_is_immutable_hashable_and_given_by_keyword():
    net = ToyNet(layers=3)
    assert net == ToyNet(layers=3) and hash(net) == hash(ToyNet(layers=3)) and net != ToyNet()
    with pytest.raises(AttributeError):
        net.layers = 4
    with pytest.raises(TypeError):
        ToyNet(3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'layer'"):
        ToyNet(layer=3)


def test_types_are_checked_when_built_and_when_replaced():
    with pytest.raises(TypeError, match=r"ToyNet.layers: expected int, got '3' \(str\)"):
        ToyNet(layers="3")
    with pytest.raises(TypeError, match=r"layers: expected int, got True \(bool\)"):
        replace(ToyNet(), layers=True)
    with pytest.raises(TypeError, match=r"expected tuple of int or None, got \[1\] \(list\)"):
        ToyNet(windows=[1])
    with pytest.raises(TypeError, match="'float32' or 'bfloat16', got 'float16'"):
        ToyNet(dtype="float16")
    with pytest.raises(TypeError, match="expected ToyOptimizer, got ToyNet"):
        ToyJob(optimizer=ToyNet())
    with pytest.raises(TypeError, match="finite"):
        ToyAdam(decay=float("nan"))


def test_an_int_in_a_float_field_is_a_float():
    assert type(ToyAdam(decay=1).decay) is float
    assert fingerprint(ToyAdam(decay=1)) == fingerprint(ToyAdam(decay=1.0))


def test_validate_runs_when_built_and_when_replaced():
    with pytest.raises(UserError, match=r"rate is -1\.0"):
        ToyFactored(rate=-1)
    with pytest.raises(UserError, match=r"rate is -1\.0"):
        replace(ToyFactored(), rate=-1.0)


def test_methods_properties_and_inheritance():
    @config
    class ToyBase:
        width: int = 4

        @classmethod
        def wide(cls):
            return cls(width=100)

        @property
        def double(self) -> int:
            return 2 * self.width

        @functools.cached_property
        def table(self) -> tuple[int, ...]:
            return tuple(range(self.width))

    @config
    class ToyDerived(ToyBase):
        depth: int = 1

    thing = ToyDerived.wide()
    assert isinstance(thing, ToyDerived) and (thing.width, thing.depth) == (100, 1)
    assert thing.double == 200 and thing.table is thing.table
    assert hash(thing) == hash(ToyDerived(width=100))  # what is cached is no part of the value


@pytest.mark.parametrize("kind", [list[int], dict, set[str] | None, tuple[list[int], ...], object])
def test_types_that_are_not_hashable_values_are_refused(kind):
    with pytest.raises(TypeError, match=r"ToyWrong\.field: a config field cannot be"):

        @config
        class ToyWrong:
            field: kind


def test_names_are_registered_once():
    assert registered()["ToyNorm"] is ToyNormConfig and registered()["toy_net"] is toy_net
    with pytest.raises(ValueError, match=r"'ToyNet' is taken by .*ToyNet; .*ToyNetConfig needs"):

        @config
        class ToyNetConfig:
            layers: int = 1

    with pytest.raises(TypeError, match="must say which config it returns"):

        @preset
        def nameless():
            return ToyNet()


def test_choices_leave_out_bases_and_include_presets():
    assert list(choices(ToyOptimizer | None)) == ["ToyAdam", "ToyFactored"]
    assert list(choices(ToyNet)) == ["ToyNet", "toy_net"]

    @config
    class ToyBare:
        pass

    @config
    class ToyPlain(ToyBare):
        pass

    @config
    class ToyPlainer(ToyPlain):  # which does not take away what it inherits from
        pass

    assert list(choices(ToyBare)) == ["ToyPlain", "ToyPlainer"]


def test_the_comment_of_a_field_is_its_doc():
    docs = {name: field.doc for name, field in fields(ToyNet).items()}
    assert docs["layers"] == "blocks" and docs["dtype"] == ""
    assert docs["windows"] == "for each layer in turn, none = all of the past"


# Overrides


def test_plain_values():
    job = changed("steps=1e3", "fast=True", "note=hello, you", "optimizer.decay=1")
    assert (job.steps, job.fast, job.note, job.optimizer.decay) == (1000, True, "hello, you", 1.0)
    assert changed("note=none").note is None and changed("note='none'").note == "none"
    assert changed('note="a"').note == '"a"' and changed(r'note="\n"').note == "\n"
    assert changed("note=").note == "" and changed("note=a=b").note == "a=b"


def test_tuples():
    assert changed("model.windows=1,none").model.windows == (1, None)
    assert changed("model.windows=4").model.windows == changed("model.windows=(4,)").model.windows
    assert changed("model.shapes=(1,2),(3,)").model.shapes == ((1, 2), (3,))
    assert changed("words=a b,'c,d',none,'none'").words == ("a b", "c,d", None, "none")
    assert changed("train=()").train == ()


def test_elements_of_tuples():
    assert changed("train.0.weight=2").train == (ToyFiles(path="a", weight=2),)
    more = changed("train.1.path=b", "train.1=ToyFiles", "train.2=ToyFiles(path=c)")
    assert [source.path for source in more.train] == ["a", "b", "c"]
    new = changed("train=ToyFiles(path='x, y'),ToyFiles(path=z, weight=3)", "train.0.weight=2")
    assert new.train == (ToyFiles(path="x, y", weight=2), ToyFiles(path="z", weight=3))


def test_a_class_swap_keeps_what_both_have_in_any_order():
    assert changed("optimizer=ToyFactored").optimizer == ToyFactored(decay=0.3)
    assert changed("optimizer.rate=0.5", "optimizer=ToyFactored").optimizer.rate == 0.5
    assert changed("optimizer=ToyAdam") == JOB
    assert changed("average=ToyAdam", "average.decay=3").average == ToyAdam(decay=3)
    assert parse(changed("average=ToyAdam"), ["average=none"]) == JOB
    assert changed("optimizer=ToyFactored(rate=2)").optimizer == ToyFactored(decay=0.3, rate=2)


@pytest.mark.parametrize("text", ["toy_net:7B", 'toy_net("7B")', "toy_net(7B)", "toy_net(size=7B)"])
def test_presets_compose_with_fields_in_any_order(text):
    assert changed(f"model={text}").model == ToyNet(layers=70)
    assert changed("model.layers=4", f"model={text}").model == ToyNet(layers=4)
    both = changed("model=toy_net('7B', dtype=bfloat16)", "model.windows=1").model
    assert both == ToyNet(layers=70, dtype="bfloat16", windows=(1,))


def test_wildcards():
    job = changed("...dtype=bfloat16")
    assert (job.model.dtype, job.model.norm.dtype) == ("bfloat16", "bfloat16")
    job = changed("...dtype=bfloat16", "model.norm.dtype=float32")
    assert (job.model.dtype, job.model.norm.dtype) == ("bfloat16", "float32")
    assert changed("model.norm.dtype=float32", "...dtype=bfloat16") == job
    assert changed("model...epsilon=1", "...norm.dtype=bfloat16").model.norm == ToyNormConfig(
        epsilon=1, dtype="bfloat16"
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("step=3", "there is no setting step; did you mean steps?"),
        ("model.layer=3", "there is no setting model.layer; did you mean model.layers?"),
        ("layers=3", "did you mean model.layers?"),
        ("modle.layers=3", "did you mean model.layers?"),
        ("model.zzz=3", "model (ToyNet) has: layers, dtype, windows, shapes, norm"),
        ("...layer=3", "...layer matches no setting; did you mean ...layers?"),
        ("optimizer.rate=1", "rate belongs to ToyFactored; add optimizer=ToyFactored"),
        ("average.decay=1", "average is none; add average=ToyAdam or average=ToyFactored"),
        ("steps.x=1", "steps is a plain value, 10"),
        ("train.2=ToyFiles", "train goes from 0 to 0; train.1=NAME adds one"),
        ("train.1=ToyFiles", "train.1 (ToyFiles) still needs train.1.path=VALUE"),
        ("steps=abc", "steps=abc: expected a whole number, got 'abc'"),
        ("steps=1.5", "expected a whole number"),
        ("fast=1", "fast=1: expected true or false, got '1'"),
        ("model.dtype=f4", "expected 'float32' or 'bfloat16', got 'f4'"),
        ("optimizer.betas=1", "expected tuple (float, float), got '1'"),
        ("optimizer.decay=inf", "expected a number, got 'inf'"),
        ("note=\udcff", "bytes that are not UTF-8"),
        ("optimizer=Sgd", "expected a ToyOptimizer, got 'Sgd'; allowed here: ToyAdam, ToyFactored"),
        ("optimizer=ToyOptimizer", "allowed here: ToyAdam, ToyFactored"),
        ("optimizer=toyadm", "allowed here: ToyAdam, ToyFactored; near: ToyAdam"),
        ("model=ToyAdam", "expected a ToyNet, got 'ToyAdam'; allowed here: ToyNet, toy_net"),
        ("model=os:getcwd", "allowed here: ToyNet, toy_net"),
        ("train=Sgd", "allowed here: ToyFiles"),
        ("model=toy_net", "missing a required argument: 'size'; write toy_net:VALUE"),
        ("model=toy_net:3B", "toy_net(size=...): expected '1B' or '7B', got '3B'"),
        ("model=toy_net(7B, foo=1)", "'foo=1' does not fit in toy_net(...), which takes: size="),
        ("optimizer=ToyFactored(rate=-1)", "optimizer: rate is -1.0; it cannot be negative"),
        ("steps=", "steps= has no value; expected int"),
        ("model=ToyNet(windows=1,2)", "'2' does not fit in ToyNet(...)"),
        ("model=ToyNet(windows=1,2)", "a tuple has parentheses of its own: windows=(...)"),
        ("words=", "words= has no value; expected tuple of str or None, or () for none"),
        ("optimizer.betas=", "expected tuple (float, float)"),
        ("steps", "'steps' has no value; write steps=VALUE"),
        ("--steps=3", "settings are written without dashes: steps=3, not --steps=3"),
        ("--model.layers", "written without dashes: model.layers=VALUE"),
        ("runs/x", "'runs/x' is not a setting; write NAME=VALUE"),
    ],
)
def test_mistakes_are_told_where_they_stand(argument, message):
    assert message in refusal(argument)


def test_several_mistakes():
    assert "steps is set twice: steps=1 and steps=2" in refusal("steps=1", "steps=2")
    assert refusal("stepz=1", "model.layerz=2").count("did you mean") == 2


def test_one_argument_may_stand_alone():
    assert parse(JOB, ["steps=3", "runs/a=b"], positional="note").note == "runs/a=b"
    with pytest.raises(UserError, match="note is set twice"):
        parse(JOB, ["x", "y"], positional="note")


def test_several_arguments_may_stand_alone_in_their_order():
    parsed = parse(JOB, ["4", "a/b"], positional=("steps", "note"))
    assert (parsed.steps, parsed.note) == (4, "a/b")
    assert parse(JOB, ["note=x", "4"], positional=("steps", "note")).steps == 4
    with pytest.raises(UserError, match="note is set twice: note=x and note=y"):
        parse(JOB, ["4", "x", "y"], positional=("steps", "note"))


# Help


def test_help_shows_every_setting_with_type_value_and_comment():
    text = help_text(JOB, "python -m experiments.toy", "Toy job.\n\n    Costs nothing.")
    assert text.startswith(
        "Toy job.\n\nCosts nothing.\n\nUsage: python -m experiments.toy [SETTING"
    )
    assert re.search(r"^  steps: int = 10 +optimizer steps$", text, re.M)
    assert re.search(r"^  model = ToyNet +A small net. \[or toy_net:SIZE\]$", text, re.M)
    assert re.search(r"^    norm = ToyNorm$", text, re.M)
    assert re.search(r"^      epsilon: float = 1e-05$", text, re.M)
    assert re.search(r"^    decay: float = 0.3 \* +weight decay$", text, re.M)  # not the default
    assert re.search(r"\[or ToyAdam, ToyFactored\]", text)
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_examples_in_the_help_work():
    examples = re.findall(r"^  (\S+=\S*)  ", help_text(JOB, "toy").split("Settings")[0], re.M)
    assert len(examples) == 4
    parse(JOB, examples[:2] + examples[3:])
    assert changed(examples[2]) != JOB
