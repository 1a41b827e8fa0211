"""Search for the best division of a step by formulas: meshes, policies, schedules, microbatches.

Compared are all meshes that divide the model and the batch, each with every policy of
recomputation, ZeRO 3 and 1, the schedules of pipelines, sequences cut over `tensor` between layers
or not, and 1 to 16 rows at once on a shard. The best is the one with most tokens a second that fits
into memory; of the others the time that they lose, compared with it, says why they lost.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator

from lmjax.config import UserError
from lmjax.scaling.clusters import Cluster
from lmjax.scaling.division import Division
from lmjax.scaling.plan import BOTTLENECKS, StepPlan, check_division
from lmjax.scaling.plan_tables import PlanTable, gigabytes, seconds
from lmjax.scaling.workload import Workload

MOST_TENSOR, MOST_STAGES = 64, 64
ROWS = (1, 2, 4, 8, 16)  # at once on a shard
LONG = 8192  # tokens of rows that are worth cutting over `context`
SHOWN = 8  # candidates of a table
PIPELINES = (("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zb_h1", 1), ("zb_v", 1))


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """Divisions of a step on a cluster.

    Attributes:
      best: the fastest that fit, each on another mesh, in order.
      losers: by reason, how many lost and the fastest of them.
      number: of all that were compared.
    """

    best: tuple[StepPlan, ...]
    losers: dict[str, tuple[int, StepPlan]]
    number: int


def search(workload: Workload, cluster: Cluster) -> SearchResult:
    """Compares all divisions.

    Args:
      workload: the model and its batch.
      cluster: the chips.

    Raises:
      UserError: no division fits into memory, or the batch divides among no shards of the chips.
    """
    plans = [StepPlan(workload, division, cluster) for division in divisions(workload, cluster)]
    fitting = [plan for plan in plans if plan.fits]
    if not plans:
        raise UserError(
            f"no mesh of {cluster.chips:,} chips divides the model and its batch of"
            f" {workload.rows:,} rows: take another number of chips, or another batch"
        )
    if not fitting:
        least = min(plans, key=lambda plan: plan.missing)
        raise UserError(
            f"nothing fits {cluster.name}: the least memory, with {describe(least)}, is"
            f" {gigabytes(least.missing)} GB a chip too much; take more chips"
        )
    by_mesh: dict[str, StepPlan] = {}
    for plan in sorted(fitting, key=lambda plan: (plan.seconds, plan.memory.total)):
        by_mesh.setdefault(str(plan.division), plan)
    best = tuple(by_mesh.values())
    losers: dict[str, list[StepPlan]] = collections.defaultdict(list)
    for plan in plans:
        if plan is not best[0]:
            losers[reason(plan, best[0])].append(plan)
    fastest = {
        why: (len(lost), min(lost, key=lambda plan: plan.seconds)) for why, lost in losers.items()
    }
    return SearchResult(best[:SHOWN], fastest, len(plans))


def reason(plan: StepPlan, best: StepPlan) -> str:
    """Word for what a plan loses to the best one."""
    if not plan.fits:
        return "memory: it does not fit"
    more = {name: time - best.times[name] for name, time in plan.times.items()}
    worst = max(more, key=more.get)
    return "recomputation" if worst == "products" else BOTTLENECKS[worst]


def divisions(workload: Workload, cluster: Cluster) -> Iterator[Division]:
    """All divisions that are compared."""
    model = workload.model
    heads = math.gcd(model.attention.num_heads, model.feed_forward.size, model.padded_vocab)
    for tensor in _divisors(math.gcd(heads, cluster.chips), MOST_TENSOR):
        chips = cluster.chips // tensor
        for stage in _divisors(math.gcd(model.num_layers // model.group, chips), MOST_STAGES):
            for context in _contexts(workload, chips // stage):
                shards = chips // stage // context
                if workload.rows % shards:
                    continue
                sizes = dict(tensor=tensor, stage=stage, context=context)
                for sharded in _sharded(workload, shards):
                    mesh = Division(**sizes, **sharded)
                    yield from _variants(mesh, workload, cluster)


def _sharded(workload: Workload, shards: int) -> Iterator[dict[str, int]]:
    """Sizes of the axes that the batch is cut over."""
    number = 1 if workload.experts is None else workload.experts.experts
    for expert in _divisors(math.gcd(shards, number), number):
        rest = shards // expert
        for fsdp in _divisors(math.gcd(rest, workload.model.hidden), rest):
            yield dict(data=rest // fsdp, fsdp=fsdp, expert=expert)


def _variants(mesh: Division, workload: Workload, cluster: Cluster) -> Iterator[Division]:
    """Policies, ZeRO stages, schedules, cuts of the sequence and rows of a mesh."""
    own = workload.rows // mesh.shards
    layers = workload.model.num_layers // workload.model.group // mesh.stage
    for rows in ROWS:
        if own % rows:
            continue
        pipelines = PIPELINES if mesh.stage > 1 else PIPELINES[:1]
        sequences = (False, True) if mesh.tensor > 1 else (False,)
        for (schedule, chunks), along in itertools.product(pipelines, sequences):
            order = dict(rows=rows, microbatches=own // rows, schedule=schedule, chunks=chunks)
            made = dataclasses.replace(mesh, **order, sequence_parallel=along)
            if layers % made.parts:
                continue
            try:
                check_division(workload, made, cluster)
            except UserError:
                continue
            for zero in (3, 1) if mesh.fsdp > 1 else (3,):
                for remat in ("none", "dots", "full"):
                    yield dataclasses.replace(made, zero=zero, remat=remat)


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def _contexts(workload: Workload, chips: int) -> list[int]:
    """Sizes of `context`: above 1 for long rows, and where there are more chips than rows."""
    long = workload.length >= LONG or chips > workload.rows
    most = 64 if long else 1
    return _divisors(math.gcd(workload.length, chips), most)


def describe(plan: StepPlan) -> str:
    """Words for a division."""
    division = plan.division
    words = [str(division), f"zero={division.zero}", f"remat={division.remat}"]
    words.append(f"accumulation={division.microbatches}")
    if division.sequence_parallel:
        words.append("sequence_parallel")
    if division.stage > 1:
        words.append(division.schedule)
        words[-1] += f" x{division.chunks}" if division.chunks > 1 else ""
    return " ".join(words)


def search_tables(found: SearchResult) -> list[PlanTable]:
    """The best, and why the others lost."""
    best = tuple(
        (
            describe(plan),
            gigabytes(plan.memory.total),
            seconds(plan.seconds),
            f"{plan.mfu:.1%}",
            plan.lost,
        )
        for plan in found.best
    )
    columns = ("mesh and settings", "GB", "step", "MFU", "most is lost to")
    first = found.best[0].seconds
    lost = tuple(
        (
            why,
            f"{number:,}",
            describe(plan),
            f"{plan.seconds / first - 1:+.0%}",
            f"{gigabytes(plan.missing)} GB too much" if plan.missing > 0 else "",
        )
        for why, (number, plan) in sorted(found.losers.items(), key=lambda one: -one[1][0])
    )
    names = ("reason", "lost", "the fastest of them", "time", "memory")
    note = f"{found.number:,} divisions were compared, each mesh by its best settings."
    return [
        PlanTable("The best divisions", columns, best, note),
        PlanTable("The others lost by", names, lost),
    ]
