#!/usr/bin/env bash
# On a CPU a bias after a product with int8 weights has XLA make the whole weight float.
#
# Version: jax 0.10.2 (Python 3.11).
#
# One row is multiplied with 3,072 rows of codes in int8, as in decoding. XLA makes numbers of the
# codes inside the product's loop, and the program needs next to no memory. With a bias added to the
# result, which one would expect to cost nothing, the addition becomes part of the product, and the
# weight is no longer: it is written to memory in float32, turned around, and read again, for every
# row. A multiplication by a one that comes through an optimization barrier, between product and
# bias, keeps the loop as it was.
#
# Seen:
#   product: 0.0 MB of memory, 0.11 ms
#   product and bias: 9.4 MB of memory, 1.01 ms
#   product times one, and bias: 0.0 MB of memory, 0.10 ms
#
# It fails if this is no longer so. Times are not looked at.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2
export JAX_PLATFORMS=cpu
cd "$work"
"$work/venv/bin/python" -I - <<'EOF'
import time

import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__)
INPUTS, OUTPUTS = 768, 3072
random = np.random.default_rng(0)
x = jnp.asarray(random.normal(size=(1, INPUTS)), jnp.float32)
bias = jnp.asarray(random.normal(size=OUTPUTS), jnp.float32)
codes = jnp.asarray(random.integers(-127, 128, (OUTPUTS, INPUTS)), jnp.int8)


def product(x, codes):
    return x @ codes.astype(jnp.float32).T


def times_one(y):
    return y * jax.lax.optimization_barrier(jnp.ones(()))


ways = {
    "product": lambda x, codes, bias: product(x, codes),
    "product and bias": lambda x, codes, bias: product(x, codes) + bias,
    "product times one, and bias": lambda x, codes, bias: times_one(product(x, codes)) + bias,
}
whole = []
for name, function in ways.items():
    compiled = jax.jit(function).lower(x, codes, bias).compile()
    size = compiled.memory_analysis().temp_size_in_bytes
    taken = []
    for _ in range(100):
        begin = time.perf_counter()
        compiled(x, codes, bias).block_until_ready()
        taken.append(time.perf_counter() - begin)
    print(f"{name}: {size / 1e6:.1f} MB of memory, {min(taken) * 1e3:.2f} ms")
    whole.append(size >= 4 * INPUTS * OUTPUTS)
assert whole == [False, True, False], whole
EOF
