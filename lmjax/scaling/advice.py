"""Settings that would make a plan fit into memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from lmjax.scaling.division import Division
from lmjax.scaling.plan import StepPlan

MOST = 3  # ways that are named


def savers(plan: StepPlan) -> list[str]:
    """Settings of which each alone makes the plan fit, as they are written, the fastest first."""
    found = []
    for words, division in _changes(plan):
        changed = dataclasses.replace(plan, division=division)
        if changed.fits:
            found.append((float(f"{changed.seconds:.3g}"), words))
    return [words for _, words in sorted(found, key=lambda one: one[0])[:MOST]]


def _changes(plan: StepPlan) -> Iterator[tuple[str, Division]]:
    """One setting changed, by its words."""
    division, model = plan.division, plan.workload.model
    replace = dataclasses.replace
    for remat in {"none": ("dots", "full"), "dots": ("full",)}.get(division.remat, ()):
        yield f"model.remat={remat}", replace(division, remat=remat)
    if division.zero < 3:
        yield "zero=3", replace(division, zero=3)
    parts = division.context * division.tensor
    if parts > division.context and plan.workload.length % parts == 0:
        yield "sequence_parallel=true", replace(division, sequence_parallel=True)
    rows = division.rows
    while rows % 2 == 0:
        rows //= 2
        more = division.microbatches * division.rows // rows
        yield f"accumulation={more}", replace(division, rows=rows, microbatches=more)
    times, width = 2, division.data
    while width % 2 == 0:
        width //= 2
        fsdp = division.fsdp * times
        if model.hidden % fsdp == 0:
            words = f"mesh.data={width} mesh.fsdp={fsdp}"
            yield words, replace(division, data=width, fsdp=fsdp)
        times *= 2
    yield from _wider(plan)


def _wider(plan: StepPlan) -> Iterator[tuple[str, Division]]:
    """Larger axes whose chips `data` or `fsdp` gives up; shards compute as many rows at once.

    Over `expert` the batch is cut as well, so that the microbatches stay as many.
    """
    division, model = plan.division, plan.workload.model
    sizes = {
        "tensor": (model.attention.num_heads, model.feed_forward.size, model.padded_vocab),
        "context": (plan.workload.length,),
        "stage": (model.num_layers,),
    }
    if plan.workload.experts is not None:
        sizes["expert"] = (plan.workload.experts.experts,)
    for axis, cut in sizes.items():
        for times in (2, 4, 8):
            size = getattr(division, axis) * times
            giver = next((a for a in ("data", "fsdp") if getattr(division, a) % times == 0), None)
            if giver is None or any(number % size for number in cut):
                continue
            microbatches = division.microbatches * (1 if axis == "expert" else times)
            if axis == "stage" and microbatches < size:
                continue
            changes = {axis: size, giver: getattr(division, giver) // times}
            words = " ".join(f"mesh.{name}={value}" for name, value in changes.items())
            made = dataclasses.replace(division, microbatches=microbatches, **changes)
            more = "" if axis == "expert" else f" accumulation={microbatches}"
            yield f"{words}{more}", made
