#!/usr/bin/env bash
# In compiled programs all collectives of a shard_map have the same channel_id.
#
# Versions: jax 0.10.2 (Python 3.11), 0.12.0.1 (Python 3.12).
#
# A channel_id tells the collectives of an HLO module apart, and the instructions into which the
# compiler cuts one of them have its number. So it is for collectives that automatic partitioning
# inserts: each has a number of its own. Those that are written in a shard_map all have 1. Who counts
# collectives by channel, to count one in pieces once, finds one of five.
#
# Seen, in both versions:
#   five in a shard_map: channels 1 1 1 1 1; two of automatic partitioning: channels 1 2
#
# It fails if this is no longer so in the version that is asked for.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==${JAX:-0.10.2}
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4
cd "$work"
"$work/venv/bin/python" -I - <<'EOF'
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
rows, whole = PartitionSpec("x"), PartitionSpec()


def five(a):
    turned = jax.lax.all_to_all(a, "x", 1, 0, tiled=True)
    back = jax.lax.all_to_all(jnp.sin(turned), "x", 1, 0, tiled=True)
    gathered = jax.lax.all_gather(jnp.cos(a), "x", tiled=True)
    moved = jax.lax.ppermute(jnp.tan(a), "x", [(i, (i + 1) % 4) for i in range(4)])
    return back, gathered, moved, jax.lax.psum(2 * a, "x")


def channels(function):
    text = function.lower(jnp.ones((16, 16))).compile().as_text()
    return sorted(map(int, re.findall(r"channel_id=(\d+)", text)))


specs = {"in_specs": rows, "out_specs": (rows, whole, rows, whole), "check_vma": False}
written = channels(jax.jit(jax.shard_map(five, mesh=mesh, **specs)))
where = {"in_shardings": NamedSharding(mesh, rows), "out_shardings": NamedSharding(mesh, whole)}
inserted = channels(jax.jit(lambda a: (a @ a.T).sum(0), **where))
print(f"jax {jax.__version__}: in a shard_map {written}, of automatic partitioning {inserted}")
assert written == [1] * 5 and inserted == [1, 2]
EOF
