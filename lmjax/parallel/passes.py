"""A function and its gradient in three passes: outputs, gradients of inputs, gradients of weights.

`jax.vjp` gives both gradients at once. A pipeline whose stages wait may put the second off, and
wants it to be the products of weights' gradients and nothing else. So the program of a function and
of its whole gradient is traced once, and its equations are dealt out: what the output needs to the
first pass, what the input's gradient needs besides to the second, the rest to the third. What a
`jax.checkpoint` inside of the function computes again is part of the second.

What a later pass needs of an earlier one is kept, but little of it: not what weights and other
inputs alone decide, such as weights in another dtype or gathered from their shards, and not what
follows from the kept by operations on each number (`CHEAP`). Each pass makes these by itself. So
every product is computed in one pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

Kept = list[jax.Array]
Atom = Var | Literal

# Equations that only call a program, which is put in their place, by the parameter that has it.
CALLS = {
    "jit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
# Equations whose operand is kept rather than their result, where that is no smaller.
FORMS = "broadcast_in_dim convert_element_type copy expand_dims name pvary reshape squeeze"
# Equations on each number, which are computed again rather than their result kept.
CHEAP = f"""{FORMS} abs add add_any and cbrt clamp cos div eq erf exp exp2 expm1 floor ge gt
    integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow reduce_precision
    rem round rsqrt select_n sign sin sqrt square stop_gradient sub tan tanh xor"""
_FORMS, _CHEAP = frozenset(FORMS.split()), frozenset(CHEAP.split())


class Passes(NamedTuple):
    """Three passes of y = function(weights, x).

    Attributes:
      forward: x -> (y, what the others need of it).
      backward: (what forward kept, gradient of y) -> (gradient of x, what `weights` needs besides).
      weights: (what forward kept, what backward kept) -> gradients of the weights.
    """

    forward: Callable[[jax.Array], tuple[jax.Array, Kept]]
    backward: Callable[[Kept, jax.Array], tuple[jax.Array, Kept]]
    weights: Callable[[Kept, Kept], Any]

    def once(self, x: jax.Array) -> tuple[Kept, Kept]:
        """Runs forward and backward; what each of them keeps."""
        y, kept = self.forward(x)
        return kept, self.backward(kept, y)[1]

    def both(self, kept: Kept, d_y: jax.Array) -> tuple[jax.Array, Any]:
        """Gradients of x and of the weights."""
        d_x, more = self.backward(kept, d_y)
        return d_x, self.weights(kept, more)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slot:
    """One of the slots of some arrays, in which what passes keep lies until it is read.

    Attributes:
      arrays: a tree, of all slots along their first axis, and of entries, such as layers, along
        further ones.
      number: of the slot.
    """

    arrays: Any
    number: jax.Array

    def read(self, *entry: jax.Array) -> Any:
        """The arrays of an entry."""
        at = self.number, *entry

        def one(a: jax.Array) -> jax.Array:
            rest = a.shape[len(at) :]
            start = *at, *(0 for _ in rest)
            found = jax.lax.dynamic_slice(a, start, (*(1 for _ in at), *rest))
            return jax.lax.squeeze(found, range(len(at)))

        return jax.tree.map(one, self.arrays)

    def written(self, values: Any, *entry: jax.Array) -> Slot:
        """The slot with the arrays of an entry."""
        at = self.number, *entry

        def one(a: jax.Array, value: jax.Array) -> jax.Array:
            start = *at, *(0 for _ in value.shape)
            value = jax.lax.expand_dims(value, range(len(at)))
            return jax.lax.dynamic_update_slice(a, value, start)

        return Slot(jax.tree.map(one, self.arrays, values), self.number)


class SlotPasses(NamedTuple):
    """Passes whose arrays lie in slots, written where they are made and read where they are used.

    Attributes:
      entries: sizes of the axes of entries.
      once: x -> what forward and what backward keep, of one entry.
      forward: (x, slot) -> (y, slot).
      backward: (slot of forward, slot of backward, gradient of y) -> (gradient of x, slot).
      weights: (slot of forward, slot of backward) -> gradients of the weights.
      both: (slot of forward, gradient of y) -> (gradient of x, gradients of the weights), where
        nothing lies between the two.
    """

    entries: tuple[int, ...]
    once: Callable[[jax.Array], tuple[Kept, Kept]]
    forward: Callable[[jax.Array, Slot], tuple[jax.Array, Slot]]
    backward: Callable[[Slot, Slot, jax.Array], tuple[jax.Array, Slot]]
    weights: Callable[[Slot, Slot], Any]
    both: Callable[[Slot, jax.Array], tuple[jax.Array, Any]]


def in_slots(passes: Passes) -> SlotPasses:
    """Passes with slots of one entry."""

    def forward(x: jax.Array, kept: Slot) -> tuple[jax.Array, Slot]:
        y, values = passes.forward(x)
        return y, kept.written(values)

    def backward(kept: Slot, more: Slot, d_y: jax.Array) -> tuple[jax.Array, Slot]:
        d_x, values = passes.backward(kept.read(), d_y)
        return d_x, more.written(values)

    def weights(kept: Slot, more: Slot) -> Any:
        return passes.weights(kept.read(), more.read())

    def both(kept: Slot, d_y: jax.Array) -> tuple[jax.Array, Any]:
        return passes.both(kept.read(), d_y)

    return SlotPasses((), passes.once, forward, backward, weights, both)


def in_passes(function: Callable, weights: Any, given: Any, x: Any) -> Passes:
    """The passes of a function, with its weights and other inputs.

    Args:
      function: (weights, given, x) -> y, of the type of x.
      weights: arrays that have gradients.
      given: arrays that have none.
      x: an array of the type of the input; its numbers are not used.
    """

    def whole(weights, given, x, d_y):
        y, pull = jax.vjp(lambda weights, x: function(weights, given, x), weights, x)
        d_weights, d_x = pull(d_y)
        return y, d_x, d_weights

    traced, shapes = jax.make_jaxpr(whole, return_shape=True)(weights, given, x, x)
    program = _Program.of(traced)
    rest, structure = jax.tree.leaves((weights, given)), jax.tree.structure(shapes[2])
    *others, source, cotangent = program.inputs
    y, d_x, *d_weights = program.outputs

    early = program.needed([y], {source})
    at_hand = {source, cotangent, *program.worth_keeping(early.results, {source})}
    late = program.needed([d_x], at_hand)
    at_hand |= program.worth_keeping(late.made, {source, cotangent}) | (
        late.made & program.following({cotangent})
    )
    last = program.needed(d_weights, at_hand)
    kept_early = early.results | {source}
    first = [atom for atom in program.order if atom in kept_early & (late.read | last.read)]
    second = [atom for atom in program.order if atom in last.read - kept_early]
    early = program.needed([y, *first], {source})

    def run(needed: _Needed, inputs: Sequence[Var], outputs: Sequence[Atom], *values) -> list:
        part = program.part(needed.equations, [*others, *inputs], outputs)
        return jaxpr_as_fun(part)(*program.constants, *rest, *values)

    def forward(x: jax.Array) -> tuple[jax.Array, Kept]:
        found, *kept = run(early, [source], [y, *first], x)
        return found, kept

    def backward(kept: Kept, d_y: jax.Array) -> tuple[jax.Array, Kept]:
        found, *more = run(late, [*first, cotangent], [d_x, *second], *kept, d_y)
        return found, more

    def of_weights(kept: Kept, more: Kept) -> Any:
        found = run(last, [*first, *second], d_weights, *kept, *more)
        return jax.tree.unflatten(structure, found)

    return Passes(forward, backward, of_weights)


class _Needed(NamedTuple):
    """Equations that some results need.

    Attributes:
      equations: in order, those with several results without what makes unneeded ones.
      results: all that the whole equations make.
      made: those of them that are needed.
      read: what is needed of what was at hand.
    """

    equations: list[JaxprEqn]
    results: set[Var]
    made: set[Var]
    read: set[Var]


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """A program without calls.

    Attributes:
      constants: values of its first inputs.
      inputs: variables; those of the constants come first, the input and the gradient of the
        output last.
      outputs: variables, or literals.
      equations: in order.
      like: a traced program, for all else that one has.
    """

    constants: list[Any]
    inputs: list[Var]
    outputs: list[Atom]
    equations: list[JaxprEqn]
    like: Jaxpr

    @staticmethod
    def of(traced: ClosedJaxpr) -> _Program:
        """A traced program with what it calls put in place of the calls."""
        program = traced.jaxpr
        names: dict[Var, Atom] = {variable: Var(variable.aval) for variable in program.invars}
        inputs, constants = list(names.values()), {}
        equations = list(_without_calls(traced, names, constants))
        outputs = [_renamed(atom, names) for atom in program.outvars]
        return _Program([*constants.values()], [*constants, *inputs], outputs, equations, program)

    @functools.cached_property
    def maker(self) -> dict[Var, JaxprEqn]:
        """The equation that makes each variable."""
        return {variable: one for one in self.equations for variable in one.outvars}

    @functools.cached_property
    def order(self) -> list[Var]:
        """The input, the gradient of the output, and what is made, in order."""
        return [*self.inputs[-2:], *self.maker]

    @functools.cached_property
    def operands(self) -> dict[Var, list[Var]]:
        """Operands of each variable: variables that its equation reads to make it."""
        found = {}
        for equation in self.equations:
            several = len(equation.outvars) > 1
            for variable in equation.outvars:
                alone = self.pruned(equation, {variable}) if several else equation
                found[variable] = _variables(alone.invars)
        return found

    def following(self, roots: set[Var]) -> set[Var]:
        """These variables, and what depends on them."""
        found = set(roots)
        for variable, operands in self.operands.items():
            if not found.isdisjoint(operands):
                found.add(variable)
        return found

    def worth_keeping(self, made: set[Var], roots: set[Var]) -> set[Var]:
        """Those that depend on the roots and are not cheap to make."""
        return {atom for atom in made & self.following(roots) if not self._is_cheap(atom)}

    def needed(self, wanted: Iterable[Atom], at_hand: set[Var]) -> _Needed:
        """Equations that make the wanted from inputs and from what is at hand."""
        equations, results, made, read = [], set(), set(), set()
        pending: set[Var] = set()

        def want(atoms: Iterable[Atom]) -> None:
            for atom in _variables(atoms):
                kept = atom in at_hand and not self._is_form(atom, at_hand)
                (read if kept else pending).add(atom)

        want(wanted)
        for equation in reversed(self.equations):
            if own := pending.intersection(equation.outvars):
                results.update(equation.outvars)
                made |= own
                if len(equation.outvars) > 1:
                    equation = self.pruned(equation, own)
                equations.append(equation)
                want(equation.invars)
        return _Needed(equations[::-1], results, made, read)

    def pruned(self, equation: JaxprEqn, wanted: set[Var]) -> JaxprEqn:
        """An equation with what it computes for these results alone."""
        inputs = list(dict.fromkeys(_variables(equation.invars)))
        alone = self._program([equation], inputs, equation.outvars)
        found, _ = dce_jaxpr(alone, [variable in wanted for variable in equation.outvars])
        return found.eqns[0]

    def part(
        self, equations: list[JaxprEqn], inputs: Sequence[Var], outputs: Sequence[Atom]
    ) -> ClosedJaxpr:
        """A program of some of the equations."""
        return ClosedJaxpr(self._program(equations, inputs, outputs), [])

    def _program(
        self, equations: list[JaxprEqn], inputs: Sequence[Var], outputs: Sequence[Atom]
    ) -> Jaxpr:
        return self.like.replace(constvars=[], invars=[*inputs], outvars=[*outputs], eqns=equations)

    def _is_cheap(self, atom: Var) -> bool:
        """Returns whether something is made again; not so a narrower copy of what is not."""
        if atom not in self.maker or (name := self.maker[atom].primitive.name) not in _CHEAP:
            return False
        operand = self.operands[atom][0]
        narrow = name == "convert_element_type" and _bytes(atom) < _bytes(operand)
        return not narrow or self._is_cheap(operand)

    def _is_form(self, atom: Var, at_hand: set[Var]) -> bool:
        """Returns whether something is another form of what is at hand, and no smaller."""
        equation = self.maker.get(atom)
        if equation is None or equation.primitive.name not in _FORMS:
            return False
        operands = _variables(equation.invars)
        return len(operands) == 1 and operands[0] in at_hand and _bytes(operands[0]) <= _bytes(atom)


def _without_calls(traced: Any, names: dict, constants: dict) -> Iterator[JaxprEqn]:
    """Equations of a program, in variables of their own, with those of programs that it calls.

    Args:
      traced: the program, with or without values of its constants.
      names: the variables here of its inputs; its others are added.
      constants: values by variable, which are added to.
    """
    program = getattr(traced, "jaxpr", traced)
    for variable, value in zip(program.constvars, getattr(traced, "consts", ()), strict=True):
        names[variable] = Var(variable.aval)
        constants[names[variable]] = value
    for equation in program.eqns:
        given = [_renamed(atom, names) for atom in equation.invars]
        called = equation.params.get(CALLS.get(equation.primitive.name))
        if called is not None:
            inner = getattr(called, "jaxpr", called)
            own = dict(zip(inner.invars, given, strict=True))
            yield from _without_calls(called, own, constants)
            results = [_renamed(atom, own) for atom in inner.outvars]
            names.update(zip(equation.outvars, results, strict=True))
            continue
        results = [Var(variable.aval) for variable in equation.outvars]
        names.update(zip(equation.outvars, results, strict=True))
        yield equation.replace(invars=given, outvars=results)


def _renamed(atom: Atom, names: dict) -> Atom:
    return atom if isinstance(atom, Literal) else names[atom]


def _variables(atoms: Iterable[Atom]) -> list[Var]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _bytes(atom: Var) -> int:
    return math.prod(atom.aval.shape) * atom.aval.dtype.itemsize
