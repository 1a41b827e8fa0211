#!/usr/bin/env bash
# lm-evaluation-harness gives a model whose log-likelihoods are NaN full marks where answer 0 is right.
#
# Versions: lm_eval 0.4.13, datasets 5.2.0.
#
# The first NaN is the largest of the choices for numpy, so that of TruthfulQA's MC1, whose right
# answer is always the first, a broken model has an accuracy of 1.0, without a message. Expected: an
# error.
#
# Seen:
#   lm_eval 0.4.13
#   accuracy of NaN where the first answer is right: 1.0
#   accuracy of NaN where the second answer is right: 0.0
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet lm_eval==0.4.13 datasets==5.2.0
export HF_HUB_OFFLINE=1 HF_HOME="$work/cache" HF_DATASETS_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1
cd "$work"
"$work/venv/bin/python" -I - <<'PYTHON'
import json
import math
import pathlib
from importlib.metadata import version

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

print("lm_eval", version("lm_eval"))
folder = pathlib.Path("tasks").resolve()
folder.mkdir()
NAMES = ("first", "second")
for label, name in enumerate(NAMES):
    rows = [{"question": f"Q{n}", "choices": ["a", "b", "c"], "label": label} for n in range(10)]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


class Broken(LM):
    def loglikelihood(self, requests):
        return [(math.nan, False) for _ in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError


tasks = TaskManager(include_path=str(folder), include_defaults=False)
found = lm_eval.simple_evaluate(Broken(), tasks=[*NAMES], task_manager=tasks, bootstrap_iters=0)
accuracy = [float(found["results"][name]["acc,none"]) for name in NAMES]
for name, value in zip(NAMES, accuracy):
    print(f"accuracy of NaN where the {name} answer is right: {value}")
assert accuracy == [1.0, 0.0]
PYTHON
