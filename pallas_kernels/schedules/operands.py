"""Values of the operands that a kernel keeps in scalar memory, without running the program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

LARGEST = 1 << 22  # elements of an operand that is looked at


class _NotKnown(Exception):
    """A value hangs on an argument of which only the shape is given."""


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A call of a Pallas kernel.

    Attributes:
        name: of the kernel.
        shapes: element type and shape of each operand, as "bf16[8,4096,128]".
        scalars: values of its operands of integers, where they are known, by index.
    """

    name: str
    shapes: tuple[str, ...]
    scalars: dict[int, np.ndarray]


def kernel_calls(jaxpr: ClosedJaxpr, arguments: Sequence[Any]) -> list[KernelCall]:
    """The calls of Pallas kernels in a traced function, in order; those in loops are left out.

    Only what the scalars are computed from is computed, on the default device.

    Args:
        arguments: of the function; of a `jax.ShapeDtypeStruct` the value is not known.
    """
    calls: list[KernelCall] = []
    _walk(jaxpr.jaxpr, _given(jaxpr.consts), _given(arguments), calls)
    return calls


Value = Callable[[], Any]


def _given(values: Sequence[Any]) -> list[Value]:
    def give(value):
        def get():
            if isinstance(value, jax.ShapeDtypeStruct):
                raise _NotKnown
            return value

        return get

    return [give(value) for value in values]


def _walk(jaxpr: Jaxpr, consts, inputs, calls: list[KernelCall]) -> list[Value]:
    """The results of a jaxpr, each computed when asked for; appends the calls of kernels."""
    values: dict[Any, Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs)))

    def read(atom) -> Value:
        return (lambda: atom.val) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        if equation.primitive.name == "pallas_call":
            calls.append(_call(equation, operands))
        if (inner := _inlined(equation)) is not None:
            results = _walk(inner.jaxpr, _given(inner.consts), operands, calls)
        else:
            results = _lazily(equation, operands)
        values.update(zip(equation.outvars, results))
    return [read(atom) for atom in jaxpr.outvars]


def _inlined(equation) -> ClosedJaxpr | None:
    """The function that an equation only calls."""
    if equation.primitive.name in ("scan", "while", "cond", "pallas_call"):
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(name)
        if isinstance(inner, ClosedJaxpr):
            return inner
        if isinstance(inner, Jaxpr) and not inner.constvars:
            return ClosedJaxpr(inner, [])
    return None


def _lazily(equation, operands: list[Value]) -> list[Value]:
    """The results of an equation, computed once when one is asked for."""
    computed: list[Any] = []

    def compute() -> list[Any]:
        if not computed:
            if equation.primitive.name == "pallas_call":
                raise _NotKnown
            variables = {
                atom: operand()
                for atom, operand in zip(equation.invars, operands)
                if not isinstance(atom, Literal)
            }
            alone = Jaxpr((), [*variables], equation.outvars, [equation])
            computed.extend(jaxpr_as_fun(ClosedJaxpr(alone, []))(*variables.values()))
        return computed

    return [lambda i=i: compute()[i] for i in range(len(equation.outvars))]


def _call(equation, operands: list[Value]) -> KernelCall:
    scalars, shapes = {}, []
    for index, (atom, operand) in enumerate(zip(equation.invars, operands)):
        aval = atom.aval
        shapes.append(f"{_short(aval.dtype)}[{','.join(map(str, aval.shape))}]")
        if aval.dtype.kind in "iub" and aval.size <= LARGEST:
            try:
                scalars[index] = np.asarray(operand())
            except _NotKnown:
                continue
    return KernelCall(_name(equation.params), tuple(shapes), scalars)


def _name(parameters: dict[str, Any]) -> str:
    for name in ("name", "name_and_src_info"):
        if (found := parameters.get(name)) is not None:
            return getattr(found, "name", found)
    return ""


def _short(dtype: Any) -> str:
    """As the compiler writes types."""
    name = str(dtype)
    for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "s")):
        if name.startswith(long):
            return short + name[len(long) :]
    return "pred" if name == "bool" else name
