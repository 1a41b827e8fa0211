#!/usr/bin/env bash
# rouge-score drops all letters but a to z: one Latin word decides the score of two Chinese texts.
#
# Versions: rouge-score 0.1.2.
#
# Two different sentences that name the same model have 1.0 in every measure, two equal ones without
# a Latin word 0.0, and so have Russian, Greek and Arabic ones; an accent cuts a word. Expected: words
# of the script, or an error.
#
# Seen:
#   rouge-score 0.1.2
#   different, one Latin word: rouge1 1.0, rougeL 1.0
#   equal Chinese: rouge1 0.0, rougeL 0.0
#   equal Russian: rouge1 0.0, rougeL 0.0
#   café and cafe: rouge1 0.0, rougeL 0.0
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet rouge-score==0.1.2
cd "$work"
"$work/venv/bin/python" -I - <<'PYTHON'
from importlib.metadata import version

from rouge_score.rouge_scorer import RougeScorer

print("rouge-score", version("rouge-score"))
pairs = {
    "different, one Latin word": ("今天 GPT2 很好", "明天 GPT2 不好"),
    "equal Chinese": ("今天天气很好", "今天天气很好"),
    "equal Russian": ("кот спит", "кот спит"),
    "café and cafe": ("café", "cafe"),
}
scorer = RougeScorer(["rouge1", "rougeL"])
found = []
for name, (one, other) in pairs.items():
    scores = scorer.score(one, other)
    found.append([float(scores[kind].fmeasure) for kind in ("rouge1", "rougeL")])
    print(f"{name}: rouge1 {found[-1][0]}, rougeL {found[-1][1]}")
assert found == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
PYTHON
