#!/usr/bin/env bash
# jax.jit takes a Flax NNX module, and drops what it changes.
#
# Versions: jax 0.10.2 with flax 0.12.8 (Python 3.11), jax 0.12.0.1 with flax 0.12.12 (Python 3.12):
# the same output.
#
# Modules are pytrees now, so jax.jit accepts one as an argument. What the call changes in it stays
# in the compiled function: dropout draws the same mask at every step and BatchNorm never learns a
# mean, without a word. Expected: an error, or what nnx.jit does.
#
# Seen:
#   jax 0.10.2 flax 0.12.8
#   jax.jit: second dropout mask is the first: True; running mean [0.0, 0.0, 0.0, 0.0]
#   nnx.jit: second dropout mask is the first: False; running mean [0.06284308433532715,
#       0.06499940156936646, 0.06543213874101639, 0.059355974197387695]
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==${JAX:-0.10.2} flax==${FLAX:-0.12.8}
export JAX_PLATFORMS=cpu
cd "$work"
"$work/venv/bin/python" -I - <<'EOF'
import flax
import jax
import jax.numpy as jnp
from flax import nnx

print("jax", jax.__version__, "flax", flax.__version__)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(x))


x = jax.random.normal(jax.random.key(0), (8, 4)) + 3
for name, jit in (("jax.jit", jax.jit), ("nnx.jit", nnx.jit)):
    model = Model(nnx.Rngs(0))
    step = jit(lambda model, x: model(x))
    first, second = step(model, x) == 0, step(model, x) == 0
    same = bool(jnp.array_equal(first, second))
    mean = model.norm.mean[...].tolist()
    print(f"{name}: second dropout mask is the first: {same}; running mean {mean}")
    assert same == (name == "jax.jit")
    assert (not any(mean)) == (name == "jax.jit")
EOF
