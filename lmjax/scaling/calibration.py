"""The planner's formulas compared with published runs.

python -m lmjax.scaling.calibration

prints the table in Markdown. Speeds are tokens a second and chip. Where a paper gives TFLOP/s, its
own count of FLOPs turns them into tokens: Megatron's counts attention as the full square, and what
full recomputation adds (Narayanan et al. 2021, arXiv:2104.04473, equation 3); MaxText's counts the
full square without recomputation. The only number that was fitted is `Accelerator.efficiency`, one
for each kind of chip, which is the same in all rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from lmjax.launch import exit_on_user_error
from lmjax.scaling.costs import Prices, plan_costs
from lmjax.scaling.plan import SECONDS_A_DAY, StepPlan
from lmjax.scaling.plan_tables import PlanTable, markdown_rows
from lmjax.scaling.published_runs import (
    RUNS,
    PublishedRun,
    bert_run,
    gpt3_run,
    llama_7b_run,
    llama_run,
)

HOURS_A_YEAR = 24 * 365
WITHIN = 0.10  # part by which predictions may miss


@dataclasses.dataclass(frozen=True)
class CalibrationRow:
    """A published number and what the planner says.

    Attributes:
      name: of the run.
      unit: of both numbers.
      published, predicted: the numbers.
      layout: whether mesh, batch and recomputation are published.
      why: what explains a miss.
      source: of the number.
    """

    name: str
    unit: str
    published: float
    predicted: float
    layout: bool
    why: str
    source: str

    @property
    def miss(self) -> float:
        """Part by which the prediction is too high; below 0 too low."""
        return self.predicted / self.published - 1


def calibration_rows() -> Iterator[CalibrationRow]:
    """All comparisons."""
    for run in RUNS:
        plan = run.plan()
        each = plan.tokens_per_second / plan.cluster.chips
        unit = "tokens/s/chip"
        yield CalibrationRow(run.title, unit, run.published, each, run.layout, run.why, run.source)
    yield from _accounts()


def _accounts() -> Iterator[CalibrationRow]:
    """Days, dollars and energy that were published."""
    no_losses = Prices(uptime=1.0)
    gpt3 = gpt3_run().plan()
    megatron = "Narayanan et al. 2021, section 5.1"
    yield CalibrationRow(
        "GPT-3 175B, 300 B tokens, 1,024 A100", "days", 34.0, gpt3.days, True, "", megatron
    )
    flops = gpt3.workload.model_flops * gpt3.workload.tokens
    years = flops / 28e12 / 3600 / HOURS_A_YEAR
    lambda_labs = "Lambda's estimate of 2020, of 3.14e23 FLOPs"
    why = "it leaves out attention's scores, of which half the square is counted here"
    yield CalibrationRow(
        "GPT-3 175B at 28 TFLOP/s of a V100", "V100 years", 355.0, years, True, why, lambda_labs
    )
    dollars = years * HOURS_A_YEAR * 1.50
    yield CalibrationRow(
        "the same at 1.50 dollars an hour", "dollars", 4.6e6, dollars, True, why, lambda_labs
    )
    llama = llama_run().plan()
    costs = plan_costs(llama.days, llama.cluster, no_losses)
    paper = "Touvron et al. 2023, arXiv:2302.13971, sections 2.4 and 6"
    why = "layout not published"
    yield CalibrationRow("LLaMA-65B, 1.4 T tokens", "days", 21.0, costs.days, False, why, paper)
    energy = costs.kilowatt_hours / 1000
    yield CalibrationRow("the same", "MWh", 449.0, energy, False, why, paper)
    steps = (900_000, bert_run(128, 256)), (100_000, bert_run(512, 256))
    days = sum(number * run.plan().seconds for number, run in steps) / SECONDS_A_DAY
    yield CalibrationRow(
        "BERT-large, 1 M steps of 256 rows, 64 TPU chips",
        "days",
        4.0,
        days,
        False,
        "4 days are 4 percent of the peak of 64 v3 chips: 4 rows a chip, float32, and the kind of"
        " chip is not published; the formula knows none of the time that a host takes",
        "Devlin et al. 2018, arXiv:1810.04805, appendix A.2",
    )
    small: StepPlan = llama_7b_run().plan()
    costs = plan_costs(small.days, small.cluster, Prices(uptime=1.0, dollars=2.50))
    yield CalibrationRow(
        "LLaMA-7B, 20 tokens a parameter, 64 A100",
        "dollars",
        25_000.0,
        costs.dollars,
        False,
        "assumes 135 B tokens, 2.50 dollars an hour of an A100 80 GB, and no stop",
        "a usual figure for a 7B model, which needs these assumptions",
    )


def calibration_table() -> PlanTable:
    """The comparisons as a table."""
    rows = tuple(
        (
            row.name,
            row.unit,
            f"{row.published:,.4g}" if row.published < 1e4 else f"{row.published:,.0f}",
            f"{row.predicted:,.4g}" if row.predicted < 1e4 else f"{row.predicted:,.0f}",
            f"{row.miss:+.1%}",
            "yes" if row.layout else "no",
            row.why,
        )
        for row in calibration_rows()
    )
    columns = ("run", "unit", "published", "predicted", "miss", "layout published", "explanation")
    return PlanTable("Calibration", columns, rows)


def main() -> None:
    """Prints the table."""
    with exit_on_user_error():
        print("\n".join(markdown_rows(calibration_table())))


if __name__ == "__main__":
    main()


__all__ = ["CalibrationRow", "PublishedRun", "calibration_rows", "calibration_table"]
