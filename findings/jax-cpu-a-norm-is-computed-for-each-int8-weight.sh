#!/usr/bin/env bash
# On a CPU the norm of a row is computed anew for each weight in int8 that the row is multiplied with.
#
# Version: jax 0.10.2 (Python 3.11).
#
# A row of 768 numbers goes through an RMS norm, and then through a product with 3,072 rows of codes
# in int8, as in decoding. XLA makes numbers of the codes inside the product's loop, as one would
# wish: no weight is ever float32 in memory. But the norm's multiplications become part of the same
# loop, and are made 3,072 times for each number instead of once. An optimization barrier between
# norm and product changes nothing: it is gone before XLA fuses. A product in between does help, here
# one that picks the first of two equal rows: products are not fused into the loop of another. So
# does a division, which XLA takes to be too expensive for a loop that would repeat it: here by ones
# that come through a barrier.
#
# Seen:
#   of the codes alone: 0 multiplications in the product's loop, 0.109 ms
#   with a norm: 2 multiplications in the product's loop, 0.171 ms
#   with a norm and a barrier: 2 multiplications in the product's loop, 0.171 ms
#   with a norm and a product between: 0 multiplications in the product's loop, 0.111 ms
#   with a norm and a division between: 0 multiplications in the product's loop, 0.089 ms
#
# It fails if this is no longer so. Times are of one core, and are not looked at.

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
scale = jnp.ones(INPUTS)
codes = jnp.asarray(random.integers(-127, 128, (OUTPUTS, INPUTS)), jnp.int8)


def normed(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x) + 1e-5) * scale


def product(x, codes):
    return x @ codes.astype(jnp.float32).T


def divided(x):
    return x / jax.lax.optimization_barrier(jnp.ones_like(x))


def picked(x):
    first_of_two = jax.lax.optimization_barrier(jnp.array([[1.0, 0.0]]))
    return first_of_two @ jnp.concatenate([x, x])


ways = {
    "of the codes alone": lambda x, scale, codes: product(x, codes),
    "with a norm": lambda x, scale, codes: product(normed(x, scale), codes),
    "with a norm and a barrier": lambda x, scale, codes: product(
        jax.lax.optimization_barrier(normed(x, scale)), codes
    ),
    "with a norm and a product between": lambda x, scale, codes: product(
        picked(normed(x, scale)), codes
    ),
    "with a norm and a division between": lambda x, scale, codes: product(
        divided(normed(x, scale)), codes
    ),
}
counts = []
for name, function in ways.items():
    compiled = jax.jit(function).lower(x, scale, codes).compile()
    parts = compiled.as_text().split("\n\n")
    loops = [p for p in parts if " dot(" in p and "s8[" in p and not p.strip().startswith("ENTRY")]
    counts.append(sum(part.count(" multiply(") for part in loops))
    taken = []
    for _ in range(200):
        begin = time.perf_counter()
        compiled(x, scale, codes).block_until_ready()
        taken.append(time.perf_counter() - begin)
    print(f"{name}: {counts[-1]} multiplications in the product's loop, {min(taken) * 1e3:.3f} ms")
assert counts == [0, 2, 2, 0, 0], counts
EOF
