"""Cycles of attention on TPUs that are not here: lmjax beside jax's library attention (splash).

python -m benchmarks.kernel_cost [chips='("v5e",)'] [masks='("causal","packed")'] [json=FILE]

libtpu compiles both for described chips; `pallas_kernels.schedules` counts the bundles that a call
runs, forward and backward. Splash runs at the best of a few block sizes, chosen in the same run for
each chip and mask. What has been compiled is kept in the cache folder, by a fingerprint of the
sources.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Worker, table, write
from benchmarks.kernel_cost_cases import TILE, AttentionCase
from benchmarks.kernel_cost_chart import draw
from lmjax.config import UserError, config
from lmjax.files import usual_cache, write_atomically
from lmjax.launch import exit_on_user_error, from_command_line
from pallas_kernels.chips import CHIPS

MASKS = ("causal", "full", "window", "packed", "prefix", "blanks")
# Queries, keys and keys a step of splash; smaller ones were slower, causal or with a window.
BLOCKS = ((512, 512, 512), (512, 1024, 512), (1024, 1024, 512))
FUSED_BLOCKS = ((512, 512, 512), (1024, 1024, 512))
RAGGED = ((64, 8),)  # pages and queries a block of jax's ragged paged attention
PASSES = ("forward", "backward")
WORKER = "benchmarks.kernel_cost_cases"
# Backward, "fused" is one kernel, which leaves parts of the queries' gradient to be summed.
SIDES = ("ours", "splash", "fused")
TRIES = {
    "ours": [{}],
    "splash": [{"blocks": blocks} for blocks in BLOCKS],
    "fused": [{"blocks": blocks, "fused": True} for blocks in FUSED_BLOCKS],
}


@config
class KernelCost:
    """One row of a batch in bfloat16; heads of 128 for every mask, others for the causal one."""

    chips: tuple[str, ...] = tuple(CHIPS)  # for which to compile
    masks: tuple[str, ...] = MASKS  # packed: 8 documents; window: 1,024 keys
    head_dims: tuple[int, ...] = (64, 256)  # more widths of a head, under a causal mask
    groups: tuple[int, ...] = (8,)  # query heads that share a key head, under a causal mask
    batches: tuple[int, ...] = (1, 32)  # rows of decode attention over 4,096 tokens in pages of 16
    length: int = 4096  # queries and keys
    heads: int = 8  # of the queries
    sides: tuple[str, ...] = SIDES  # whose attention
    json: str = ""  # file for the results; a chart is put beside it

    def validate(self) -> None:
        """Raises UserError for what there is not."""
        for name, given, known in (
            ("chips", self.chips, CHIPS),
            ("masks", self.masks, MASKS),
            ("sides", self.sides, SIDES),
        ):
            if unknown := [one for one in given if one not in known]:
                raise UserError(f"{name}: {unknown[0]!r} is not one of {', '.join(known)}")
        if self.length % max(BLOCKS)[0]:
            raise UserError(f"length={self.length} is no multiple of {max(BLOCKS)[0]}")

    def cases(self) -> Iterator[AttentionCase]:
        """The cases that are compiled for every chip."""
        usual = {"length": self.length, "heads": self.heads, "kv_heads": self.heads}
        for mask in self.masks:
            yield AttentionCase(mask, **usual)
        for head_dim in self.head_dims if "causal" in self.masks else ():
            yield AttentionCase("causal", **usual, head_dim=head_dim)
        for group in self.groups if "causal" in self.masks else ():
            yield AttentionCase("causal", **usual | {"kv_heads": self.heads // group})


def main() -> None:
    """Compiles and prints; what is done is written after each case."""
    settings = from_command_line(KernelCost())
    records: list[dict[str, Any]] = []
    decode: list[dict[str, Any]] = []
    for case, chip in itertools.product(settings.cases(), settings.chips):
        records += measured(chip, dict(vars(case)), settings.sides)
        keep(settings.json, records, decode)
    for batch, chip in itertools.product(settings.batches, settings.chips):
        decode += decoded(chip, batch, settings.sides)
        keep(settings.json, records, decode)
    if not records and not decode:
        raise UserError("nothing could be compiled; the reasons are above")
    print("\n" + shown(records))
    columns = ["chip", "batch", "side", "us", "of_memory", "moved_of_cache", "spills", "guesses"]
    print("\n" + table(columns, [[record[name] for name in columns] for record in decode]))
    if settings.json:
        draw(records, Path(settings.json).with_suffix(".png"))


def keep(path: str, records: list[dict[str, Any]], decode: list[dict[str, Any]]) -> None:
    """Writes what has been found."""
    if path:
        write(path, "kernel_cost", attention=records, decode=decode)


def measured(chip: str, case: dict[str, Any], sides: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """A record for each side and pass, splash at its best blocks for each."""
    problem = AttentionCase(**case)
    tries = [(side, chosen) for side in sides for chosen in TRIES[side]]
    results = compiled(chip, case, "cost", [chosen for _, chosen in tries])
    found = [(side, chosen, result) for (side, chosen), result in zip(tries, results)]
    for side, chosen, result in found:
        if "error" in result:
            print(f"{chip} {case} {side} {chosen}: {result['error']}", file=sys.stderr)
    for side in sides:
        passes = [
            summed(which, chosen, result)
            for of, chosen, result in found
            if of == side and "error" not in result
            for which in PASSES
            if any(kernel["pass"] == which for kernel in result["kernels"])
        ]
        for which in PASSES if side != "fused" else ("backward",):
            mine = [one for one in passes if one["pass"] == which]
            if mine:
                best = min(mine, key=_cycles)
                yield {"chip": chip, **case, "side": side} | best | derived(problem, chip, best)


def decoded(chip: str, batch: int, sides: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """A record of decode attention for each side."""
    choices = {"ours": [{}], "splash": [{"blocks": blocks} for blocks in RAGGED]}
    for side in (side for side in choices if side in sides):
        tries = compiled(chip, {"batch": batch}, "decode_cost", choices[side])
        for error in (one["error"] for one in tries if "error" in one):
            print(f"{chip} batch {batch} {side}: {error}", file=sys.stderr)
        if found := [one for one in tries if "error" not in one]:
            name = "ours" if side == "ours" else "ragged paged"
            yield {"chip": chip, "batch": batch, "side": name} | min(found, key=_cycles)


def _cycles(record: dict[str, Any]) -> float:
    return record["cycles"]


def summed(which: str, chosen: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The kernels of a pass together."""
    mine = [kernel for kernel in result["kernels"] if kernel["pass"] == which]
    total = {
        name: sum(kernel[name] for kernel in mine)
        for name in ("cycles", "us", "us_with_waits", "spills", "moved", "rows", "guesses")
    }
    return {
        "pass": which,
        **chosen,
        **total,
        "vmem": max((kernel["vmem"] for kernel in mine), default=0),
        "busiest": "; ".join(kernel["busiest"] for kernel in mine),
        "kernels": [kernel["name"] for kernel in mine],
        "around_us": result["around_us"],  # of both passes
    }


def derived(problem: AttentionCase, chip: str, best: dict[str, Any]) -> dict[str, float]:
    """Cycles a tile, and what was visited and moved of what had to be.

    The products of a tile send a number of rows through the matrix units, so the rows tell how many
    tiles were computed: two products forward, and backward five in one kernel or seven in two.
    """
    cores, side = CHIPS[chip].cores, CHIPS[chip].side
    one_kernel = len(best["kernels"]) == 1 or best.get("fused", False)
    products = 2 if best["pass"] == "forward" else 5 if one_kernel else 7
    rows = TILE * (TILE / side) * -(-problem.head_dim // side)
    return {
        # Of one core; all of a chip's work on the call.
        "cycles_a_tile": best["cycles"] * cores / problem.tiles,
        "tiles": problem.tiles,
        "tiles_visited": best["rows"] / (products * rows),
        "tiles_not_empty": problem.tiles_not_empty(TILE, TILE),
        "moved_of_least": best["moved"] / problem.least_bytes[best["pass"]],
    }


def compiled(
    chip: str, case: dict[str, Any], what: str, choices: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The numbers that a worker's function finds for each choice, or found before."""
    results = []
    with contextlib.ExitStack() as stack:
        # A process for each chip: what jax has traced for one it would not trace for another.
        worker = functools.cache(lambda: stack.enter_context(Worker(WORKER)))
        for chosen in choices:
            request = {"chip": chip, "case": case, **chosen}
            name = [what, request, fingerprint(bool(chosen))]
            key = hashlib.sha256(json.dumps(name).encode()).hexdigest()
            path = usual_cache() / "kernel_cost" / f"{key[:24]}.json"
            if not path.is_file():
                print(f"{chip} {case} {chosen or 'ours'}", file=sys.stderr)
                result = worker().ask(what, **request)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(result))
            results.append(json.loads(path.read_text("utf-8")))
    return results


def fingerprint(of_library: bool) -> list[str]:
    """Of the sources and versions that a result depends on."""
    folder = ROOT / "pallas_kernels"
    sources = [*(folder / "schedules").glob("*.py"), ROOT / "benchmarks" / "kernel_cost_cases.py"]
    if not of_library:
        sources += [*folder.rglob("*.py"), *folder.rglob("*.json")]
    versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
    return versions + [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(set(sources))
    ]


def shown(records: list[dict[str, Any]]) -> str:
    """The table: a line for each chip, case and pass."""
    columns = [
        *("chip", "mask", "d", "group", "pass", "cycles a tile", "us", "of splash", "of fused"),
        *(
            "visited",
            "moved",
            "spills",
            "VMEM MB",
            "busiest",
            "splash: a tile",
            "us",
            "blocks",
            "visited",
        ),
    ]
    rows = []
    for (chip, mask, head_dim, group, which), sides in paired(records).items():
        row = [chip, mask, head_dim, group, which]
        one, other = sides.get("ours"), sides.get("splash")
        row += (
            ["-"] * 9
            if one is None
            else [
                *(one["cycles_a_tile"], one["us"]),
                *(ratio(one, sides.get(side)) for side in ("splash", "fused")),
                *(
                    one["tiles_visited"] / one["tiles_not_empty"],
                    one["moved_of_least"],
                    one["spills"],
                ),
                *(one["vmem"] / 2**20, one["busiest"]),
            ]
        )
        row += (
            ["-"] * 4
            if other is None
            else [
                *(other["cycles_a_tile"], other["us"], "/".join(map(str, other["blocks"]))),
                other["tiles_visited"] / other["tiles_not_empty"],
            ]
        )
        rows.append(row)
    return table(columns, rows)


def ratio(one: dict[str, Any], other: dict[str, Any] | None) -> float | str:
    """Cycles of a call in those of another."""
    return one["cycles"] / other["cycles"] if other else "-"


def paired(records: list[dict[str, Any]]) -> dict[tuple, dict[str, dict[str, Any]]]:
    """Records by chip, mask, width of a head, group and pass, then by side."""
    found: dict[tuple, dict[str, dict[str, Any]]] = {}
    for one in records:
        key = (one["chip"], one["mask"], one["head_dim"], one["heads"] // one["kv_heads"])
        found.setdefault((*key, one["pass"]), {})[one["side"]] = one
    return found


if __name__ == "__main__":
    with exit_on_user_error():
        main()
