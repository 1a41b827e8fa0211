#!/usr/bin/env bash
# jax.export under a set explicit mesh: a program of symbolic shapes is written, and cannot be called.
#
# Versions: jax 0.10.2 (Python 3.11), 0.12.0.1 (3.12).
#
# Expected: a mesh of one device changes nothing, and what cannot be exported is refused when it is
# exported. A function with symbolic shapes and a constraint between them is exported, serialized
# and read again on a mesh of one device with explicit axes (the kind that jax.make_mesh makes)
# without a word; every call of it then fails with "expects static assert_what". The program has a
# constraint of its sharding on each number that it computes, on sizes too, so that the check of
# the shapes is no constant any more. With axes of the type Auto, or without a mesh, it runs.
#
# Seen:
#   jax 0.10.2
#   no mesh:        called
#   Auto axes:      called
#   explicit axes:  exported, 'Error refining shapes. ...' when called
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "jax==${JAX:-0.10.2}" flatbuffers
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" -I - 2>errors <<'EOF'
import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

print("jax", jax.__version__)
room, new = jax.export.symbolic_shape("room, new", constraints=["room >= new + 1"])
shapes = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in (room, new)]
auto = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
explicit = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
seen = {}
for name, mesh in (("no mesh", None), ("Auto axes", auto), ("explicit axes", explicit)):
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        function = jax.jit(lambda a, b: jnp.zeros(a.shape) + b.sum())
        data = jax.export.export(function)(*shapes).serialize()
    program = jax.export.deserialize(data)
    try:
        out = program.call(np.ones(5, np.float32), np.ones(3, np.float32))
        assert out.tolist() == [3.0] * 5
        seen[name] = "called"
    except ValueError as error:
        seen[name] = f"exported, {str(error)[:22] + ' ...'!r} when called"
    print(f"{name + ':':15} {seen[name]}")
assert seen["no mesh"] == seen["Auto axes"] == "called", seen
assert seen["explicit axes"] != "called", "it can be called now"
EOF
