"""Generation by the decode kernel of TPUs, in Pallas' interpreter, gives the logits of the CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import replace
from lmjax.generation import Generator
from lmjax.generation.prompts import left_padded
from lmjax.models import Batch, abstract, bloom, gemma2, llama2, make_cache, mistral
from lmjax.parallel import Mesh, generation_layout
from pallas_kernels.target import interpreted

VOCABULARY, LENGTH, NEW = 61, 24, 3
PROMPTS = [3, 11]
FAMILIES = {
    "llama2_70b": llama2("70B"),  # grouped queries
    "mistral": mistral(),  # rings
    "bloom": bloom(),  # ALiBi
    "gemma2": gemma2(),  # windows in turn, soft caps, grouped queries
}


def shrunk(config):
    attention = config.attention
    return replace(
        config,
        vocab_size=VOCABULARY,
        hidden=32,
        num_layers=2,
        max_length=64,
        attention=replace(
            attention,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            windows=tuple(window and 8 for window in attention.windows),
        ),
        feed_forward=replace(config.feed_forward, size=48),
    )


def random_parameters(config):
    draw = np.random.default_rng(3)

    def leaf(path, shape):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return jnp.asarray(
            0.2 * draw.standard_normal(shape.shape, np.float32) + np.float32(name == "scale")
        )

    return jax.tree.map_with_path(leaf, abstract(config, generation_layout())[1])


def steps(generator, cache, columns: int):
    """Logits after each of NEW tokens, read `columns` at a time, and the text of the program."""
    draw = np.random.default_rng(5)
    tokens = draw.integers(0, VOCABULARY, (len(PROMPTS), NEW)).astype(np.int32)
    found = []
    step = jax.jit(lambda *arguments: generator.decoder.logits(*arguments))
    for first in range(0, NEW, columns):
        part = tokens[:, first : first + columns]
        positions = np.array(PROMPTS)[:, None] + first + np.arange(columns)
        batch = Batch(
            tokens=part, positions=positions.astype(np.int32), segments=np.ones_like(part)
        )
        batch = generator.put_on_devices(batch)
        arguments = generator.weights, batch, cache
        program = str(step.trace(*arguments).jaxpr)
        logits, cache = step(*arguments)
        found.append(np.asarray(logits))
    return found, program


@pytest.mark.parametrize(
    "family",
    ["mistral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bloom", "gemma2"))],
)
def test_the_kernel_gives_the_logits_of_the_cpu(family):
    """2e-5 of the largest logit: the same sums in another order. With several tokens at once a
    ring, which has no room for all that they see, is read as before."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        config = shrunk(FAMILIES[family])
        generator = Generator(config, random_parameters(config))
        draw = np.random.default_rng(4)
        rows = [draw.integers(0, VOCABULARY, length).tolist() for length in PROMPTS]
        prompts = generator.put_on_devices(left_padded(rows, max(PROMPTS)))
        _, cache = generator.decoder.prefill(generator.weights, prompts, length=LENGTH)
        expected, program = steps(generator, cache, 1)
        assert "decode_attention" not in program
        with interpreted("TPU v5 lite"):
            one_by_one, program = steps(generator, cache, 1)
            assert "decode_attention" in program
            at_once, program = steps(generator, cache, NEW)
            assert ("decode_attention" in program) == (family != "mistral")
    atol = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(one_by_one, expected, rtol=0, atol=atol)
    np.testing.assert_allclose(at_once[0], expected[-1], rtol=0, atol=atol)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, real or simulated")
def test_a_mesh_gives_the_logits_of_one_device():
    """Rows and heads cut over the mesh; a kernel on each device reads its own part."""
    found = []
    for mesh, count in ((Mesh(fsdp=1), 1), (Mesh(fsdp=2, tensor=2), 4)):
        with jax.set_mesh(mesh.build(jax.devices()[:count])):
            config = shrunk(FAMILIES["llama2_70b"])
            generator = Generator(config, random_parameters(config))
            prompts = generator.put_on_devices(left_padded([[1, 2, 3], [4] * 11], max(PROMPTS)))
            _, cache = generator.decoder.prefill(generator.weights, prompts, length=LENGTH)
            with interpreted("TPU v5 lite"):
                logits, program = steps(generator, cache, 1)
            assert "decode_attention" in program
            found.append(logits)
    atol = 2e-5 * np.abs(found[0]).max()
    np.testing.assert_allclose(*found, rtol=0, atol=atol)


def test_slots_of_a_tpu_are_whole_copies():
    """A row has room for a multiple of 128 tokens there, so that the kernel can serve."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        config = shrunk(FAMILIES["llama2_70b"])
        assert make_cache(config, generation_layout(), 1, 100).keys[0].shape == (2, 1, 100, 128)
        with interpreted("TPU v4"):
            assert make_cache(config, generation_layout(), 1, 100).capacity == 128
