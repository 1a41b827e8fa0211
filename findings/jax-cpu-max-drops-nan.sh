#!/usr/bin/env bash
# jnp.max and jnp.min over 4096 float32 or more lose NaN on a CPU.
#
# Versions: jax 0.10.2 (Python 3.11) and 0.12.0.1 (Python 3.12), the same output.
#
# One NaN is as if it were not there, and of NaN alone the largest is -inf. A test that says
# `jnp.abs(a - b).max() < tolerance` passes for a result that is all NaN, and passes or fails by the
# size of the array. Fewer numbers are right. Expected: NaN, as from NumPy.
#
# Seen:
#   jax 0.10.2 on cpu
#   one NaN among ones:
#   1000 of float32: jnp.max nan, jnp.min nan, np.max nan
#   4096 of float32: jnp.max 1.0, jnp.min 1.0, np.max nan
#   4096 of bfloat16: jnp.max nan, jnp.min 1.0, np.max nan
#   NaN alone:
#   4096 of float32: jnp.max -inf, jnp.min inf, np.max nan
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
import numpy as np

print("jax", jax.__version__, "on", jax.default_backend())


def shown(x):
    with np.errstate(invalid="ignore"):
        found = float(jnp.max(x)), float(jnp.min(x)), float(np.max(np.asarray(x)))
    print(f"{x.size} of {x.dtype}: jnp.max {found[0]}, jnp.min {found[1]}, np.max {found[2]}")
    return found


ones = jnp.ones(4096)
print("one NaN among ones:")
few = shown(ones[:1000].at[7].set(jnp.nan))
assert np.isnan(few).all()
largest, least, numpy = shown(ones.at[7].set(jnp.nan))
assert largest == least == 1.0 and np.isnan(numpy)
shown(ones.astype(jnp.bfloat16).at[7].set(jnp.nan))
print("NaN alone:")
largest, least, numpy = shown(jnp.full(4096, jnp.nan))
assert largest == -np.inf and least == np.inf and np.isnan(numpy)
EOF
