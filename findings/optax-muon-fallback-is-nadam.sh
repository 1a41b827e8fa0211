#!/usr/bin/env bash
# optax.contrib.muon gives what is no matrix to Adam with Nesterov momentum, not to Adam.
#
# Versions: optax 0.2.8, jax 0.10.2.
#
# Its documentation says that such parameters are updated by Adam. The first step of a bias is 1.474
# times the rate where Adam's is the rate: `nesterov`, True for Muon's own momentum, goes to both.
# Expected: Adam's steps.
#
# Seen:
#   optax 0.2.8
#   steps of a bias under a constant gradient, rate 1: muon [1.474, 1.157, 1.078]
#   steps of a bias under a constant gradient, rate 1: adam [1.0, 1.0, 1.0]
#   steps of a bias under a constant gradient, rate 1: nadam [1.474, 1.157, 1.078]
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==${JAX:-0.10.2} optax==0.2.8
export JAX_PLATFORMS=cpu
cd "$work"
"$work/venv/bin/python" -I - <<'EOF'
import jax.numpy as jnp
import optax

print("optax", optax.__version__)
bias, gradient = jnp.zeros(3), jnp.array([0.1, -2.0, 30.0])
found = {}
for name, optimizer in {
    "muon": optax.contrib.muon(1.0),
    "adam": optax.adam(1.0),
    "nadam": optax.nadam(1.0),
}.items():
    state, steps = optimizer.init(bias), []
    for _ in range(3):
        update, state = optimizer.update(gradient, state, bias)
        steps.append(round(float(jnp.abs(update).mean()), 3))
    found[name] = steps
    print(f"steps of a bias under a constant gradient, rate 1: {name} {steps}")
assert found["adam"] == [1.0, 1.0, 1.0]
assert found["muon"] == found["nadam"] != found["adam"]
EOF
