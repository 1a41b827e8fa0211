"""Experts calibrated each by its own tokens: a loop in numpy, and better answers than rounding."""

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.compression.calibration import batches_of, stacks_of, walk
from lmjax.compression.expert_inputs import expert_moments
from lmjax.compression.gptq import gptq
from lmjax.compression.methods import Quantizer
from lmjax.config import replace
from lmjax.models import ExpertsConfig, Int4, Quantization, abstract, initialize
from lmjax.parallel import Mesh, training_layout
from tests.lmjax.compression.test_methods import LLAMA, ROWS, drawn, logits

EXPERTS = replace(LLAMA, num_layers=1, feed_forward=ExpertsConfig(size=32, experts=3))
LAYERS = ("up", "gate", "down")


@pytest.fixture(scope="module", autouse=True)
def one_mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


def test_moments_are_those_of_each_expert_s_tokens():
    """One expert after another in numpy; the last one has no token, and so no moments."""
    graph, params = initialize(EXPERTS, training_layout(), jax.random.key(0))
    block = jax.tree.map(lambda a: a[0], params["blocks"])["feed_forward"]
    layer = nnx.merge(graph, params).blocks.feed_forward
    nnx.update(layer, block)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 32)).astype(np.float32)
    chosen = rng.random((2, 5, 3)) < 0.6
    chosen[..., 2] = False
    found = expert_moments(layer, jax.numpy.asarray(x), jax.numpy.asarray(chosen))
    up, gate = (np.asarray(block["experts"][n]["weight"], np.float64) for n in ("up", "gate"))
    for expert in range(3):
        own = x[chosen[..., expert]].astype(np.float64)
        gated = own @ gate[expert]
        inner = gated / (1 + np.exp(-gated)) * (own @ up[expert])
        for name, inputs in zip(LAYERS, (own, own, inner)):
            second = inputs.T @ inputs / max(len(inputs), 1)
            np.testing.assert_allclose(found[name].second[expert], second, rtol=0, atol=1e-5)
            assert found[name].count[expert] == len(inputs)


def test_gptq_of_experts():
    """Each expert's integers are those of GPTQ on its own matrix; logits are nearer."""
    params, code = drawn(EXPERTS), Int4(block=16)
    moments = {}
    how = EXPERTS, params, stacks_of(EXPERTS)[0], list(batches_of(EXPERTS, ROWS))
    walk(*how, lambda entry, found: moments.update(found), experts=True)
    errors = {}
    for method in ("gptq", "nearest"):
        make = Quantizer(Quantization(weights=code), method, ROWS, tell=lambda text: None)
        small, config = make(EXPERTS, params)
        errors[method] = np.square(logits(config, small) - logits(EXPERTS, params)).mean()
        if method == "gptq":
            kept = small["blocks"]["feed_forward"]["experts"]
    assert errors["gptq"] < 0.8 * errors["nearest"]
    for name in LAYERS:
        own = moments[("feed_forward", "experts", name)]
        weights = np.asarray(params["blocks"]["feed_forward"]["experts"][name]["weight"][0])
        for expert, weight in enumerate(weights):
            stored = gptq(weight, own.second[expert], code)
            own_codes = kept[name]["weight"]["codes"][0, expert]  # inputs are their last axis
            np.testing.assert_array_equal(np.asarray(own_codes), np.asarray(stored["codes"]).T)
    assert abstract(config, training_layout())[1]["blocks"].keys() == small["blocks"].keys()
