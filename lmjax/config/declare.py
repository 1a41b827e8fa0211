"""The `@config` and `@preset` decorators, the registry they fill, and what a config class holds."""

import ast
import contextlib
import functools
import importlib
import inspect
import io
import pathlib
import sys
import textwrap
import tokenize
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import chz

from lmjax.config import values

Class = TypeVar("Class", bound=type)
Function = TypeVar("Function", bound=Callable[..., Any])
MISSING = inspect.Parameter.empty  # the default of a field that has none

_registry: dict[str, Callable[..., Any]] = {}  # name on the command line -> class or preset


class Field(NamedTuple):
    """One field of a config class."""

    name: str
    type: values.Type
    default: Any  # MISSING when it must be given
    owner: type

    @property
    def doc(self) -> str:
        """The comment beside it, or above it, in the source, which is read when it is asked for."""
        bases = filter(values.is_config, self.owner.__mro__)
        found = (_field_docs(base).get(self.name) for base in bases)
        return next((doc for doc in found if doc is not None), "")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: Class) -> Class:
    """Makes a class with annotated fields a config: immutable, typed, hashable, overridable.

        @config
        class Cosine(Schedule):
            '''Warm-up, then half a cosine.'''   # the first line is the class's help

            peak: float = 6e-4  # highest learning rate          (the comment is the field's help)
            warmup: int = 100  # steps of linear warm-up

            def validate(self) -> None:
                if self.warmup < 0:
                    raise UserError(f"warmup is {self.warmup}; it cannot be negative")

    Fields are given by keyword. Types are checked when an object is built (also by `replace`), and
    then `validate` is called. The class is registered under its name, less a trailing "Config".

    Raises:
        TypeError: a field's type is not one that a config can have (see `lmjax.config.values`).
        ValueError: another class or preset already has that name.
    """
    if not hasattr(cls, "validate"):
        cls.validate = _accept
    inherited = any(values.is_config(base) for base in cls.__bases__)
    cls = chz.chz(cls)
    if not inherited:
        chz.validate(_check).__set_name__(cls, "_check")
    for name, field in chz.chz_fields(cls).items():
        try:
            values.check_type(field.final_type)
        except NameError:  # a class that is declared further down; looked at when one is built
            continue
        except TypeError as error:
            raise TypeError(f"{cls.__name__}.{name}: {error}") from None
    _register(values.name_of(cls), cls)
    return cls


def preset(function: Function) -> Function:
    """Registers a function that returns a config, so that `model=llama:7B` finds it by its name.

    The return annotation is required: it says which fields the preset can fill.

    Raises:
        TypeError: there is no return annotation.
        ValueError: another class or preset already has that name.
    """
    if inspect.signature(function).return_annotation is inspect.Signature.empty:
        raise TypeError(f"preset {function.__name__} must say which config it returns")
    _register(function.__name__, function)
    return function


def replace(config: Any, /, **changes: Any) -> Any:
    """A copy of `config` with some fields changed; it is checked like a new one."""
    return chz.replace(config, **changes)


def registered() -> Mapping[str, Callable[..., Any]]:
    """Every registered name with its config class or preset function."""
    return dict(_registry)


def _accept(self: Any) -> None:
    """Nothing more to check."""


def _check(self: Any) -> None:
    """Runs when a config is built: types first, then the class's own `validate`."""
    for name, field in chz.chz_fields(self).items():
        value = getattr(self, field.x_name)
        try:
            found = values.conform(value, field.final_type)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}.{name}: {error}") from None
        if found is not value:
            # An int in a float field is stored as a float, so that equal configs print alike.
            object.__setattr__(self, field.x_name, found)
    self.validate()


def _register(name: str, thing: Callable[..., Any]) -> None:
    other = _registry.get(name, thing)
    if (module_of(other), other.__qualname__) != (module_of(thing), thing.__qualname__):
        raise ValueError(
            f"the config name {name!r} is taken by {other.__module__}.{other.__qualname__}; "
            f"{thing.__module__}.{thing.__qualname__} needs another"
        )
    _registry[name] = thing
    choices.cache_clear()


def module_of(thing: Callable[..., Any]) -> str:
    """The name by which the module of a class or preset can be imported.

    That of the program itself is not `__main__` but its file's: where another module, or a process
    that prepares batches, imports the file again, its classes are the same ones.
    """
    if thing.__module__ not in ("__main__", "__mp_main__"):
        return thing.__module__
    main = sys.modules[thing.__module__]
    if getattr(main, "__spec__", None) is not None:
        return main.__spec__.name
    return pathlib.Path(getattr(main, "__file__", "__main__")).stem  # a notebook has no file


@functools.cache
def import_all() -> None:
    """Imports every module of this package that declares a config or a preset.

    Names resolve among what is imported; an experiment imports only what it uses, and
    `optimizer=Lion` should work all the same.
    """
    package = pathlib.Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name != "__main__.py" and ("\n@config" in text or "\n@preset" in text):
            parts = path.relative_to(package.parent).with_suffix("").parts
            with contextlib.suppress(ImportError):  # it wants an extra that is not installed
                importlib.import_module(".".join(parts).removesuffix(".__init__"))


@functools.cache
def result_type(thing: Callable[..., Any]) -> type:
    """The config class that a registered class or preset gives."""
    return thing if isinstance(thing, type) else typing.get_type_hints(thing)["return"]


@functools.cache
def choices(kind: values.Type) -> Mapping[str, Callable[..., Any]]:
    """The registered classes and presets that fit a field of type `kind`, by name.

    A base that exists only to be inherited from is left out: one that is abstract, or the field's
    own type where that has no fields. Other classes stay, whoever inherits from them.
    """
    wanted = tuple(member for member in values.members(kind) if values.is_config(member))
    found = {}
    for name, thing in sorted(_registry.items()):
        if issubclass(result_type(thing), wanted) and not _is_base(thing, wanted):
            found[name] = thing
    return found


def _is_base(thing: Callable[..., Any], wanted: tuple[type, ...]) -> bool:
    if not isinstance(thing, type):
        return False
    bare = thing in wanted and not chz.chz_fields(thing) and thing.__subclasses__()
    return inspect.isabstract(thing) or bool(bare)


@functools.cache
def fields(cls: type) -> Mapping[str, Field]:
    """The fields of a config class by name, in order of declaration, base classes first."""
    parameters = inspect.signature(cls).parameters
    return {
        name: Field(name, field.final_type, parameters[name].default, cls)
        for name, field in chz.chz_fields(cls).items()
    }


@functools.cache
def _field_docs(cls: type) -> Mapping[str, str]:
    """The comment on each field's line, or the comment lines above it, from the source."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # typed at a prompt: there is no source to read
        return {}
    comments = {}
    whole_line = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("#").strip()
            if token.line.lstrip().startswith("#"):
                whole_line.add(token.start[0])
    docs = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            beside = [comments.get(line, "") for line in range(node.lineno, node.end_lineno + 1)]
            above = []
            line = node.lineno - 1
            while line in whole_line:
                above.insert(0, comments[line])
                line -= 1
            docs[node.target.id] = " ".join(filter(None, beside)) or " ".join(above)
    return docs
