"""Reading what the TPU compiler writes of a kernel: its bundles, of which one starts a cycle."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path

from pallas_kernels.chips import TpuChip

# Units of a core, as the compiler's lists of used issue slots call them. FILL and SPILL are the
# loads and stores of registers that did not suffice, part of VLD and VST.
UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLD", "FILL", "VST", "SPILL", "SALU")

BUNDLE = re.compile(r"^(?=[ ]*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2}\s*)?:)", flags=re.MULTILINE)
COMMENT = re.compile(r"/\*.*?\*/", flags=re.DOTALL)
INSTRUCTION = re.compile(
    r"""\s*(?:%(?P<result>\w+)\s*=\s*)?
    (?P<name>[a-z][\w.]*)\s*
    (?:\[(?:thread|resolvable):[^\]]*\]\s*)?
    (?:\((?P<negated>!?)%(?P<condition>\w+)(?:,\s*(?P<otherwise>[^)]+))?\),?)?\s*
    (?P<operands>.*)""",
    flags=re.VERBOSE | re.DOTALL,
)
TARGET = re.compile(r"target bundleno = (\d+)")
LATE_CONDITION = re.compile(r"\s*\((!?)%(\w+)\)(,|$)")
CORE = re.compile(r"\[smem:\[#\w+\]\] /\* core id \*/")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: what it does, as `sadd.s32`.
        result: what it defines, as `s39_s29`: a value and the register that holds it.
        operands: as text.
        condition: the predicate under which alone it is done, and whether it is negated.
        otherwise: what the result is where it is not done.
    """

    name: str
    result: str | None
    operands: str
    condition: tuple[str, bool] | None = None
    otherwise: str | None = None

    @property
    def target(self) -> int | None:
        """The bundle that a branch goes to."""
        found = TARGET.search(self.operands) if self.name.startswith("sbr") else None
        return int(found.group(1)) if found else None


@dataclasses.dataclass(frozen=True)
class Listing:
    """A kernel as it was scheduled.

    Attributes:
        name: of the instruction of the program (HLO) that it serves.
        bundles: instructions that start in each cycle of a straight pass; many are empty.
        slots: issue slots of each unit that a bundle takes.
        capacity: issue slots of each unit that there are.
        operands: element type and shape of each operand and result, as "bf16[8,4096,128]".
        vmem: bytes of vector memory that it takes, windows and spilled registers included.
    """

    name: str
    bundles: list[list[Instruction]]
    slots: list[dict[str, int]]
    capacity: dict[str, int]
    operands: dict[int, str]
    vmem: int = 0


def read_listing(stem: Path) -> Listing:
    """The kernel whose dumped files begin with `stem`."""
    text = _find(stem, "packed-bundles-post-ra")
    bundles = [[*_instructions(bundle)] for bundle in BUNDLE.split(text)[1:]]
    rows = re.findall(r"^[\d ]+$", _find(stem, "pre-delay_hlo-static-per-bundle-utilization"), re.M)
    capacity, *slots = (dict(zip(UNITS, map(int, row.split()))) for row in rows)
    operands = {
        int(index): shape
        for shape, index in re.findall(
            r"inlined_call_operand\.(?:\w+|<[^>]*>) \[shape: (\S+), index: (\d+)", text
        )
    }
    allocations = re.findall(
        r"space=vmem, size = (\w+), offset = (\w+), scoped", _find(stem, "post-delay-converter")
    )
    vmem = max((int(size, 0) + int(offset, 0) for size, offset in allocations), default=0)
    return Listing(_name(stem.name), bundles, slots, capacity, operands, vmem)


def read_listings(folder: Path, names: Container[str] | None = None) -> Iterator[Listing]:
    """The kernels of a folder of dumps, in the order of their compilation.

    One after another, as those of a training step take gigabytes.

    Args:
        names: of those that are read; None: all.
    """
    files = sorted(path.name for path in folder.glob("*-packed-bundles-post-ra.txt"))
    found = (re.match(r"(.*)-\d+-packed-bundles-post-ra\.txt$", name) for name in files)
    stems = [match.group(1) for match in found if match]
    for stem in stems:
        if "<late-" not in stem and (names is None or _name(stem) in names):
            yield read_listing(folder / stem)


def _name(stem: str) -> str:
    """Name of the instruction whose dumped files begin so."""
    return re.sub(r"^\d+-", "", stem)


def equal_kernels(folder: Path) -> dict[str, str]:
    """Names of instructions whose kernels were not compiled, with the one that equals theirs."""
    found: dict[str, str] = {}
    for path in folder.glob("*deduplication-map.txt"):
        text = path.read_text("utf-8")
        for one, others in re.findall(r"key:(\S+)\n(?:[^ ].*\n)*((?:  \S+\n)*)", text):
            found |= dict.fromkeys(others.split(), one)
    return found


def _find(stem: Path, kind: str) -> str:
    """Text of the file of a kind."""
    name = re.compile(re.escape(stem.name) + r"-\d+-" + re.escape(kind) + r"\.txt")
    for path in stem.parent.iterdir():
        if name.fullmatch(path.name):
            return path.read_text("utf-8", errors="replace")
    return ""


def _instructions(bundle: str):
    # Only a comment tells the number of the core from what else the runtime keeps in memory.
    text = CORE.sub("[smem:core]", bundle[bundle.find("{") + 1 :])
    text = COMMENT.sub("", text).rstrip().removesuffix("}")
    for part in text.split(";;"):
        if not (match := INSTRUCTION.match(part)):
            continue
        operands, condition = match["operands"].strip(), match["condition"]
        negated = bool(match["negated"])
        if condition is None and (late := LATE_CONDITION.search(operands)):
            negated, condition = bool(late.group(1)), late.group(2)
            operands = operands[: late.start()] + late.group(3) + operands[late.end() :]
        yield Instruction(
            match["name"],
            match["result"],
            operands,
            None if condition is None else (condition, negated),
            match["otherwise"],
        )


@dataclasses.dataclass
class Use:
    """The work of some bundles.

    Attributes:
        bundles, empty: their number, and how many of them start nothing.
        slots: issue slots taken, by unit.
        held: cycles that each matrix and cross-lane unit is taken.
        rows: left rows that are sent through matrix units.
        names: of the instructions.
    """

    bundles: int = 0
    empty: int = 0
    slots: Counter = dataclasses.field(default_factory=Counter)
    held: Counter = dataclasses.field(default_factory=Counter)
    rows: int = 0
    names: Counter = dataclasses.field(default_factory=Counter)

    def add(self, other: Use, times: int = 1) -> None:
        """Adds what others do, so many times."""
        self.bundles += times * other.bundles
        self.empty += times * other.empty
        self.rows += times * other.rows
        for mine, theirs in (
            (self.slots, other.slots),
            (self.held, other.held),
            (self.names, other.names),
        ):
            for key, number in theirs.items():
                mine[key] += times * number

    def shares(self, chip: TpuChip, capacity: dict[str, int]) -> dict[str, float]:
        """Share of the cycles in which a unit is taken, of several alike the busiest one."""
        cycles = max(self.bundles, 1)
        shares = {
            unit: self.slots[unit] / (capacity[unit] * cycles)
            for unit in ("VALU", "VPOP", "VLD", "VST", "SALU")
            if unit in capacity
        }
        shares["EUP"] = self.slots["EUP"] * chip.transcendental / cycles
        for unit in ("MXU", "XLU"):
            held = [n for name, n in self.held.items() if name[:3].upper() == unit]
            shares[unit] = max(held, default=0) / cycles
        return shares


def use_of(listing: Listing, first: int, end: int, chip: TpuChip) -> Use:
    """The work of the bundles from `first` to before `end`."""
    use = Use()
    for bundle, slots in zip(listing.bundles[first:end], listing.slots[first:end]):
        use.bundles += 1
        use.empty += not bundle
        use.slots.update(slots)
        for instruction in bundle:
            use.names[re.sub(r"\.(mxu|xlu)\d", "", instruction.name)] += 1
            unit, cycles, rows = _held(instruction.name, chip)
            if unit:
                use.held[unit] += cycles
                use.rows += rows
    return use


def _held(name: str, chip: TpuChip) -> tuple[str | None, int, int]:
    """Unit that an instruction keeps, for how many cycles, and its left rows.

    Right sides of products are loaded beside the products and keep nothing.
    """
    unit = re.search(r"\b(mxu|xlu)\d", name)
    if not unit or name.startswith(("vpop", "vmatprep", "vmatpush")):
        return None, 0, 0
    bits = 16 if re.search(r"\.(b?f?16|[su]8|f8\w*)\b", name) else 32
    if name.startswith("vmatmul"):
        return unit.group(), chip.matmul[bits], 256 // bits
    return unit.group(), chip.crosslane[bits], 0
