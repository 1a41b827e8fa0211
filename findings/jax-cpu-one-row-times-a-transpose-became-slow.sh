#!/usr/bin/env bash
# On a CPU `x @ W.T` of one row takes five times as long in jax 0.12 as in 0.10; its einsum does not.
#
# Versions: jax 0.10.2 and 0.12.0.1 (Python 3.12).
#
# One row of 768 numbers times the transpose of 20,000 rows in float32: the logits of a token.
# Written `x @ W.T` or `jnp.einsum("bi,oi->bo", x, W)` it is the same sum over the same memory, and
# in 0.10 both take the time of reading W. In 0.12 the first takes five times that. It matters twice
# as much for weights in int8, where `x @ codes.astype(float32).T` was the one form that 0.10 made a
# loop over vectors of, without any float weight in memory.
#
# Seen, on one core:
#   jax 0.10.2: x @ W.T 2.18 ms, einsum 2.92 ms
#   jax 0.12.0.1: x @ W.T 15.71 ms, einsum 3.24 ms
#
# It fails if this is no longer so: if the first takes more than 2.5 times the einsum in 0.10, or
# less in 0.12.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export JAX_PLATFORMS=cpu
cat > "$work/times.py" <<'EOF'
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

random = np.random.default_rng(0)
x = jnp.asarray(random.normal(size=(1, 768)), jnp.float32)
weight = jnp.asarray(random.normal(size=(20_000, 768)), jnp.float32)


def milliseconds(function):
    run, taken = jax.jit(function), []
    for _ in range(12):
        begin = time.perf_counter()
        run(x, weight).block_until_ready()
        taken.append(time.perf_counter() - begin)
    return 1e3 * min(taken)


transpose = milliseconds(lambda x, weight: x @ weight.T)
einsum = milliseconds(lambda x, weight: jnp.einsum("bi,oi->bo", x, weight))
print(f"jax {jax.__version__}: x @ W.T {transpose:.2f} ms, einsum {einsum:.2f} ms")
sys.exit((transpose > 2.5 * einsum) != (sys.argv[1] == "slow"))
EOF
for case in "0.10.2 quick" "0.12.0.1 slow"; do
    read -r version expected <<< "$case"
    "${PYTHON:-python3.12}" -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet "jax==$version"
    "$work/$version/bin/python" -I "$work/times.py" "$expected"
done
