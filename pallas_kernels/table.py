"""Tables of implementations of one operation, each of which says what it cannot serve."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


class CannotServe(ValueError):
    """Refusal of a call: by the implementation that it names, or by all of them."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        name: what the operation's `implementation` argument calls it.
        serve: takes the arguments of a request, gives the result.
        refusal: the reason why it cannot serve a request, or None; asks nothing of the arrays but
            their types.
        returns_lse: whether it serves requests with `return_lse`.
    """

    name: str
    serve: Callable[..., Any]
    refusal: Callable[[Any], str | None]
    returns_lse: bool = False

    def refuses(self, request: Any) -> str | None:
        """Reason why it cannot serve a request, or None if it can."""
        if request.return_lse and not self.returns_lse:
            return "it returns no log-sum-exp"
        return self.refusal(request)


class ImplementationTable:
    """The implementations of an operation; of those that can serve the last one is preferred."""

    def __init__(self, operation: str):
        self.operation = operation
        self._entries: dict[str, Implementation] = {}

    def register(self, implementation: Implementation) -> None:
        """Adds an implementation, which is preferred to those that are there already.

        Raises:
            ValueError: there is one of that name.
        """
        if implementation.name in self._entries:
            raise ValueError(
                f"{self.operation}: there is an implementation {implementation.name!r} already"
            )
        self._entries[implementation.name] = implementation

    def names(self) -> tuple[str, ...]:
        """Names of the implementations; later ones are preferred."""
        return tuple(self._entries)

    def choose(self, request: Any, name: str | None) -> Implementation:
        """The implementation of a name, or the preferred one of those that can serve.

        Raises:
            ValueError: there is none of that name.
            CannotServe: the named one cannot serve, or none can; with the reasons.
        """
        operation, entries = self.operation, self._entries
        if name is not None:
            if name not in entries:
                raise ValueError(
                    f"{operation}: implementation {name!r} is not one of {', '.join(entries)}"
                )
            if (reason := entries[name].refuses(request)) is not None:
                raise CannotServe(
                    f"{operation}: implementation {name!r} cannot serve this call: {reason}"
                )
            return entries[name]
        reasons = []
        for implementation in reversed(entries.values()):
            if (reason := implementation.refuses(request)) is None:
                return implementation
            reasons.append(f"\n  {implementation.name}: {reason}")
        raise CannotServe(f"{operation}: no implementation can serve this call:{''.join(reasons)}")
