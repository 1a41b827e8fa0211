#!/usr/bin/env bash
# With explicit axes a shard_map over one axis gathers, at its border, arrays divided along another.
#
# Versions: jax 0.10.2 (Python 3.11); no longer so in 0.12.0.1 (Python 3.12).
#
# A mesh of 2 stages and 4 devices each, an array divided along both, and a function of each number
# under a shard_map that is manual over the stages alone. No device needs a number of another. With
# Auto axes none is sent; with Explicit axes the array is gathered over the four devices where it
# enters, and cut again inside: four times its memory, of every parameter of a pipeline's stage.
# Results are right, so nothing tells of it but the compiled program.
#
# Seen (a device's part has 262144 bytes):
#   jax 0.10.2: Auto 0 gathers, 0 bytes besides; Explicit 2 gathers, 1048580 bytes besides
#   jax 0.12.0.1: Auto 0 gathers, 0 bytes besides; Explicit 0 gathers, 0 bytes besides
#
# It fails if this is no longer so in the version that is asked for.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==${JAX:-0.10.2}
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8
cd "$work"
"$work/venv/bin/python" -I - <<'EOF'
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

found, gathers = [], {}
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 4), ("stage", "fsdp"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        divided = NamedSharding(mesh, PartitionSpec("stage", "fsdp"))
        weights = jax.device_put(jnp.ones((2, 512, 512)), divided)
        specs = {"in_specs": PartitionSpec("stage"), "out_specs": PartitionSpec("stage")}
        doubled = jax.shard_map(lambda a: 2 * a, axis_names={"stage"}, **specs)
        compiled = jax.jit(doubled).lower(weights).compile()
    gathers[kind] = compiled.as_text().count(" all-gather(")
    besides = compiled.memory_analysis().temp_size_in_bytes
    found.append(f"{kind.name} {gathers[kind]} gathers, {besides} bytes besides")
print(f"jax {jax.__version__}: {'; '.join(found)}")
old = jax.__version_info__ < (0, 11)
assert gathers[AxisType.Auto] == 0 and (gathers[AxisType.Explicit] > 0) == old
EOF
