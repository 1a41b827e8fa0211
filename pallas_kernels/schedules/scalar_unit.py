"""The scalar unit of a core: which bundles of a kernel run, and how often.

A kernel's loops and branches hang on scalars alone: the steps of its grid, and what it reads of
its prefetched operands. So a run of its scalar instructions, with the operands' values, counts
every bundle exactly, and every transfer with its size. Vectors are not computed.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from pallas_kernels.chips import TpuChip
from pallas_kernels.schedules.bundles import Instruction, Listing
from pallas_kernels.schedules.scalar_memory import (
    ScalarMemory,
    operand_index,
    operand_offset,
    operand_pointer,
    words,
)

DELAY = 5  # bundles from a branch to where it goes
LATENCY = 1e-6  # seconds of a transfer of nothing
MOST = 50_000_000  # blocks of bundles that run before a program is taken for endless

OPERATIONS = {
    "smov": "{0}",
    "pmov": "{0}",
    "sadd.s32": "wrap({0} + {1})",
    "ssub.s32": "wrap({0} - {1})",
    "smul.u32": "wrap({0} * {1})",
    "smul.s32": "wrap({0} * {1})",
    "sand.u32": "{0} & {1}",
    "sor.u32": "{0} | {1}",
    "sxor.u32": "{0} ^ {1}",
    "sshll.u32": "wrap({0} << {1})",
    "sshra.s32": "{0} >> {1}",
    "sshrl.u32": "({0} & 0xFFFFFFFF) >> {1}",
    "smin.s32": "least({0}, {1})",
    "smax.s32": "largest({0}, {1})",
    "smin.u32": "wrap(least({0} & 0xFFFFFFFF, {1} & 0xFFFFFFFF))",
    "smax.u32": "wrap(largest({0} & 0xFFFFFFFF, {1} & 0xFFFFFFFF))",
    "scalar_select": "select({0}, {1}, {2})",
    "por": "{0} | {1}",
    "pand": "{0} & {1}",
    "pxor": "{0} ^ {1}",
    "pnand": "({0} & {1}) ^ True",
    "pnor": "({0} | {1}) ^ True",
    "pneg": "{0} ^ True",
}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
NAME = re.compile(r"\b(?:[sp]\d+_[sp]\d+|[sp]\d+|r_[sp]\d+)\b")


class Unknown:
    """A scalar that hangs on what is not known; so does whatever is computed from it."""

    asked = 0  # conditions that were decided without knowing them

    def _unknown(self, *others: Any) -> Unknown:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _unknown
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _unknown
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _unknown
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _unknown
    __hash__ = None

    def __bool__(self) -> bool:
        self.asked += 1
        return True


def wrap(value: Any) -> Any:
    """The signed number that 32 bits keep."""
    return ((value + 0x80000000) & 0xFFFFFFFF) - 0x80000000


@dataclasses.dataclass
class Counts:
    """A run of a kernel on one core.

    Attributes:
        runs: how often each block of bundles ran, by (first bundle, one past the last).
        cycles: bundles that ran.
        waits: cycles in which the core waits for transfers that share the memory's bandwidth;
            an estimate.
        read, written: bytes that transfers bring and take.
        near: those of them that stay on the chip, between vector memory and a v4's common memory.
        transfers: their number.
        guesses: conditions that were not known. They were taken as true, and branches on them as
            not taken.
        unknown: instructions that were not understood, which made their results unknown.
    """

    runs: dict[tuple[int, int], int]
    cycles: int = 0
    waits: float = 0.0
    read: int = 0
    written: int = 0
    near: int = 0
    transfers: int = 0
    guesses: int = 0
    unknown: Counter = dataclasses.field(default_factory=Counter)


def run(
    listing: Listing,
    chip: TpuChip,
    scalars: Mapping[int, np.ndarray] = {},
    core: int = 0,
    sharing: int = 1,
) -> Counts:
    """Runs the scalar instructions of a kernel.

    Args:
        scalars: values of operands that are in scalar memory, by their index. What a kernel reads
            of others is unknown.
        core: which of the chip's cores runs.
        sharing: number of cores that share the memory's bandwidth.

    Raises:
        RuntimeError: the program does not come to an end.
    """
    machine = _Machine(chip, scalars, core, sharing)
    blocks = _blocks(listing)
    starts = sorted(blocks)
    names = {"machine": machine, "wrap": wrap, "select": _select, "UNKNOWN": machine.unknown}
    names |= {"least": _least, "largest": _largest}
    translator = _Translator(listing, machine)
    ends = [*starts[1:], len(listing.bundles)]
    for index, (start, end) in enumerate(zip(starts, ends)):
        exec(translator.function(start, end, blocks[start], starts, index), names)
    for name in translator.names:  # what a condition forbids to define
        names.setdefault(name, machine.unknown)
    functions = [names[f"block_{start}"] for start in starts]
    lengths = [end - start for start, end in zip(starts, ends)]
    runs, block, steps = [0] * len(starts), 0, 0
    while block < len(functions):
        runs[block] += 1
        block_now, block = block, functions[block]()
        machine.now += lengths[block_now]
        steps += 1
        if steps > MOST:
            raise RuntimeError(f"{listing.name}: no end after {machine.now} cycles")
    counts = machine.counts
    counts.runs = {(start, end): n for start, end, n in zip(starts, ends, runs)}
    counts.cycles = sum(n * (end - start) for (start, end), n in counts.runs.items())
    counts.guesses, counts.unknown = machine.unknown.asked, translator.not_understood
    return counts


def _select(condition: Any, one: Any, other: Any) -> Any:
    if isinstance(condition, Unknown):
        return condition
    return one if condition else other


def _least(one: Any, other: Any) -> Any:
    return _select(one < other, one, other)


def _largest(one: Any, other: Any) -> Any:
    return _select(one > other, one, other)


def _blocks(listing: Listing) -> dict[int, tuple[int, Instruction] | None]:
    """Start of each block of bundles that run together: where its branch is, and what it is."""
    starts, branches = {0}, []
    for at, bundle in enumerate(listing.bundles):
        for instruction in bundle:
            if instruction.target is not None:
                branches.append((at, instruction))
                starts |= {instruction.target, at + DELAY}
    blocks: dict[int, tuple[int, Instruction] | None] = dict.fromkeys(
        start for start in starts if start < len(listing.bundles)
    )
    for at, instruction in branches:
        blocks[max(start for start in blocks if start <= at)] = (at, instruction)
    return blocks


class _Machine:
    """Memory, transfers and time, on which scalar instructions act."""

    def __init__(self, chip: TpuChip, scalars, core: int, sharing: int) -> None:
        self.chip, self.core = chip, core
        self.bytes_a_cycle = chip.bandwidth / sharing / chip.clock
        self.unknown = Unknown()
        self.counts = Counts({})
        self.now = 0
        self.memory = ScalarMemory(self.unknown)
        self.operands = {index: words(array) for index, array in scalars.items()}
        self._free = 0.0  # when the memory has nothing left to transfer
        self._done: dict[Any, float] = {}

    def branch(self, condition: Any) -> bool:
        """Returns whether a branch is taken."""
        if isinstance(condition, Unknown):
            condition.asked += 1
            return False
        return condition

    def transfer(self, at: int, kind: str, source, size, destination, flag) -> None:
        """A DMA begins, `at` bundles from the start of the block."""
        if kind.endswith("_to_smem"):
            operand = self.operands.get(operand_index(source))
            if operand is not None:
                first = operand_offset(source) * self.chip.granule // 4
                length = size * self.chip.granule // 4
                self.memory.fill(destination, operand[first : first + length])
            return
        moved = size * self.chip.granule
        if isinstance(moved, Unknown):
            moved.asked += 1
            return
        self.counts.transfers += 1
        if kind.startswith("vmem_to"):
            self.counts.written += moved
        else:
            self.counts.read += moved
        if "cmem" in kind and "hbm" not in kind:
            self.counts.near += moved
        now = self.now + at + self.counts.waits
        self._free = max(self._free, now) + moved / self.bytes_a_cycle
        if not isinstance(flag, Unknown):
            self._done[flag] = self._free + LATENCY * self.chip.clock

    def wait(self, at: int, flag) -> None:
        """The core waits until the last transfer that sets a flag is done."""
        if not isinstance(flag, Unknown):
            now = self.now + at + self.counts.waits
            self.counts.waits += max(self._done.get(flag, 0.0) - now, 0.0)


class _Translator:
    """Writes the scalar instructions of a listing as Python."""

    def __init__(self, listing: Listing, machine: _Machine) -> None:
        self.bundles = listing.bundles
        self.machine = machine
        self.not_understood: Counter = Counter()
        self.names: set[str] = set()
        # Values that join in a loop's register are known by the register as well.
        self.joined: dict[str, str] = {}
        for bundle in listing.bundles:
            for instruction in bundle:
                if instruction.name in ("sphi", "pphi"):
                    register = "r_" + instruction.result.rpartition("_")[2]
                    for value in re.findall(r"%(\w+)", instruction.operands):
                        self.joined[value] = register

    def function(self, start: int, end: int, branch, starts: list[int], index: int) -> str:
        """A block of bundles, which returns the index of the one that follows."""
        lines: list[str] = []
        for at in range(start, end):
            for instruction in sorted(self.bundles[at], key=_order):
                lines += self.statements(instruction, at - start)
        if branch is None:
            lines.append(f"return {index + 1}")
        else:
            target = starts.index(branch[1].target) if branch[1].target in starts else len(starts)
            condition = "True"
            if branch[1].condition is not None:
                condition = self.condition(branch[1].condition)
            lines.append(f"return {target} if machine.branch({condition}) else {index + 1}")
        names = sorted(set(NAME.findall("\n".join(lines))))
        self.names.update(names)
        if names:
            lines.insert(0, "global " + ", ".join(names))
        return f"def block_{start}():\n" + "".join(f"    {line}\n" for line in lines)

    def condition(self, condition: tuple[str, bool]) -> str:
        name, negated = condition
        return f"({name} ^ True)" if negated else name

    def statements(self, instruction: Instruction, at: int) -> list[str]:
        """Python of one instruction; of one that is not scalar nothing."""
        name, result = instruction.name, instruction.result
        if name.startswith("dma."):
            return self.guarded(instruction, self.transfer(instruction, at))
        if name == "sst":
            address, value = re.match(r"\[smem:(.*)\]\s*,?\s*(\S+)$", instruction.operands).groups()
            store = f"machine.memory.store({self.address(address)}, {self.value(value)})"
            return self.guarded(instruction, store)
        if result is None or not re.fullmatch(r"[sp]\d+(_[sp]\d+)?", result):
            return []
        expression = self.expression(name, instruction.operands, result)
        if instruction.otherwise is not None:
            condition, otherwise = instruction.condition, self.value(instruction.otherwise)
            expression = f"select({self.condition(condition)}, {expression}, {otherwise})"
            return [self.definition(result, expression)]
        return self.guarded(instruction, self.definition(result, expression))

    def definition(self, result: str, expression: str) -> str:
        register = self.joined.get(result)
        return f"{register} = {result} = {expression}" if register else f"{result} = {expression}"

    def guarded(self, instruction: Instruction, statement: str) -> list[str]:
        if instruction.condition is None or not statement:
            return [statement] if statement else []
        return [f"if {self.condition(instruction.condition)}: {statement}"]

    def transfer(self, instruction: Instruction, at: int) -> str:
        parts = _split(instruction.operands)
        if instruction.name == "dma.done.wait":
            return f"machine.wait({at}, {self.value(parts[0])})"
        values = ", ".join(self.value(part) for part in parts[:4])
        return f"machine.transfer({at}, {instruction.name[4:]!r}, {values})"

    def expression(self, name: str, operands: str, result: str) -> str:
        """The value that an instruction defines."""
        if name in ("sphi", "pphi"):
            return "r_" + result.rpartition("_")[2]
        if name.startswith("inlined_call_operand"):
            return self.operand(operands)
        if name == "sld":
            address = re.match(r"\[smem:(.*)\]", operands).group(1)
            if address == "core":
                return str(self.machine.core)
            return f"machine.memory.load({self.address(address)})"
        values = [self.value(part) for part in _split(operands)]
        if name.startswith("scalar_lea."):
            return f"wrap({values[0]} + {values[1]})"
        if name.startswith("int_to_ptr."):
            return values[0]
        if name.startswith("scmp."):
            _, comparison, kind, *_ = name.split(".")
            if kind == "u32":
                values = [f"({value} & 0xFFFFFFFF)" for value in values]
            return f"{values[0]} {COMPARISONS[comparison]} {values[1]}"
        if name in OPERATIONS:
            return OPERATIONS[name].format(*values)
        self.not_understood[name] += 1
        return "UNKNOWN"

    def operand(self, description: str) -> str:
        """The address of an operand, or of a single number its value."""
        index = int(re.search(r"index: (-?\d+)", description).group(1))
        if index < 0:  # an argument that the compiler has added
            return "UNKNOWN"
        if "<no memory space>" not in description:
            return str(operand_pointer(index))
        known = self.machine.operands.get(index)
        return "UNKNOWN" if known is None else str(known[0])

    def value(self, text: str) -> str:
        """An operand: a number, a value's name or an address."""
        text = text.strip()
        if name := re.match(r"%(\w+)", text):
            return name.group(1)
        if text.startswith("["):
            return self.address(text)
        try:
            return str(wrap(int(text, 0)))
        except ValueError:
            return "UNKNOWN"

    def address(self, text: str) -> str:
        """`[#allocation4 + %s260_s13]`, `[%s12_s1 + $0x1]` and the like."""
        terms = []
        for term in text.strip().strip("[]").split("+"):
            term = term.strip()
            if term.startswith("#allocation"):
                terms.append(str(self.machine.memory.base(term[1:])))
            elif term.startswith("$"):
                terms.append(str(int(term[1:], 0)))
            else:
                terms.append(self.value(term))
        return " + ".join(terms) or "UNKNOWN"


def _order(instruction: Instruction) -> int:
    """Within a bundle: what joins, then what computes, then what only names."""
    if instruction.name in ("sphi", "pphi"):
        return 0
    return 2 if instruction.name.startswith("int_to_ptr") else 1


def _split(operands: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^\[]*\])", operands)] if operands else []
