"""The planner's command: an experiment, a topology, and what is to be told of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmjax.config import UserError, config, fields, parse
from lmjax.console import duration, make_console
from lmjax.launch.experiments import load_experiment
from lmjax.parallel.mesh import AXES
from lmjax.scaling.clusters import Cluster, find_cluster
from lmjax.scaling.compiled import StepDoesNotFit, compile_step, compiled_tables
from lmjax.scaling.costs import Prices, plan_costs
from lmjax.scaling.division import Division, microbatches_of, resolve_sizes
from lmjax.scaling.plan import StepPlan, check_division
from lmjax.scaling.plan_report import check_report, write_plan
from lmjax.scaling.plan_tables import (
    Facts,
    PlanTable,
    facts_of,
    print_facts,
    print_table,
    tables_of,
)
from lmjax.scaling.schedule_tables import schedule_facts
from lmjax.scaling.search import search, search_tables
from lmjax.scaling.serving import ServedRequests, plan_serving, serving_facts, serving_table
from lmjax.scaling.workload import model_of, workload_of
from pallas_kernels.schedules import start_recording

PLANNED_REMAT = "none", "dots", "full"
Told = tuple[Facts, list[PlanTable], Division | None]  # what a command prints, what is divided


@config
class PlanCommand:
    """An experiment, a topology, and settings of the plan."""

    experiment: str = ""  # module, such as experiments.gpt3_175b
    topology: str = ""  # chips: v4:8x8x16, a100-40gb:1024, h100:512, ...
    slices: int = 1  # parts of a TPU topology that only the data centre's network joins
    tokens: float | None = None  # of the training; none: the experiment's
    prices: Prices = Prices()  # of chips and power
    compile: bool = False  # compile the step for described TPUs as well, which takes minutes
    search: bool = False  # find the best mesh, policy, schedule and microbatch
    serve: bool = False  # plan inference instead of training
    requests: ServedRequests = ServedRequests()  # that are served
    report: str = ""  # file to write it to as well: plan.html or plan.md

    def validate(self) -> None:
        """Raises UserError for plans that are not made together."""
        wanted = [name for name in ("compile", "search", "serve") if getattr(self, name)]
        if len(wanted) > 1:
            raise UserError(f"{' and '.join(wanted)}: only one of them can be true")

    def plan(self, words: Sequence[str]) -> None:
        """Prints the plan.

        Args:
          words: settings of the experiment.

        Raises:
          UserError: there is no such experiment or topology, or the step cannot be divided so.
        """
        if not self.experiment or not self.topology:
            raise UserError(
                "Which experiment, and where? For instance: python -m lmjax.scaling"
                " experiments.gpt3_175b topology=v4:8x8x16"
            )
        if self.report:
            check_report(self.report)
        if self.compile:
            start_recording()  # before anything looks for a TPU, as the console does
        console = make_console()
        cluster = find_cluster(self.topology, self.slices)
        made = self.served if self.serve else self.searched if self.search else self.trained
        facts, tables, division = made(words, cluster)
        print_facts([("experiment", self.experiment), *facts], console)
        for table in tables:
            print_table(table, console)
        if self.report:
            title = f"{self.experiment.rpartition('.')[2]} on {cluster.name}"
            write_plan(self.report, title, facts, tables, division)
            console.print(f"\nreport      {self.report}", soft_wrap=True)

    def trained(self, words: Sequence[str], cluster: Cluster) -> Told:
        """Facts and tables of training."""
        job, plan, notes = self.made(words, cluster)
        facts = facts_of(plan, plan_costs(plan.days, cluster, self.prices))
        tables = tables_of(plan)
        if self.compile:
            try:
                step = compile_step(job, plan, recorded=True)
            except StepDoesNotFit as error:
                notes.append(("compiled", str(error)))
            else:
                tables += compiled_tables(plan, step)
                notes.append(("compiled", f"in {duration(step.seconds)}"))
                untimed = [("by schedule", "no time of a pipeline: its stages take other branches")]
                notes += schedule_facts(step.schedule) if step.schedule else untimed
        return [*facts, *notes], tables, plan.division

    def searched(self, words: Sequence[str], cluster: Cluster) -> Told:
        """Facts of the best division, its tables, and those of the others."""
        mesh, others = _mesh_words(words)
        if mesh:
            raise UserError(f"search=true finds the mesh: leave out mesh.{min(mesh)}")
        job = parse(load_experiment(self.experiment), others)
        found = search(workload_of(job, self.tokens), cluster)
        best = found.best[0]
        facts = facts_of(best, plan_costs(best.days, cluster, self.prices))
        return facts, [*search_tables(found), *tables_of(best)], best.division

    def served(self, words: Sequence[str], cluster: Cluster) -> Told:
        """Facts and tables of inference."""
        mesh, others = _mesh_words(words)
        if other := set(mesh) - {"tensor"}:
            raise UserError(
                f"mesh.{min(other)}: of a model that serves mesh.tensor alone can be set; what is"
                " left of the chips are replicas"
            )
        job = parse(load_experiment(self.experiment), others)
        plan = plan_serving(model_of(job), self.requests, cluster, mesh.get("tensor"))
        return serving_facts(plan, self.prices), [serving_table(plan)], None

    def made(self, words: Sequence[str], cluster: Cluster) -> tuple[Any, StepPlan, Facts]:
        """The training job, its plan, and what was chosen beside the settings.

        Raises:
          UserError: see `plan`.
        """
        mesh, others = _mesh_words(words)
        job = parse(load_experiment(self.experiment), others)
        workload = workload_of(job, self.tokens)
        if job.model.remat not in PLANNED_REMAT:
            known = ", ".join(PLANNED_REMAT)
            raise UserError(f"model.remat={job.model.remat}: the planner knows {known}")
        given = {axis: getattr(job.mesh, axis) for axis in AXES} | mesh
        sizes, repeated = resolve_sizes(given, cluster.chips)
        alone = sizes | {"data": given["data"]} if repeated else sizes
        wanted = max(1, workload.rows // (job.accumulation * Division(**alone).shards))
        rows, microbatches = microbatches_of(workload.rows, Division(**sizes).shards, wanted)
        chunks = job.pipeline.chunks if job.pipeline.schedule == "interleaved" else 1
        division = Division(
            **sizes,
            rows=rows,
            microbatches=microbatches,
            schedule=job.pipeline.schedule,
            chunks=chunks,
            remat=job.model.remat,
            zero=job.zero,
            sequence_parallel=job.sequence_parallel,
        )
        check_division(workload, division, cluster)
        notes = []
        if repeated:
            notes.append(("note", f"mesh.data={sizes['data']}: the mesh is repeated"))
        if microbatches != job.accumulation:
            notes.append(("note", f"accumulation={microbatches}, so that rows divide"))
        return job, StepPlan(workload, division, cluster), notes


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words of the command line that are the planner's, and those of the experiment."""
    names = set(fields(PlanCommand))
    own, others = [], []
    for word in words:
        first = word.partition("=")[0].partition(".")[0]
        mine = first in names or "=" not in word
        (own if mine else others).append(word)
    return own, others


def _mesh_words(words: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Sizes of the mesh's axes that are given, and the other words.

    They are read here, as a plan may have a mesh that cannot be built.
    """
    sizes, others = {}, []
    for word in words:
        path, equals, text = word.partition("=")
        axis = path.removeprefix("mesh.")
        if not equals or axis == path or axis not in AXES:
            others.append(word)
            continue
        if axis in sizes:
            raise UserError(f"{path} is set twice")
        try:
            size = int(text)
        except ValueError:
            raise UserError(f"{word}: expected a whole number") from None
        if size < 1 and size != -1:
            raise UserError(f"{word}: a mesh axis is 1 or more, or -1 for the rest")
        sizes[axis] = size
    return sizes, others
