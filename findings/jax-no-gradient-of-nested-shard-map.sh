#!/usr/bin/env bash
# A shard_map inside of another runs, and has no gradient.
#
# Versions: jax 0.10.2 (Python 3.11) and 0.12.0.1 (Python 3.12), on simulated CPU devices.
#
# The outer one is manual over one axis, as the stages of a pipeline are, the inner one over another,
# as a kernel's heads are. The forward pass runs. In the gradient, what backward needs of the inner
# function is divided over the outer axis once more, and the program is refused when it is lowered.
# A `jax.custom_vjp` around the inner shard_map, whose backward pass is another, has a gradient.
#
# Seen:
#   jax 0.10.2
#   forward: 0.5403
#   gradient: ValueError: Cannot lower jaxpr with verifier errors:
#   jax 0.12.0.1
#   the same
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==${JAX:-0.10.2}
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4
cd "$work"
"$work/venv/bin/python" -I - <<'EOF'
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec as P

print("jax", jax.__version__)
mesh = jax.make_mesh((2, 2), ("stage", "tensor"), axis_types=(AxisType.Explicit,) * 2)
jax.set_mesh(mesh)


def heads(x):
    wave = jnp.cos(jnp.arange(x.shape[0], dtype=x.dtype))  # made inside, of no input
    return x * wave[:, None]


def layer(x, weight):
    inner = jax.shard_map(heads, out_specs=P(None, "tensor"), axis_names={"tensor"})
    return inner(x * weight)


def model(weights, x):
    for weight in weights:
        x = layer(x, weight)
    return jnp.mean(x[1])


def on_stages(function):
    def body(weights, x):
        return function(weights[0], jax.lax.pcast(x, "stage", to="varying"))[None]

    specs = {"in_specs": (P("stage"), P()), "out_specs": P("stage")}
    return jax.jit(jax.shard_map(body, axis_names={"stage"}, **specs))


weights = jax.device_put(jnp.ones((2, 1)), jax.NamedSharding(mesh, P("stage")))
x = jax.device_put(jnp.ones((4, 4)), jax.NamedSharding(mesh, P(None, "tensor")))
print(f"forward: {np.asarray(on_stages(model)(weights, x))[0]:.4f}")
try:
    on_stages(jax.grad(model))(weights, x)
except Exception as error:
    print(f"gradient: {type(error).__name__}: {str(error).splitlines()[0]}")
else:
    raise SystemExit("the gradient is there")
EOF
