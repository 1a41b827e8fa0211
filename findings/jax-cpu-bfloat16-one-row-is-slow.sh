#!/usr/bin/env bash
# On a CPU one row times a matrix takes several times as long in bfloat16 as in float32.
#
# Versions: jax 0.10.2 (Python 3.11) and 0.12.0.1 (Python 3.12), on a shared x86-64 with AVX-512.
#
# It is the product of decoding: one token by a head of 50,304 rows. It reads half the bytes, so
# about half the time is expected. The script asks for a factor of 2, as machines differ.
#
# Seen:
#   jax 0.10.2
#   1 x 768 by 768 x 50304: float32 28.8 ms, bfloat16 296.0 ms
#   half the bytes take 10.3 times as long
#   jax 0.12.0.1
#   1 x 768 by 768 x 50304: float32 13.5 ms, bfloat16 286.1 ms
#   half the bytes take 21.2 times as long
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==${JAX:-0.10.2}
export JAX_PLATFORMS=cpu
cd "$work"
"$work/venv/bin/python" -I - <<'EOF'
import time

import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__)
WIDTH, ROWS = 768, 50304
weight = np.random.default_rng(0).normal(size=(WIDTH, ROWS)).astype(np.float32)
product = jax.jit(jnp.matmul)
weights = {dtype: jnp.asarray(weight, dtype) for dtype in (jnp.float32, jnp.bfloat16)}
best = dict.fromkeys(weights, np.inf)
inputs = {dtype: jnp.ones((1, WIDTH), dtype) for dtype in weights}
for _ in range(15):  # in turn, so that a busy machine is busy for both
    for dtype in weights:
        begin = time.perf_counter()
        product(inputs[dtype], weights[dtype]).block_until_ready()
        best[dtype] = min(best[dtype], time.perf_counter() - begin)
full, half = best[jnp.float32], best[jnp.bfloat16]
print(f"1 x {WIDTH} by {WIDTH} x {ROWS}: float32 {full * 1e3:.1f} ms, bfloat16 {half * 1e3:.1f} ms")
print(f"half the bytes take {half / full:.1f} times as long")
assert half > 2 * full
EOF
