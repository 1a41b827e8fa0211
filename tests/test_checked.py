"""The check of types and shapes that all tests run under."""

import dataclasses
import importlib
import inspect
import pkgutil

import jaxtyping
import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError

import lmjax.models
from tests.checked import checked

Rows = Float[np.ndarray, "batch embed"]
Row = Float[np.ndarray, "embed"]


@checked
def first(x: Rows, *more: Row, scale: float = 1.0, **named: Row) -> Row:
    return x[0] if scale > 0 else x[:, 0]


def row(size=3):
    return np.zeros(size)


def test_what_fits_is_returned():
    assert first(np.ones((2, 3)), row(), row(), other=row()).tolist() == [1, 1, 1]
    assert first(np.ones((2, 4))).shape == (4,)  # sizes are those of one call


@pytest.mark.parametrize(
    ("args", "kwargs", "name"),
    [
        ((row(),), {}, "x"),
        ((np.zeros((2, 3), int),), {}, "x"),
        ((np.zeros((2, 3)), row(4)), {}, "more"),
        ((np.zeros((2, 3)), row(), row(4)), {}, "more"),
        ((np.zeros((2, 3)),), {"scale": "1"}, "scale"),
        ((np.zeros((2, 3)),), {"other": row(4)}, "named"),
        ((), {"x": row()}, "x"),
        ((np.zeros((2, 3)),), {"scale": -1.0}, "return"),
    ],
)
def test_what_does_not_fit_is_told(args, kwargs, name):
    with pytest.raises(TypeCheckError, match=rf"test_checked.py:.*: {name} of first"):
        first(*args, **kwargs)


def test_an_inner_call_has_sizes_of_its_own():
    @checked
    def outer(x: Rows) -> Rows:
        assert first(np.zeros((5, 7))).shape == (7,)
        return x[:, :2]

    with pytest.raises(TypeCheckError, match=r"return of .*outer"):
        outer(np.zeros((2, 3)))


def test_a_function_that_is_made_again_is_checked_again():
    def made(add):
        @checked
        def inner(x: Row) -> Row:
            return np.concatenate([x, row(add)])

        return inner

    assert made(0)(row()).shape == (3,)
    with pytest.raises(TypeCheckError, match=r"return of .*inner"):
        made(1)(row())


def test_a_size_may_be_an_argument():
    @checked
    def zeros(count: int) -> Float[np.ndarray, "{count} _"]:
        return np.zeros((3, 2))

    assert zeros(3).shape == (3, 2)
    with pytest.raises(TypeCheckError, match="count"):
        zeros(4)


def test_the_switch_of_jaxtyping_is_heeded():
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        assert first(np.ones((2, 3)), scale=-1.0).shape == (2,)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_fields_are_checked():
    @checked
    @dataclasses.dataclass
    class Pair:
        left: Row
        right: Row

    Pair(row(), row())
    with pytest.raises(TypeCheckError, match="right of"):
        Pair(row(), row(4))


def test_types_that_only_type_checkers_import_are_left_out():
    @checked
    def length(x: "Missing", y: "int") -> "int":
        return len(x) + y

    assert length([1], 2) == 3
    with pytest.raises(TypeCheckError, match="y of"):
        length([1], "2")


def test_the_modules_of_models_are_checked():
    for part in pkgutil.iter_modules(lmjax.models.__path__):
        module = importlib.import_module(f"lmjax.models.{part.name}")
        own = [f for f in vars(module).values() if inspect.isfunction(f)]
        for function in own:
            if function.__module__ == module.__name__ and function.__annotations__:
                plain = inspect.unwrap(function)
                assert plain is not function, f"{part.name}.{function.__name__} is not checked"
