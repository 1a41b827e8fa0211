"""report.html: one self-contained page about a run, made from the files of its folder alone.

python -m lmjax.jobs.report runs/quickstart    # also while the run is going on
"""

import json
import math
from pathlib import Path
from typing import Any

from lmjax.config import UserError, config
from lmjax.console import Cell, Table, duration
from lmjax.evaluation.task_evaluator import TASKS
from lmjax.jobs.results import Results
from lmjax.launch import run
from lmjax.runs.folder import CONFIG, REPORT, RunFolder

TEMPLATE = Path(__file__).with_name("report.html")
OUTPUT = "{output}"  # in the settings of a chain's jobs: the chain's folder
NOT_DRAWN = {"step", "split", "tokens", "peak_memory"}
# What every run measures, whose curves the page names itself.
EVERY_RUN = {"loss", "learning_rate", "gradient_norm", "tokens_per_second", "mfu"} | NOT_DRAWN
POINTS = 1500  # at most so many points a curve; more are averaged in groups


def write_report(folder: RunFolder) -> Path:
    """Writes the report of a finished (or going) run and returns its path.

    Reads config.json, metrics.jsonl, environment.json and, where there is one, results.json.
    """
    page = fill(TEMPLATE.read_text("utf-8"), content(folder))
    folder.write(REPORT, page)
    return folder.report


def fill(template: str, values: dict[str, Any]) -> str:
    """The page with its values inside: as JSON in which nothing can end the script element."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    title = values["name"].replace("&", "&amp;").replace("<", "&lt;")
    return template.replace("__TITLE__", title).replace("__DATA__", text)


def content(folder: RunFolder) -> dict[str, Any]:
    """Everything that the page shows."""
    runs, settings = _runs(folder), folder.read_json(CONFIG)
    alone = runs.get("")
    of_chain = " ".join((f"{len(runs)} jobs, one after another.", settings.get("about", "")))
    return {
        "name": folder.path.name,
        "summary": _summary(*alone) if alone else of_chain.rstrip(),
        "tiles": _tiles(*alone) if alone else [],
        "runs": [_run(title, *found) for title, found in runs.items()],
        "config": settings,
        "settings_words": "The whole experiment, as config.json in the run folder holds it.",
        "environment": folder.environment() | _traced(folder),
    }


def _runs(folder: RunFolder) -> dict[str, tuple[RunFolder, Results, list[dict]]]:
    """The runs of a page, with results and metrics: those of a chain's jobs, or the folder's own.

    A chain's are where they were made, or below the chain's folder if it was moved.
    """
    outputs = [job["output"] for job in folder.read_json(CONFIG).get("jobs", ())]
    folders = [RunFolder(one.replace(OUTPUT, str(folder.path))) for one in outputs]
    begun = {f"{n}. {one.path.name}": one for n, one in enumerate(folders, 1) if one.has_begun()}
    found = {"": folder} if not outputs else begun
    return {
        title: (one, Results.from_json(one.results()), one.metrics())
        for title, one in found.items()
    }


def _run(title: str, folder: RunFolder, results: Results, records: list[dict]) -> dict[str, Any]:
    """Tables and curves of a run."""
    held_out: dict[str, list[dict]] = {}
    tasks: dict[str, list[dict]] = {}
    for record in records:
        if record["split"].startswith(TASKS):
            tasks.setdefault(record["split"].removeprefix(TASKS), []).append(_finite(record))
        elif record["split"] != "train":
            name = "held-out " + record["split"].removeprefix("held_out/")
            held_out.setdefault(name, []).append(_finite(record))
    train = thinned(_train(records), POINTS)
    return {
        "title": title,
        "summary": _summary(folder, results, records),
        "tables": [_shown(table) for table in results.tables],
        "train": train,
        "held_out": held_out,
        "tasks": tasks,
        "measures": _measures(train),
    }


def _train(records: list[dict]) -> list[dict]:
    return [record for record in records if record["split"] == "train"]


def _measures(train: list[dict]) -> list[str]:
    """Names of what a job measures at its steps, beside what every run has.

    One that has always the same value as another, such as the loss, is left out.
    """
    names = dict.fromkeys(name for record in train for name in record)
    kept: dict[tuple, str] = {}
    for name in ("loss", *(name for name in names if name not in EVERY_RUN)):
        kept.setdefault(tuple(record.get(name) for record in train), name)
    return [name for name in kept.values() if name not in EVERY_RUN]


def thinned(records: list[dict], points: int) -> list[dict]:
    """At most `points` records: neighbours in groups of one size, their numbers averaged.

    A group has its last step. Numbers that are not finite are left out of the mean.
    """
    size = max(1, math.ceil(len(records) / points))
    groups = [records[start : start + size] for start in range(0, len(records), size)]
    numbers = (int, float)
    given = dict.fromkeys(k for r in records for k, v in r.items() if isinstance(v, numbers))
    shown = [name for name in given if name not in NOT_DRAWN]
    result = []
    for group in groups:
        mean: dict[str, Any] = {"step": group[-1]["step"]}
        for name in shown:
            values = [
                record[name] for record in map(_finite, group) if record.get(name) is not None
            ]
            if values:
                mean[name] = float(f"{sum(values) / len(values):.6g}")
        result.append(mean)
    return result


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """The record with what JSON cannot hold (nan, infinity) as null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }


def _traced(folder: RunFolder) -> dict[str, str]:
    """File of the trace of some steps, and the page that opens it."""
    trace = folder.trace()
    return {} if trace is None else {"trace": f"{trace}, opened by https://ui.perfetto.dev"}


def _shown(table: Table) -> dict[str, Any]:
    """The table as the page's script reads it."""
    rows = [[_finite_cell(cell) for cell in row] for row in table.rows]
    return {**table.to_json(), "rows": rows, "is_text": table.is_text}


def _finite_cell(cell: Cell) -> Cell:
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def _summary(folder: RunFolder, results: Results, records: list[dict]) -> str:
    environment, train = folder.environment(), _train(records)
    if not train:
        return ""
    tokens = sum(record.get("tokens", 0) for record in train)
    words = [f"{len(train):,} steps on {tokens / 1e6:,.2f} million tokens"]
    if results.parameters:
        words.insert(0, f"{results.parameters / 1e6:,.2f} million parameters")
    if "devices" in environment:
        words.append(f"on {environment['devices']} x {environment['device']}")
    return ", ".join(words) + "."


def _tiles(folder: RunFolder, results: Results, records: list[dict]) -> list[tuple[str, str]]:
    if results.tiles:
        return list(results.tiles)
    train, tiles = _train(records), []
    for table in results.tables:
        values = [row[-1] for row in table.rows if row[-1] is not None]
        if values and not table.is_text:
            name = table.title.lower() + _rows(len(values), len(table.rows))
            tiles.append((name, f"{sum(values) / len(values):.3f}"))
    if losses := [record["loss"] for record in train if "loss" in record]:
        recent = losses[-max(1, len(losses) // 50) :]
        tiles.append(("training loss at the end", f"{sum(recent) / len(recent):.3f}"))
    speeds = sorted(
        record["tokens_per_second"] for record in train if "tokens_per_second" in record
    )
    if speeds:
        tiles.append(("tokens a second, median", f"{speeds[len(speeds) // 2]:,.0f}"))
    utilisation = sorted(record["mfu"] for record in train if record.get("mfu") is not None)
    if utilisation:
        tiles.append(("of the device's peak (MFU)", f"{utilisation[len(utilisation) // 2]:.0%}"))
    if results.seconds is not None:
        tiles.append(("from the first line to this page", duration(results.seconds)))
    return tiles


def _rows(values: int, rows: int) -> str:
    """Words for the rows that a mean is of."""
    if values < rows:
        return f", of {values} of {rows} rows"
    return ", mean of rows" if rows > 1 else ""


@config
class Report:
    """The page for people of a run, written anew."""

    folder: str | None = None  # the run folder

    def run(self) -> None:
        """Writes report.html. UserError where the folder is no run's."""
        folder = RunFolder(self.folder or "")
        if self.folder is None or not folder.config.is_file():
            raise UserError("python -m lmjax.jobs.report RUN_FOLDER writes its report.html anew")
        print(write_report(folder))


if __name__ == "__main__":
    run(Report(), positional="folder")
