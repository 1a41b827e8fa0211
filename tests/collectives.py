"""The communication of a compiled program, read from its optimised HLO."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
COLLECTIVE = re.compile(rf" = (.*?) ({KINDS}|ragged-all-to-all)(?:-start)?\(")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
ARRAY = re.compile(r"[a-z]\w*\[([\d,]*)\]")
MESH = re.compile(r"mesh\[(.*?)\](?:, device_ids=\((\S+)\))? \{(.*?)\}")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One array that one collective of a program moves; XLA puts several into one instruction.

    Attributes:
      kind: the collective.
      shape: of its result on each device.
      loops: the loops that it stands in, from the outermost: which of those of its surroundings.
      axes: the axes of the mesh that it goes over.
      in_branch: whether it stands in a branch of a conditional.
    """

    kind: str
    shape: tuple[int, ...]
    loops: tuple[int, ...]
    axes: tuple[str, ...]
    in_branch: bool = False

    @property
    def size(self) -> int:
        """Number of elements; XLA's reshapes do not change it."""
        return math.prod(self.shape)


def transfers(function: Callable, *arguments) -> list[Transfer]:
    """All transfers of a function, compiled for the mesh that is set, in no particular order.

    Args:
      function: of arrays, or of trees of them.
      arguments: arrays, or their shapes with shardings.
    """
    return of_program(program_text(function, *arguments), jax.sharding.get_mesh())


def program_text(function: Callable, *arguments) -> str:
    """The optimised HLO of a function; see `transfers`."""
    # By leaves: `lower` fills trees with records of its own, which checked classes refuse.
    leaves, tree = jax.tree.flatten(arguments)
    run = jax.jit(lambda *leaves: function(*tree.unflatten(leaves)))
    return run.lower(*leaves).compile().as_text()


def of_program(text: str, mesh: jax.sharding.Mesh) -> list[Transfer]:
    """All transfers of a compiled program for a mesh."""
    lines, entry = _computations(text)
    loops, in_branch = {entry: ()}, {entry: False}
    pending = [entry]
    while pending:
        name = pending.pop()
        bodies = itertools.count()
        for line in lines[name]:
            loop = LOOP.search(line)
            inside = loops[name] + ((next(bodies),) if loop else ())
            branches = [name for part in BRANCHES.findall(line) for name in part.split(", ")]
            for called in (*CALLED.findall(line), *(name.lstrip("%") for name in branches)):
                if called in lines and called not in loops:
                    loops[called] = inside
                    in_branch[called] = in_branch[name] or " conditional(" in line
                    pending.append(called)
    found = []
    for name in loops:
        for line in lines[name]:
            if match := COLLECTIVE.search(line):
                axes = _axes(line, mesh)
                for numbers in ARRAY.findall(match[1]):
                    shape = tuple(map(int, numbers.split(","))) if numbers else ()
                    found.append(Transfer(match[2], shape, loops[name], axes, in_branch[name]))
    return found


def tally(found: Iterable[Transfer]) -> dict:
    """Counts transfers: {(loops, axes): {kind: {size: number}}}. Single numbers are left out."""
    sizes = ((t.loops, t.axes, t.kind, [t.size]) for t in found if t.size > 1)
    return expectation(sizes)


def expectation(rows: Iterable[tuple[tuple, tuple, str, Sequence[int]]]) -> dict:
    """What `tally` should give, from rows of (loops, axes, kind, sizes of arrays).

    A row without axes is left out: nobody is there to send anything to.
    """
    counts: dict = {}
    for loops, axes, kind, sizes in rows:
        if axes and sizes:
            kinds = counts.setdefault((loops, axes), {})
            kinds.setdefault(kind, collections.Counter()).update(sizes)
    return counts


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that begins."""
    lines, entry, name = {}, None, None
    for line in text.splitlines():
        if not line.startswith(" ") and (head := COMPUTATION.match(line)):
            name = head[2]
            lines[name] = []
            entry = name if head[1] else entry
        elif name is not None:
            lines[name].append(line)
    return lines, entry


def _axes(line: str, mesh) -> tuple[str, ...]:
    """The axes of the mesh whose devices a collective joins."""
    groups = _groups(line, mesh.size)
    ids = np.arange(mesh.size).reshape(mesh.devices.shape)  # devices stand in their order
    for number in range(len(mesh.axis_names) + 1):
        for axes in itertools.combinations(range(ids.ndim), number):
            if any(mesh.devices.shape[axis] == 1 for axis in axes):
                continue
            last = np.moveaxis(ids, axes, range(-len(axes), 0)) if axes else ids[..., None]
            joined = last.reshape(-1, math.prod(mesh.devices.shape[axis] for axis in axes))
            if {frozenset(row) for row in joined.tolist()} == groups:
                return tuple(mesh.axis_names[axis] for axis in axes)
    raise AssertionError(f"no axes of {mesh} make these groups: {line.strip()[:400]}")


def _groups(line: str, devices: int) -> set[frozenset[int]]:
    """Which devices take part together, in any of the ways that XLA writes it."""
    if match := re.search(r"source_target_pairs=\{(.*?\})\}", line):
        parts = [{number} for number in range(devices)]
        for pair in re.findall(r"\{(\d+),(\d+)\}", match[1]):
            one, other = (next(p for p in parts if int(n) in p) for n in pair)
            if one is not other:
                parts.remove(other)
                one |= other
        return set(map(frozenset, parts))
    text = re.search(r"replica_groups=(.*)", line)[1]
    if text.startswith("{}"):
        return {frozenset(range(devices))}
    if text.startswith("{"):
        rows = re.findall(r"\{([\d,]+)\}", re.match(r"\{(\{.*?\})\}", text)[1])
        return {frozenset(map(int, row.split(","))) for row in rows}
    if text.startswith("mesh"):
        sizes, order, joined = MESH.match(text).groups()
        names, lengths = zip(*re.findall(r"'(\w+)'=(\d+)", sizes))
        ids = np.arange(devices) if order is None else _iota(order)
        ids = ids.reshape(tuple(map(int, lengths)))
        inside = [names.index(name) for name in re.findall(r"'(\w+)'", joined)]
        last = np.moveaxis(ids, inside, range(-len(inside), 0))
        rows = last.reshape(-1, math.prod(ids.shape[axis] for axis in inside))
    else:
        number, size, order = re.match(r"\[(\d+),(\d+)\]<=(\S+?),? ", text + " ").groups()
        rows = _iota(order).reshape(int(number), int(size))
    return set(map(frozenset, rows.tolist()))


def _iota(text: str) -> np.ndarray:
    """Device numbers as XLA abbreviates them: [2,4]T(1,0) is 0 to 7 as 2 x 4, transposed."""
    lengths, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    lengths = tuple(map(int, lengths.split(",")))
    ids = np.arange(math.prod(lengths)).reshape(lengths)
    return ids if order is None else ids.transpose(tuple(map(int, order.split(","))))
