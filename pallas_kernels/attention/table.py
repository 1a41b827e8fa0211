"""The table of implementations of attention, and what each of them is asked."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from pallas_kernels.attention.bias import Bias
from pallas_kernels.attention.dropout import Dropout
from pallas_kernels.attention.mask import Mask
from pallas_kernels.table import CannotServe, Implementation, ImplementationTable

__all__ = ["CannotServe", "Implementation", "Request", "choose", "implementations", "register"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A call of `attention`; its attributes are the arguments of every implementation.

    `return_lse` is handed on only where it is set, to implementations that do not refuse it.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: Mask
    bias: Bias | None
    scale: float
    softcap: float | None
    dropout: Dropout | None
    return_lse: bool = False

    def arguments(self) -> dict[str, Any]:
        """The arguments by name."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if not self.return_lse:
            del named["return_lse"]
        return named


_table = ImplementationTable("attention")


def register(implementation: Implementation) -> None:
    """Adds an implementation, which is preferred to those that are there already."""
    _table.register(implementation)


def implementations() -> tuple[str, ...]:
    """Names that `attention` takes as its implementation; later ones are preferred."""
    return _table.names()


def choose(request: Request, name: str | None) -> Implementation:
    """The implementation of a name, or the preferred one: see `ImplementationTable.choose`."""
    return _table.choose(request, name)
