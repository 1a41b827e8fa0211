"""Experiments by the names of their modules."""

import difflib
import importlib
import pkgutil
from typing import Any

from lmjax.config import UserError


def load_experiment(name: str) -> Any:
    """The experiment of a module.

    Raises:
        UserError: there is no such module, or no experiment in it.
    """
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"{name}: {error}{_near(name)}") from None
    if not hasattr(module, "experiment"):
        raise UserError(f"{name}: the module has no variable `experiment`")
    return module.experiment


def _near(name: str) -> str:
    package, _, last = name.rpartition(".")
    try:
        folders = importlib.import_module(package or "experiments").__path__
    except (ModuleNotFoundError, AttributeError):
        return "; give a module as Python imports it, such as experiments.gpt3_175b"
    known = [found.name for found in pkgutil.iter_modules(folders)]
    near = difflib.get_close_matches(last, known, 3)
    prefix = f"{package}." if package else "experiments."
    return f"; near are {', '.join(prefix + one for one in near)}" if near else ""
