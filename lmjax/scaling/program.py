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
CONTROL = "while", "conditional", "call"  # of which others are run one instruction after another
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
        stage of a pipeline takes the branch of its work.
      inner: part of its turns in which a branch inside of such a branch is taken, as the loss is
        made by the last of all parts alone.
    """

    text: str
    taken: float = 1.0
    inner: float = 1.0

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
                if line.operation == "conditional" and loops:
                    share = self.inner if in_branch else self.taken
                    more = round(times * share), loops, True
                for inner in called(line):
                    if inner in self.computations:
                        visit(inner, *more)

        visit(self.entry, 1, 0, False)
        return {name: tuple(numbers) for name, numbers in found.items()}

    @functools.cached_property
    def sequences(self) -> dict[str, int]:
        """Times that each computation runs whose instructions run one after another.

        Those inside of fusions, reductions and the like are no instructions of their own.
        """
        found: dict[str, int] = {}
        pending = [self.entry]
        while pending:
            name = pending.pop()
            found[name] = self.runs[name][0]
            for line in self.computations[name]:
                if line.operation in CONTROL:
                    pending += [inner for inner in called(line) if inner not in found]
        return found

    @functools.cached_property
    def begun(self) -> list[tuple[ProgramCollective, HloInstruction]]:
        """All collectives, and where each is written; the first place of one that is cut."""
        found = []
        for name, times in self.sequences.items():
            seen = set()
            for line in self.computations[name]:
                one = None if line.operation in CONTROL else self.collective(line)
                if one is not None and chain(one[1]) not in seen:
                    seen.add(chain(one[1]))
                    loops = self.runs[name][1]
                    found.append((dataclasses.replace(one[0], times=times, loops=loops), one[1]))
        return found

    @property
    def collectives(self) -> list[ProgramCollective]:
        """All collectives; one that is cut into several instructions counts once."""
        return [one for one, _ in self.begun]

    def inside(self, line: HloInstruction) -> Iterator[tuple[str, HloInstruction]]:
        """An instruction and those that it is made of, with the names of their computations."""
        yield "", line
        if line.operation in CONTROL:
            return
        for name in called(line):
            for one in self.computations.get(name, ()):
                for found, inner in self.inside(one):
                    yield found or name, inner

    def collective(self, line: HloInstruction) -> tuple[ProgramCollective, HloInstruction] | None:
        """The collective that an instruction runs or begins, once, and where it is written.

        None: it has none.
        """
        for name, inner in self.inside(line):
            if (found := _collective(name, inner)) is not None:
                return found, inner
        return None

    @functools.cached_property
    def copies(self) -> list[tuple[int, int]]:
        """Bytes of each array that is copied in the device's memory, and times that it is.

        Copies to the memory of the cores, which a TPU's programs mark by S(1), do not count.
        """
        return [
            (sum(array_bytes(*found) for found in ARRAY.findall(line.result)), times)
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
            for line in self.computations[name]:
                if flops := self.product(name, line):
                    yield times, flops

    def flops_of(self, line: HloInstruction) -> float:
        """FLOPs of the products in an instruction."""
        return sum(self.product(name, inner) for name, inner in self.inside(line))

    def product(self, name: str, line: HloInstruction) -> float:
        """FLOPs of an instruction of a computation that is a product, or tells of some; else 0."""
        if line.operation in ("dot", "convolution"):
            types = self._types(name)
            return (_dot if line.operation == "dot" else _convolution)(line, types)
        match = re.search(r'cost_estimate.*?"?flops"?:\s*"?(\d+)', line.rest)
        return float(match[1]) if match else 0.0

    def product_bytes(self, line: HloInstruction) -> int:
        """Bytes in the device's memory of what products of an instruction take and give."""
        total = 0
        for name, inner in self.inside(line):
            if name and inner.operation in ("dot", "convolution"):
                types = self._types(name)
                names = re.findall(r"%([\w.\-]+)", inner.rest.partition(")")[0])
                arrays = [inner.result, *(types.get(one, "") for one in names)]
                total += sum(
                    array_bytes(*found)
                    for text in arrays
                    if "S(" not in text
                    for found in ARRAY.findall(text)
                )
        return total

    def _types(self, name: str) -> dict[str, str]:
        """Types of the results in a computation."""
        if name not in self._typed:
            self._typed[name] = {line.name: line.result for line in self.computations[name]}
        return self._typed[name]

    @functools.cached_property
    def _typed(self) -> dict[str, dict[str, str]]:
        return {}

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


def _collective(name: str, line: HloInstruction) -> ProgramCollective | None:
    """The collective that a line of a computation is, if it joins several devices."""
    kind = line.operation.removesuffix("-start")
    if not re.fullmatch(KINDS, kind):
        return None
    size, devices = _size(line, kind), _devices(line.rest)
    if "all-reduce-scatter" in name and kind == "all-reduce":
        kind, size = "reduce-scatter", size // devices
    return ProgramCollective(kind, size, devices, times=1, loops=0) if devices > 1 else None


def chain(line: HloInstruction) -> str:
    """Name that all instructions share into which a TPU's collective is cut; else its own.

    Channels do not tell them apart: all collectives of `jax.shard_map` share one.
    """
    found = re.search(r'chain_id="(\d+)"', line.rest)
    return f"chain {found[1]}" if found else line.name


def called(line: HloInstruction) -> list[str]:
    """Names of the computations that an instruction calls."""
    names = CALLED.findall(line.rest)
    if match := BRANCHES.search(line.rest):
        names += [name.strip().lstrip("%") for name in match[1].split(",")]
    return names


def _shape(text: str) -> tuple[int, ...]:
    """Shape of the first array of a type."""
    match = ARRAY.search(text)
    return tuple(map(int, match[2].split(","))) if match and match[2] else ()


def array_bytes(kind: str, sizes: str) -> int:
    """Bytes of an array of a type and sizes as text."""
    bits = int(BITS.search(kind)[0]) if BITS.search(kind) else 8
    shape = map(int, sizes.split(",")) if sizes else ()
    return math.prod(shape) * bits // 8


def _size(line: HloInstruction, kind: str) -> int:
    """Bytes of the results; an asynchronous collective gives its operands as well."""
    arrays = [array_bytes(*found) for found in ARRAY.findall(line.result)]
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
