#!/usr/bin/env bash
# With explicit sharding, a product of which one side alone is cut along what is summed is an all-
# reduce.
#
# Versions: jax 0.10.2 (Python 3.11) and 0.12.0.1 (Python 3.12).
#
# Where both sides are cut along it jax refuses: which sharding the result has is ambiguous. Where
# one is, the result is replicated, the compiler adds an all-reduce, and neither the types nor a
# message say so. Expected: the same error, or an all-gather of the whole side; in any case
# communication that is asked for.
#
# Seen:
#   jax 0.10.2 on 8 simulated devices
#   one side cut: the result is float32[4,32], compiled with ['all-reduce']
#   the other: the result is float32[4,32], compiled with ['all-reduce']
#   both: ShardingTypeError: Contracting dimensions are sharded and it is ambiguous how the output
#       should be sharded
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==${JAX:-0.10.2}
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8
cd "$work"
"$work/venv/bin/python" -I - <<'EOF'
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

print("jax", jax.__version__, "on", len(jax.devices()), "simulated devices")
with jax.set_mesh(jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Explicit,))):
    x, w = jnp.ones((4, 64)), jnp.ones((64, 32))
    cut_x, cut_w = jax.reshard(x, P(None, "tensor")), jax.reshard(w, P("tensor", None))
    for name, product in (("one side cut", (cut_x, w)), ("the other", (x, cut_w))):
        compiled = jax.jit(jnp.matmul).lower(*product).compile().as_text()
        found = re.findall(r" = \S+ (all-[a-z]+|reduce-scatter)\(", compiled)
        print(f"{name}: the result is {jax.typeof(jnp.matmul(*product))}, compiled with {found}")
        assert found == ["all-reduce"]
    try:
        jnp.matmul(cut_x, cut_w)
    except Exception as error:
        reason = str(error).split(". ")[0]
        print(f"both: {type(error).__name__}: {reason}")
        assert type(error).__name__ == "ShardingTypeError"
    else:
        raise AssertionError("both sides cut: no error")
EOF
