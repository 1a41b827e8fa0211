#!/usr/bin/env bash
# On a CPU weights in int8 that a loop reads are all made float32 before it, and kept.
#
# Versions: jax 0.10.2 (Python 3.11) and 0.12.0.1 (Python 3.12).
#
# Sixteen weights of 512 x 512 take 4 MiB in int8. A product that makes a number of each code where
# it is used needs no memory besides, and the same is expected of 100 rounds of it, as in decoding.
# But in each round the numbers are the same, so XLA makes them once, before the loop: the float32
# weights that int8 was to save. An optimization barrier around weights and state keeps them out.
#
# Seen, with both versions:
#   weights in int8: 4194304 bytes
#   one round: 2048 bytes besides
#   100 rounds in a loop: 16779472 bytes besides
#   100 rounds, with a barrier: 2256 bytes besides
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
import jax
import jax.numpy as jnp

print("jax", jax.__version__)
LAYERS, WIDTH = 16, 512


def one_round(x, weights):
    for codes in weights:
        products = x[:, None] * codes.astype(jnp.float32)
        x = jnp.tanh(jnp.sum(products, axis=0))
    return x


def many(x, weights):
    return jax.lax.fori_loop(0, 100, lambda _, x: one_round(x, weights), x)


def barred(x, weights):
    def turn(_, x):
        return one_round(*jax.lax.optimization_barrier((x, weights)))

    return jax.lax.fori_loop(0, 100, turn, x)


def besides(function):
    """Bytes that a program needs beside what it is given and what it gives."""
    x = jax.ShapeDtypeStruct((WIDTH,), jnp.float32)
    weights = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.int8)] * LAYERS
    return jax.jit(function).lower(x, weights).compile().memory_analysis().temp_size_in_bytes


size = LAYERS * WIDTH * WIDTH
print(f"weights in int8: {size} bytes")
one, loop, kept = map(besides, (one_round, many, barred))
print(f"one round: {one} bytes besides")
print(f"100 rounds in a loop: {loop} bytes besides")
print(f"100 rounds, with a barrier: {kept} bytes besides")
assert one < size / 100 and kept < size / 100
assert loop >= 4 * size
EOF
