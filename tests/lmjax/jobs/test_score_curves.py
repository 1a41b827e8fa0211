"""Scores over compute: FLOPs by hand, rows in their order, and folders that are refused."""

import json
import math

import pytest

from experiments.skills import skills
from lmjax.config import UserError, to_json
from lmjax.evaluation.requests import Likelihood, Written
from lmjax.evaluation.task_result import TaskResult
from lmjax.evaluation.tasks import Addition
from lmjax.jobs.evaluate import Evaluate
from lmjax.jobs.score_curves import curve_tables, training_compute


@pytest.fixture
def run(tmp_path):
    """A folder of a run of 150 tokens and an evaluation, without its parameters."""
    job = skills(widths=(32,), steps=2).jobs[0]
    (tmp_path / "config.json").write_text(to_json(job))
    records = [
        {"step": 1, "split": "train", "loss": 2.0, "tokens": 100},
        {"step": 2, "split": "train", "loss": 2.0, "tokens": 50},
        {"step": 2, "split": "held_out/sums", "loss": 2.0, "tokens": 999},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return tmp_path


def test_compute_by_hand(run):
    """Two blocks of width 32 (12 w^2 weights), 14 words, rows of 64, half of which is attended."""
    products = 2 * 12 * 32**2 + 14 * 32
    attended = 2 * 2 * 32 * (64 / 2)
    assert training_compute(str(run)) == pytest.approx(150 * 3 * (2 * products + 2 * attended))


def test_tables_are_in_the_order_of_compute():
    tasks = [Addition(title=name, digits=d, items=2) for name, d in (("two", 2), ("three", 3))]
    results = {}
    for name, right in (("large", True), ("small", False)):
        results[name] = []
        for task in tasks:
            questions = task.questions()
            answers = [
                [Written((q.item.answer if right else "",)), Likelihood(-1.0 - right, right, 2)]
                for q in questions
            ]
            results[name].append(TaskResult.of(task, questions, answers))
    hard, edits, bits = curve_tables({"large": 1e9, "small": 1e6}, results)
    assert hard.title == "exact_match over compute" and hard.picture == "lines"
    assert hard.columns == ("training FLOPs, log10", "two 0-shot", "three 0-shot")
    assert hard.rows == (("6.000", 0.0, 0.0), ("9.000", 1.0, 1.0))
    assert hard.notes == ("6.000: small", "9.000: large")
    assert edits.rows[1] == ("9.000", 0.0, 0.0)
    assert bits.rows[0][1] == pytest.approx(0.5 / math.log(2))


def test_folders_of_no_training_are_refused(run, tmp_path):
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="is no training run with steps"):
        training_compute(str(run))
    (run / "config.json").write_text(to_json(Addition()))
    asked = Evaluate(
        output=str(tmp_path / "out"), model=str(run), tasks=(Addition(),), over_compute=True
    )
    with pytest.raises(UserError, match="is no training run with steps"):
        asked.run()
