"""The types a config field may have: checking a value, reading one from text, naming the type.

Allowed are `bool`, `int`, `float`, `str`, `None`, `Literal`, other configs, `tuple` (never a list:
configs are hashable), and unions of these.
"""

import math
import numbers
import types
import typing
from typing import Any, Literal, Union

Type = Any  # a type as it stands in an annotation: int, tuple[str, ...], Literal["a"] | None
SCALARS = (bool, int, float, str)


def is_config(value: object) -> bool:
    """Returns whether `value` is a config, or a config class."""
    return hasattr(value, "__chz_fields__")


def name_of(cls: type) -> str:
    """The name of a config class on the command line and in JSON: `RMSNorm` of RMSNormConfig."""
    return cls.__name__.removesuffix("Config") or cls.__name__


def members(kind: Type) -> tuple[Type, ...]:
    """The alternatives of a union; a tuple of one for any other type."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def element_types(kind: Type, length: int) -> tuple[Type, ...] | None:
    """The types of the elements if `kind`, or a part of the union, is a tuple of that length."""
    for member in members(kind):
        arguments = typing.get_args(member)
        if typing.get_origin(member) is tuple and arguments[1:] == (Ellipsis,):
            return arguments[:1] * length
        if typing.get_origin(member) is tuple and len(arguments) == length:
            return arguments
    return None


def check_type(kind: Type) -> None:
    """Refuses types that a config field cannot have.

    Raises:
        TypeError: naming the part of `kind` that is not allowed.
    """
    for member in members(kind):
        if typing.get_origin(member) is tuple:
            for element in typing.get_args(member):
                if element is not Ellipsis:
                    check_type(element)
        elif not (
            member in (*SCALARS, None, type(None))
            or typing.get_origin(member) is Literal
            or is_config(member)
        ):
            raise TypeError(
                f"a config field cannot be a {describe(member)}: allowed are bool, int, float, "
                "str, None, Literal, configs, tuple[X, ...] and unions of these"
            )


def describe(kind: Type) -> str:
    """`kind` in words for a person: `int or None`, `tuple of str`, `'full' or 'dots'`."""
    if kind in (None, type(None)):
        return "None"
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        arguments = typing.get_args(kind)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"tuple of {describe(arguments[0])}"
        return f"tuple ({', '.join(describe(argument) for argument in arguments)})"
    if len(members(kind)) > 1:
        return " or ".join(describe(member) for member in members(kind))
    return name_of(kind) if is_config(kind) else getattr(kind, "__name__", str(kind))


def conform(value: Any, kind: Type) -> Any:
    """`value` as a value of type `kind`: itself, or a float for an int where `kind` says float.

    Raises:
        TypeError: `value` does not fit; the message says what was expected and what was given.
    """
    if len(members(kind)) > 1:
        fitting = [found for member in members(kind) for found in _fitting(value, member)]
        # An int in `float | int` stays an int.
        exact = [found for found in fitting if type(found) is type(value)]
        if fitting:
            return (exact or fitting)[0]
    elif kind in (None, type(None)) and value is None:
        return None
    elif typing.get_origin(kind) is Literal:
        for choice in typing.get_args(kind):
            if type(choice) is type(value) and choice == value:
                return value
    elif typing.get_origin(kind) is tuple and isinstance(value, tuple):
        kinds = element_types(kind, len(value))
        if kinds is not None:
            return tuple(conform(element, part) for element, part in zip(value, kinds, strict=True))
    elif is_config(kind) and isinstance(value, kind):
        return value
    elif kind in SCALARS:
        found = _conform_scalar(value, kind)
        if found is not None:
            return found
    raise TypeError(f"expected {describe(kind)}, got {value!r} ({type(value).__name__})")


def _fitting(value: Any, kind: Type) -> list[Any]:
    try:
        return [conform(value, kind)]
    except TypeError:
        return []


def _conform_scalar(value: Any, kind: type) -> Any | None:
    if isinstance(value, bool) or kind is bool:  # True is an int for Python, not for us
        return value if isinstance(value, bool) and kind is bool else None
    if kind is int and isinstance(value, numbers.Integral):
        return int(value)
    if kind is float and isinstance(value, numbers.Real):
        if not math.isfinite(value):
            raise TypeError(
                f"expected a finite number, got {value!r} (None can stand for no limit)"
            )
        return float(value)
    if kind is str and isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise TypeError(f"expected text, got bytes that are not UTF-8: {value!a}")
        return str(value)
    return None
