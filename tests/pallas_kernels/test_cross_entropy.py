"""Cross-entropy of a head: against numpy float64, in memory, and on a mesh against one device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.cross_entropy import cross_entropy, implementations
from pallas_kernels.target import interpreted

VOCABULARY, ROWS = 37, 48


def for_chip(kind, name, *args, **kwargs):
    """Cross-entropy by the kernels for a chip, which an interpreter runs."""
    with interpreted(kind):
        return cross_entropy(*args, implementation=name, **kwargs)


IMPLEMENTATIONS = {
    "reference": functools.partial(cross_entropy, implementation="reference"),
    "whole": functools.partial(cross_entropy, implementation="chunked"),
    "chunks": functools.partial(cross_entropy, implementation="chunked", chunk=4),
    "chunks_and_a_rest": functools.partial(cross_entropy, implementation="chunked", chunk=7),
    "tpu": functools.partial(for_chip, "TPU v5 lite", "tpu"),
}


def arrays(batch=4, length=8, embed=16):
    """hidden, head, targets and the gradients of the two results."""
    random = np.random.default_rng(0)
    hidden = random.normal(size=(batch, length, embed)).astype(np.float32)
    head = random.normal(size=(ROWS, embed)).astype(np.float32)
    targets = random.integers(0, VOCABULARY, size=(batch, length)).astype(np.int32)
    gradients = random.normal(size=(2, batch, length)).astype(np.float32)
    return hidden, head, targets, gradients


def formulas(hidden, head, targets, gradients, scale, softcap=None):
    """nll, log_z and the gradients of hidden and head, in float64."""
    hidden, head, gradients = (a.astype(np.float64) for a in (hidden, head, gradients))
    logits, gain = scale * hidden @ head[:VOCABULARY].T, 1.0
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
        gain = 1 - (logits / softcap) ** 2
    log_z = np.log(np.exp(logits).sum(axis=-1))
    hit = np.eye(VOCABULARY)[targets]
    share = np.exp(logits - log_z[..., None])
    d_logits = scale * (gradients.sum(axis=0)[..., None] * share - gradients[0][..., None] * hit)
    d_logits = gain * d_logits
    d_head = np.zeros(head.shape)
    d_head[:VOCABULARY] = np.einsum("btv,btd->vd", d_logits, hidden)
    nll = log_z - (logits * hit).sum(axis=-1)
    return nll, log_z, d_logits @ head[:VOCABULARY], d_head


def results(function, hidden, head, targets, gradients, scale, softcap=None):
    def apply(hidden, head):
        return function(hidden, head, targets, vocabulary=VOCABULARY, scale=scale, softcap=softcap)

    values, pull = jax.vjp(apply, hidden, head)
    return *values, *pull(tuple(gradients))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_values_and_gradients(name, softcap):
    given, bending = arrays(), {"scale": 0.7, "softcap": softcap}
    found = jax.jit(functools.partial(results, IMPLEMENTATIONS[name], **bending))(*given)
    for one, expected in zip(found, formulas(*given, **bending)):
        # float32 sums of at most 37 terms.
        np.testing.assert_allclose(one, expected, atol=3e-6 * np.abs(expected).max())
    assert not np.asarray(found[3])[VOCABULARY:].any()  # padding gets exactly nothing


@pytest.mark.parametrize("name", ["whole", "chunks", "tpu"])
def test_bfloat16_inputs_are_accumulated_in_float32(name):
    hidden, head, targets, gradients = arrays()
    hidden, head = (np.asarray(jnp.asarray(a, jnp.bfloat16)) for a in (hidden, head))
    found = jax.jit(functools.partial(results, IMPLEMENTATIONS[name], scale=1.0))(
        hidden, head, targets, gradients
    )
    expected = formulas(hidden, head, targets, gradients, scale=1.0)
    for one, other in zip(found[:2], expected[:2]):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=2e-5)  # only the inputs were rounded
    for one, other in zip(found[2:], expected[2:]):
        assert one.dtype == jnp.bfloat16
        # d_logits and the result are rounded to 8 bits each.
        assert np.abs(np.asarray(one, np.float64) - other).max() < 2 * 2**-8 * np.abs(other).max()


def test_a_target_that_is_no_word_counts_log_z():
    hidden, head, targets, _ = arrays()
    targets[0, :3] = -1
    given = map(jnp.asarray, (hidden, head, targets))
    nll, log_z = cross_entropy(*given, vocabulary=VOCABULARY, chunk=4)
    np.testing.assert_array_equal(nll[0, :3], log_z[0, :3])
    assert (nll < log_z).any()


def temporary_bytes(implementation, chunk=None, length=512, vocabulary=4096):
    hidden = jax.ShapeDtypeStruct((1, length, 16), jnp.float32)
    head = jax.ShapeDtypeStruct((vocabulary, 16), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(hidden, head, targets):
        nll, log_z = cross_entropy(
            hidden,
            head,
            targets,
            vocabulary=vocabulary,
            chunk=chunk,
            implementation=implementation,
        )
        return jnp.sum(nll) + jnp.sum(log_z**2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head, targets).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_all_logits_are_never_held():
    logits = 4 * 512 * 4096
    assert temporary_bytes("reference") > logits  # so the measure sees them
    assert temporary_bytes("chunked", chunk=32) < logits / 4
    # By itself it cuts what exceeds 64 MiB: here 256 MiB.
    assert temporary_bytes("chunked", length=16384) < 2**28 * 0.6


def largest_and_gradients(name, hidden, head, targets, d_top):
    """Sum of the two usual results and the largest logit, with gradients of all together."""

    def apply(hidden, head):
        nll, log_z, top = IMPLEMENTATIONS[name](
            hidden, head, targets, vocabulary=VOCABULARY, scale=0.7, largest=True
        )
        return nll + log_z, top

    values, pull = jax.vjp(apply, hidden, head)
    return *values, *pull((jnp.zeros_like(d_top), d_top))


def check_largest(found, hidden, head, d_top):
    """Against the formula in float64: the gradient is the largest word's row, and back."""
    hidden, rows = hidden.astype(np.float64), head[:VOCABULARY].astype(np.float64)
    logits = 0.7 * hidden @ rows.T
    word = logits.argmax(axis=-1)
    d_head = np.zeros(head.shape)
    np.add.at(d_head, word, 0.7 * d_top[..., None] * hidden)
    expected = logits.max(axis=-1), 0.7 * d_top[..., None] * rows[word], d_head
    for one, other in zip(found[1:], expected):
        np.testing.assert_allclose(one, other, atol=3e-6 * np.abs(other).max())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_largest_logit_and_its_gradients(name):
    hidden, head, targets, gradients = arrays()
    found = jax.jit(functools.partial(largest_and_gradients, name))(
        hidden, head, targets, gradients[0]
    )
    check_largest(found, hidden, head, gradients[0])


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, real or simulated")
@pytest.mark.parametrize("name", ["whole", "chunks", "tpu"])
def test_the_largest_logit_of_a_cut_vocabulary(name):
    hidden, head, targets, gradients = arrays()
    spec = P("fsdp", None)
    with jax.set_mesh(jax.make_mesh((2, 4), ("fsdp", "tensor"))):
        found = jax.jit(functools.partial(largest_and_gradients, name))(
            jax.reshard(hidden, P("fsdp", None, None)),
            jax.reshard(head, P("tensor", None)),
            jax.reshard(targets, spec),
            jax.reshard(gradients[0], spec),
        )
    check_largest(found, hidden, head, gradients[0])


def entropy_and_gradients(name, hidden, head, targets, gradient, softcap=None):
    """Entropy of each token's distribution, and its gradients by hidden and head."""

    def apply(hidden, head):
        _, log_z, mean = IMPLEMENTATIONS[name](
            hidden, head, targets, vocabulary=VOCABULARY, scale=0.7, softcap=softcap, mean=True
        )
        return log_z - mean

    value, pull = jax.vjp(apply, hidden, head)
    return value, *pull(gradient)


def check_entropy(found, hidden, head, gradient, softcap=None):
    """Against -sum p log p in float64, whose derivative by a logit is -p (log p + entropy)."""
    hidden, rows = hidden.astype(np.float64), head[:VOCABULARY].astype(np.float64)
    logits, gain = 0.7 * hidden @ rows.T, 1.0
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
        gain = 1 - (logits / softcap) ** 2
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    entropy = -(np.exp(log_p) * log_p).sum(axis=-1)
    d_logits = -0.7 * gain * np.exp(log_p) * (log_p + entropy[..., None]) * gradient[..., None]
    d_head = np.zeros(head.shape)
    d_head[:VOCABULARY] = np.einsum("btv,btd->vd", d_logits, hidden)
    for one, other in zip(found, (entropy, d_logits @ rows, d_head)):
        # float32 differences of numbers of the size of log Z, about 10.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1, np.abs(other).max()))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_mean_logit_gives_the_entropy(name, softcap):
    hidden, head, targets, gradients = arrays()
    found = jax.jit(functools.partial(entropy_and_gradients, name, softcap=softcap))(
        hidden, head, targets, gradients[0]
    )
    check_entropy(found, hidden, head, gradients[0], softcap)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, real or simulated")
@pytest.mark.parametrize("name", ["reference", "whole", "chunks", "tpu"])
def test_the_entropy_of_a_cut_vocabulary(name):
    hidden, head, targets, gradients = arrays()
    spec = P("fsdp", None)
    with jax.set_mesh(jax.make_mesh((1, 8), ("fsdp", "tensor"))):
        found = jax.jit(functools.partial(entropy_and_gradients, name))(
            jax.reshard(hidden, P("fsdp", None, None)),
            jax.reshard(head, P("tensor", None)),  # of the last eighth, no row is a word
            jax.reshard(targets, spec),
            jax.reshard(gradients[0], spec),
        )
    check_entropy(found, hidden, head, gradients[0])


def test_both_extra_results_come_in_order():
    given = [jnp.asarray(a) for a in arrays()[:3]]
    results = {
        name: function(*given, vocabulary=VOCABULARY, largest=True, mean=True)
        for name, function in IMPLEMENTATIONS.items()
    }
    for found in results.values():
        for one, other in zip(found, results["reference"], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)


MESHES = {
    "fsdp_tensor": ((2, 2, 1, 2), P(("data", "fsdp"), None, None)),
    "fsdp_context_tensor": ((1, 2, 2, 2), P("fsdp", "context", None)),
    "context": ((1, 1, 8, 1), P(None, "context", None)),
}


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, real or simulated")
@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("name", ["reference", "chunks", "tpu"])
def test_sharded_equals_one_device(mesh_name, name):
    sizes, spec = MESHES[mesh_name]
    given = hidden, head, targets, gradients = arrays()
    expected = formulas(*given, scale=0.7)
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "context", "tensor"))
    rows = P("tensor", None) if sizes[3] > 1 else P(None, None)

    def run(hidden, head, targets, gradients):
        return results(IMPLEMENTATIONS[name], hidden, head, targets, gradients, 0.7)

    with jax.set_mesh(mesh):
        found = jax.jit(run)(
            jax.reshard(hidden, spec),
            jax.reshard(head, rows),
            jax.reshard(targets, P(*spec[:2])),
            tuple(jax.reshard(gradient, P(*spec[:2])) for gradient in gradients),
        )
        assert jax.typeof(found[0]).sharding.spec == P(*spec[:2])
        assert jax.typeof(found[3]).sharding.spec == rows
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, atol=3e-6 * np.abs(other).max())


def test_mistakes_are_refused():
    hidden, head, targets = map(jnp.asarray, arrays()[:3])
    with pytest.raises(ValueError, match="vocabulary=49 of a head with 48 rows"):
        cross_entropy(hidden, head, targets, vocabulary=49)
    with pytest.raises(ValueError, match="'fast' is not one of reference, chunked, hopper, tpu"):
        cross_entropy(hidden, head, targets, vocabulary=9, implementation="fast")
    with pytest.raises(ValueError, match="'tpu' cannot serve this call: it needs a TPU"):
        cross_entropy(hidden, head, targets, vocabulary=9, implementation="tpu")
    assert implementations() == ("reference", "chunked", "hopper", "tpu")
