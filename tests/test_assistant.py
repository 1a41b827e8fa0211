"""The chain from nothing to an assistant, with fewer steps: what it is to show."""

import json
import os
import subprocess
import sys

import pytest

from experiments import assistant
from lmjax.config import parse
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import read_metrics

# Of pretraining, instructions, comparisons, reward model, PPO and comparison.
SHORTER = [
    *("jobs.0.steps=250", "jobs.0.evaluation.every=250", "jobs.0.evaluation.prompts=()"),
    *("jobs.1.steps=150", "jobs.1.evaluation.every=150", "jobs.1.evaluation.prompts=()"),
    "jobs.2.requests.every=33",
    *("jobs.4.steps=30", "jobs.4.evaluate_every=30", "jobs.4.evaluate_requests=64"),
    "jobs.5.requests=128",
]
TARGET = assistant.experiment.jobs[4].reward_kl.target


@pytest.mark.slow  # ten minutes beside another worker: six jobs, each compiled
def test_the_reward_rises_while_the_divergence_is_kept(tmp_path):
    """By more than both intervals, under the reward model and on requests that were held out."""
    settings = [f"output={tmp_path}/assistant", *SHORTER]
    job = parse(assistant.experiment, settings)
    # As a user runs it: on one device, and compiled as it is there.
    command = [sys.executable, "-m", "experiments.assistant", *settings]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = RunFolder(job.output)
    tables = {
        table["title"]: {row[0]: row[1:] for row in table["rows"]}
        for table in RunFolder(f"{job.output}/compared").results()["tables"]
    }
    scores = tables["Scores by ModelReward"]
    (before, low), (after, high) = (
        (scores[name][1], scores[name][0]) for name in ("sft", "policy")
    )
    assert after - before > 1.96 * (low + high)
    assert tables["Wins by ModelReward"]["policy over sft"][0] > 0.5
    assert set(tables["Scores by SharedWords"]) == {"pretrained", "sft", "policy"}
    lines = [line for line in read_metrics(f"{job.output}/policy") if line["split"] == "train"]
    assert max(line["reply_kl"] for line in lines) < 2 * TARGET
    page = folder.report.read_text("utf-8")
    for title in ("1. pretrained", "3. comparisons", "6. compared"):
        assert json.dumps(title) in page
