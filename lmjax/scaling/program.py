"""A compiled program read from its optimised HLO: collectives, products, and how often they run.

A loop's body stands in the text once; here everything in it counts as often as the loop turns.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|ragged-all-to-all"
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
CALLED = re.compile(
    r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)"
)
BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")
BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class ProgramCollective:
    """One collective of a program.

    Attributes:
      kind: of it; a fusion of a sum and a slice of it is a reduce-scatter.
      bytes: of its results on a device, each time.
      devices: that take part together.
      times: that it runs in the program.
      loops: that it is inside of.
    """

    kind: str
    bytes: int
    devices: int
    times: int
    loops: int

    @property
    def sent(self) -> float:
        """Bytes that leave a device in the whole program, by rings."""
        part = (self.devices - 1) / self.devices
        whole = self.bytes * self.times
        if self.kind == "collective-permute":
            return float(whole)
        if self.kind == "reduce-scatter":
            return whole * self.devices * part
        return whole * part * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class HloInstruction:
    """A line of a program.

    Attributes:
      name: of its result.
      result: type of it, as text.
      operation: its kind.
      rest: of the line, from the operands on.
    """

    name: str
    result: str
    operation: str
    rest: str


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A compiled program.

    Attributes:
      text: its optimised HLO.
      taken: part of the turns of a loop in which each of its conditional branches is taken, as a
        stage of a pipeline takes the branch of its work; branches inside of branches always are.
    """

    text: str
    taken: float = 1.0

    @functools.cached_property
    def computations(self) -> dict[str, list[HloInstruction]]:
        """Instructions of each computation."""
        found, lines = {}, None
        for line in self.text.splitlines():
            if not line.startswith(" ") and (head := COMPUTATION.match(line)):
                lines = found[head[2]] = []
            elif lines is not None and (match := INSTRUCTION.match(line)):
                lines.append(HloInstruction(*match.groups()))
        return found

    @functools.cached_property
    def entry(self) -> str:
        """Name of the computation that begins."""
        heads = (COMPUTATION.match(line) for line in self.text.splitlines() if line[:5] == "ENTRY")
        return next(head[2] for head in heads if head)

    @functools.cached_property
    def runs(self) -> dict[str, tuple[int, int]]:
        """Times that each computation runs, and the loops that it is inside of."""
        found: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])

        def visit(name: str, times: int, loops: int, in_branch: bool) -> None:
            found[name][0] += times
            found[name][1] = max(found[name][1], loops)
            for line in self.computations[name]:
                more = times, loops, in_branch
                if line.operation == "while":
                    more = times * self.trips(line), loops + 1, in_branch
                if line.operation == "conditional" and loops and not in_branch:
                    more = round(times * self.taken), loops, True
                for called in _called(line):
                    if called in self.computations:
                        visit(called, *more)

        visit(self.entry, 1, 0, False)
        return {name: tuple(numbers) for name, numbers in found.items()}

    @functools.cached_property
    def collectives(self) -> list[ProgramCollective]:
        """All collectives, in the order of the text."""
        found = []
        for name, (times, loops) in self.runs.items():
            for line in self.computations[name]:
                kind = line.operation.removesuffix("-start")
                if re.fullmatch(KINDS, kind):
                    size, devices = _size(line, kind), _devices(line.rest)
                    if "all-reduce-scatter" in name and kind == "all-reduce":
                        kind, size = "reduce-scatter", size // devices
                    if devices > 1:
                        found.append(ProgramCollective(kind, size, devices, times, loops))
        return found

    @functools.cached_property
    def copies(self) -> list[tuple[int, int]]:
        """Bytes of each array that is copied in the device's memory, and times that it is.

        Copies to the memory of the cores, which a TPU's programs mark by S(1), do not count.
        """
        return [
            (sum(_array_bytes(*found) for found in ARRAY.findall(line.result)), times)
            for name, (times, _) in self.runs.items()
            for line in self.computations[name]
            if line.operation == "copy" and "S(" not in line.result
        ]

    @functools.cached_property
    def flops(self) -> float:
        """FLOPs of products on a device, and of kernels that say how many they have."""
        return sum(times * flops for times, flops in self._products())

    def _products(self) -> Iterator[tuple[int, float]]:
        for name, (times, _) in self.runs.items():
            lines = self.computations[name]
            types = {line.name: line.result for line in lines}
            for line in lines:
                if line.operation == "dot":
                    yield times, _dot(line, types)
                elif line.operation == "convolution":
                    yield times, _convolution(line, types)
                elif match := re.search(r'cost_estimate.*?"?flops"?:\s*"?(\d+)', line.rest):
                    yield times, float(match[1])

    def trips(self, line: HloInstruction) -> int:
        """Turns of a loop: what the compiler says, or the number that its condition compares."""
        if match := TRIPS.search(line.rest):
            return int(match[1])
        condition = re.search(r"condition=%?([\w.\-]+)", line.rest)[1]
        lines = self.computations.get(condition, ())
        numbers = [
            int(match[1])
            for one in lines
            if one.operation == "constant" and (match := re.match(r"(\d+)\)", one.rest))
        ]
        return max(numbers, default=1)


def _called(line: HloInstruction) -> list[str]:
    names = CALLED.findall(line.rest)
    if match := BRANCHES.search(line.rest):
        names += [name.strip().lstrip("%") for name in match[1].split(",")]
    return names


def _shape(text: str) -> tuple[int, ...]:
    """Shape of the first array of a type."""
    match = ARRAY.search(text)
    return tuple(map(int, match[2].split(","))) if match and match[2] else ()


def _array_bytes(kind: str, sizes: str) -> int:
    bits = int(BITS.search(kind)[0]) if BITS.search(kind) else 8
    shape = map(int, sizes.split(",")) if sizes else ()
    return math.prod(shape) * bits // 8


def _size(line: HloInstruction, kind: str) -> int:
    """Bytes of the results; an asynchronous collective gives its operands as well."""
    arrays = [_array_bytes(*found) for found in ARRAY.findall(line.result)]
    if line.operation.endswith("-start") and kind != "all-reduce":
        arrays = arrays[1:2] if kind == "collective-permute" else arrays[len(arrays) // 2 :]
    return sum(arrays)


def _devices(rest: str) -> int:
    """Devices that take part in a collective together."""
    if "source_target_pairs" in rest:
        return max(2, len(re.findall(r"\{\d+,\d+\}", rest)))
    text = re.search(r"replica_groups=(\S.*)", rest)
    if text is None:
        return 1
    if match := re.match(r"\{\{([\d,]+)\}", text[1]):
        return match[1].count(",") + 1
    if match := re.match(r"\[\d+,(\d+)\]<=", text[1]):
        return int(match[1])
    if match := re.match(r"mesh\[(.*?)\].*? \{(.*?)\}", text[1]):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", match[2]))
    return 1


def _operands(line: HloInstruction, types: dict[str, str]) -> list[tuple[int, ...]]:
    """Shapes of the operands, which are written with their types or without."""
    inside = line.rest.partition(")")[0]
    names = re.findall(r"%([\w.\-]+)", inside) or re.findall(r"([\w.\-]+)", inside)
    written = ARRAY.findall(inside)
    if written:
        return [tuple(map(int, sizes.split(","))) if sizes else () for _, sizes in written]
    return [_shape(types.get(name, "")) for name in names]


def _dot(line: HloInstruction, types: dict[str, str]) -> float:
    left, *_ = _operands(line, types)
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
    summed = [left[int(axis)] for axis in axes[1].split(",") if axis] if axes else []
    return 2.0 * math.prod(_shape(line.result)) * math.prod(summed)


def _convolution(line: HloInstruction, types: dict[str, str]) -> float:
    """FLOPs of a convolution, which a TPU makes products of: only pairs that meet count."""
    left, right = _operands(line, types)[:2]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest).groups()
    out = _shape(line.result)
    batch, feature = (out[labels[2].index(name)] for name in "bf")
    inner = right[labels[1].index("i")]
    window = _window(line.rest)
    total = 2.0 * batch * feature * inner
    for number, name in enumerate(sorted(set(labels[0]) - set("bf"))):
        size = left[labels[0].index(name)]
        kernel = right[labels[1].index(name)]
        results = out[labels[2].index(name)]
        total *= _pairs(size, kernel, results, {key: v[number] for key, v in window.items()})
    groups = re.search(r"batch_group_count=(\d+)", line.rest)
    return total / (int(groups[1]) if groups else 1)


def _window(rest: str) -> dict[str, list[int]]:
    """Stride, low padding and dilations of each dimension of a window."""
    text = re.search(r"window=\{(.*?)\}", rest)
    found = dict(part.split("=") for part in text[1].split()) if text else {}
    sizes = found.get("size", "1").split("x")
    ones = "x".join(["1"] * len(sizes))
    pads = found.get("pad", "x".join(["0_0"] * len(sizes))).split("x")
    read = {
        "stride": found.get("stride", ones),
        "spread": found.get("lhs_dilate", ones),
        "step": found.get("rhs_dilate", ones),
    }
    numbers = {name: list(map(int, text.split("x"))) for name, text in read.items()}
    return numbers | {"pad": [int(pad.split("_")[0]) for pad in pads]}


def _pairs(size: int, kernel: int, results: int, window: dict[str, int]) -> int:
    """Pairs of a result and an element of the kernel that meet an element of the input."""
    stride, spread, step, pad = (window[name] for name in ("stride", "spread", "step", "pad"))
    count = 0
    for k in range(kernel):
        for result in range(results):
            at = result * stride - pad + k * step
            count += 0 <= at <= (size - 1) * spread and at % spread == 0
    return count
