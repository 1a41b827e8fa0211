"""The table of implementations, each of which says what it cannot serve."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.attention.bias import Bias
from pallas_kernels.attention.dropout import Dropout
from pallas_kernels.attention.mask import Mask


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


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute attention.

    Attributes:
        name: what `attention(implementation=...)` calls it.
        serve: takes the arguments of a `Request`, gives the result.
        refusal: the reason why it cannot serve a request, or None; asks nothing of the arrays but
            their types.
        returns_lse: whether it serves requests with `return_lse`.
    """

    name: str
    serve: Callable[..., jax.Array | tuple[jax.Array, jax.Array]]
    refusal: Callable[[Request], str | None]
    returns_lse: bool = False

    def refuses(self, request: Request) -> str | None:
        """Reason why it cannot serve a request, or None if it can."""
        if request.return_lse and not self.returns_lse:
            return "it returns no log-sum-exp"
        return self.refusal(request)


class CannotServe(ValueError):
    """Refusal of a call: by the implementation that it names, or by all of them."""


_table: dict[str, Implementation] = {}


def register(implementation: Implementation) -> None:
    """Adds an implementation, which is preferred to those that are there already.

    Raises:
        ValueError: there is one of that name.
    """
    if implementation.name in _table:
        raise ValueError(f"attention: there is an implementation {implementation.name!r} already")
    _table[implementation.name] = implementation


def implementations() -> tuple[str, ...]:
    """Names that `attention` takes as its implementation; later ones are preferred."""
    return tuple(_table)


def choose(request: Request, name: str | None) -> Implementation:
    """The implementation of a name, or the preferred one of those that can serve.

    Raises:
        ValueError: there is none of that name.
        CannotServe: the named one cannot serve, or none can; with the reasons.
    """
    if name is not None:
        if name not in _table:
            raise ValueError(
                f"attention: implementation {name!r} is not one of {', '.join(_table)}"
            )
        if (reason := _table[name].refuses(request)) is not None:
            raise CannotServe(
                f"attention: implementation {name!r} cannot serve this call: {reason}"
            )
        return _table[name]
    reasons = []
    for implementation in reversed(_table.values()):
        if (reason := implementation.refuses(request)) is None:
            return implementation
        reasons.append(f"\n  {implementation.name}: {reason}")
    raise CannotServe(f"attention: no implementation can serve this call:{''.join(reasons)}")
