#!/usr/bin/env bash
# Orbax restores into any dtype that the target names, without a word.
#
# Versions: orbax-checkpoint 0.12.8, jax 0.10.2.
#
# Integers are cut or wrap around, floats become whole numbers, numbers become booleans. Another
# shape is refused. Expected: that another dtype is refused as well, or said, where the cast loses
# something.
#
# Seen:
#   orbax-checkpoint 0.12.8 jax 0.10.2
#   counts: [1, 299, 70000] as int32 restored as int8: [1, 43, 112]
#   weights: [0.75, -2.5, 10000000000.0] as float32 restored as int32: [0, -2, -2147483648]
#   counts: [1, 299, 70000] as int32 restored as bool: [True, True, True]
#   weights: [0.75, -2.5, 10000000000.0] as float32 restored as bfloat16: [0.75, -2.5, 9999220736.0]
#   another shape is refused: ValueError
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==${JAX:-0.10.2} orbax-checkpoint==0.12.8
export JAX_PLATFORMS=cpu
cd "$work"
"$work/venv/bin/python" -I - <<'EOF'
import importlib.metadata
import pathlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

print("orbax-checkpoint", importlib.metadata.version("orbax-checkpoint"), "jax", jax.__version__)
folder = pathlib.Path("checkpoint").resolve()
saved = {"counts": jnp.array([1, 299, 70_000]), "weights": jnp.array([0.75, -2.5, 1e10])}
checkpointer = ocp.StandardCheckpointer()
checkpointer.save(folder, saved)
checkpointer.wait_until_finished()
for counts, weights in (("int8", "int32"), ("bool", "bfloat16")):
    target = {
        "counts": jax.ShapeDtypeStruct((3,), counts),
        "weights": jax.ShapeDtypeStruct((3,), weights),
    }
    found = checkpointer.restore(folder, target)
    for name, array in found.items():
        before = saved[name]
        print(
            f"{name}: {before.tolist()} as {before.dtype} restored as {array.dtype}: {array.tolist()}"
        )
        assert array.dtype == target[name].dtype != before.dtype
    if counts == "int8":
        assert found["counts"].tolist() == [1, 43, 112]
try:
    checkpointer.restore(folder, {**target, "counts": jax.ShapeDtypeStruct((2,), "int32")})
except ValueError:
    print("another shape is refused: ValueError")
else:
    raise AssertionError("another shape was not refused")
EOF
