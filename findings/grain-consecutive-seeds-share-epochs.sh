#!/usr/bin/env bash
# grain's shuffle: epoch 1 of seed 0 is epoch 0 of seed 1.
#
# Versions: grain 0.2.18.
#
# The epoch is added to the seed. Runs with seeds 0, 1, 2, ... that are to show how much seeds
# matter see the same orders of the data, one epoch apart. Expected: orders that have nothing to do
# with each other.
#
# Seen:
#   grain 0.2.18
#   seed 0: [0, 4, 6, 7, 5, 3, 1, 2] [5, 7, 6, 0, 4, 1, 3, 2] [0, 4, 1, 7, 6, 5, 3, 2]
#   seed 1: [5, 7, 6, 0, 4, 1, 3, 2] [0, 4, 1, 7, 6, 5, 3, 2] [4, 7, 0, 1, 2, 5, 3, 6]
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet grain==0.2.18
cd "$work"
"$work/venv/bin/python" -I - <<'EOF'
import importlib.metadata

import grain

print("grain", importlib.metadata.version("grain"))


def epochs(seed, number=3, size=8):
    """The order of each epoch of a shuffled data set."""
    rows = list(grain.MapDataset.range(size).shuffle(seed=seed).repeat(number))
    return [rows[size * epoch : size * (epoch + 1)] for epoch in range(number)]


for seed in (0, 1):
    print(f"seed {seed}:", *epochs(seed))
assert epochs(0)[1:] == epochs(1)[:-1]
EOF
