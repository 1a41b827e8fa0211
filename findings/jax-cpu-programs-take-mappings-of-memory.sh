#!/usr/bin/env bash
# On a CPU a compiled program keeps three or six mappings of memory; Linux gives a process 65,530.
#
# Versions: jax 0.10.2 (Python 3.11), 0.12.0.1 (Python 3.12).
#
# What limits how many programs a process keeps is not their size, a few kilobytes, but
# vm.max_map_count: 10,000 to 20,000 programs are all. A test suite in one process comes there, with
# memory to spare, and ends without a Python exception. jax.clear_caches() gives the mappings back.
#
# Seen, in both versions:
#   200 small programs: 3.0 mappings each, 6.0 with a sum; forgotten they leave none
#
# It fails if this is no longer so in the version that is asked for.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==${JAX:-0.10.2}
export JAX_PLATFORMS=cpu
cd "$work"
"$work/venv/bin/python" -I - <<'EOF'
import gc

import jax
import jax.numpy as jnp


def mappings():
    with open("/proc/self/maps") as lines:
        return sum(1 for _ in lines)


def each(function):
    """Mappings that a program has, of 200, and those that are left when they are forgotten."""

    def program(number):
        return jax.jit(lambda x: function(x) * number).lower(jnp.zeros(16)).compile()

    program(0.5)
    before = mappings()
    programs = [program(float(number)) for number in range(200)]
    taken = mappings() - before
    del programs
    jax.clear_caches()
    gc.collect()
    return taken / 200, mappings() - before


small, left = each(jnp.sin)
larger, more_left = each(lambda x: jnp.sin(x) + jnp.sum(x))
print(f"jax {jax.__version__}: {small:.1f} mappings each, {larger:.1f} with a sum;", end=" ")
print(f"forgotten they leave {left} and {more_left}")
assert 2 < small < 4 and 5 < larger < 7 and max(left, more_left) < 100
EOF
