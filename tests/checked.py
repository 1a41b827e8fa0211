"""Types and shapes of arguments and returned values, checked at every call.

`jaxtyping.jaxtyped` makes three functions of each function when it is defined (of one within a
function: each time that the outer one runs) and checks the arguments before and after the call.
Here a function's types are looked up when it is first called, and each value is checked once.
"""

import dataclasses
import functools
import inspect
import types
import typing

from beartype import BeartypeConf, beartype
from beartype.door import die_if_unbearable, is_bearable
from jaxtyping import TypeCheckError, config, jaxtyped

ERROR = BeartypeConf(violation_type=TypeCheckError)
signatures = {}  # by the id of a function's code


class Signature:
    """Types of what a function is given and returns."""

    def __init__(self, function):
        self.code = code = function.__code__  # kept, so that no other has its id
        self.hints = _hints(function)
        count = code.co_argcount + code.co_kwonlyargcount
        self.names, rest = code.co_varnames[:count], iter(code.co_varnames[count:])
        self.positional = code.co_argcount
        self.more = next(rest) if code.co_flags & inspect.CO_VARARGS else None
        self.named = next(rest) if code.co_flags & inspect.CO_VARKEYWORDS else None

    def check(self, args, kwargs):
        """Raises TypeCheckError where an argument has another type or shape."""
        for name, value in zip(self.names[: self.positional], args):
            self.one(name, value)
        for value in args[self.positional :]:
            self.one(self.more, value)
        for name, value in kwargs.items():
            self.one(name if name in self.names else self.named, value)

    def one(self, name, value):
        """Raises TypeCheckError where the value of that name has another type or shape."""
        hint = self.hints.get(name)
        if hint is not None and not is_bearable(value, hint):
            place = f"{self.code.co_filename}:{self.code.co_firstlineno}: {name} of "
            die_if_unbearable(
                value, hint, conf=ERROR, exception_prefix=place + f"{self.code.co_qualname}: "
            )


def _hints(function):
    """Types by the names of arguments; without those that only type checkers import."""
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError:
        found = {}
        for name, hint in function.__annotations__.items():
            one = types.SimpleNamespace(__annotations__={name: hint})
            try:
                found |= typing.get_type_hints(one, function.__globals__, include_extras=True)
            except NameError:
                continue
        return found


def checked(made):
    """Returns a function or dataclass whose arguments and results are checked."""
    if inspect.isclass(made):
        if dataclasses.is_dataclass(made) and "__init__" in vars(made):
            made.__init__ = checked(made.__init__)
        return made
    hints = made.__annotations__.values()
    if not hints:
        return made
    if any("{" in str(hint) for hint in hints):  # a size that is the value of an argument
        return jaxtyped(made, typechecker=beartype)
    code = made.__code__

    @functools.wraps(made)
    def outer(*args, **kwargs):
        if config.jaxtyping_disable:
            return made(*args, **kwargs)
        signature = signatures.get(id(code))
        if signature is None:
            signature = signatures[id(code)] = Signature(made)
        with jaxtyped("context"):  # names of axes are those of this call
            signature.check(args, kwargs)
            result = made(*args, **kwargs)
            signature.one("return", result)
        return result

    return outer
