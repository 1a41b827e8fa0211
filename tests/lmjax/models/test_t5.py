"""T5 against transformers: logits, generation through the cache, buckets, and what is not seen."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, config, replace
from lmjax.evaluation.attention_maps import attention_maps
from lmjax.generation import BeamSearch, Generator, Sampling
from lmjax.interop import huggingface
from lmjax.models import PreNorm, SandwichNorm, abstract, plain_batch, t5
from lmjax.parallel import Mesh, generation_layout, training_layout
from pallas_kernels.attention.bias import bucket
from tests.parity_cases import parity_folder

CASES = ("t5", "t5_v1_1")
GREEDY = Sampling(temperature=0.0)


@config
class Doubled(PreNorm):
    """An arrangement that says nothing of cross-attention either, though it is made of PreNorm."""

    def apply(self, x, norms, attention, feed_forward):
        return super().apply(2 * x, norms, attention, feed_forward)


def one():
    return Mesh(fsdp=1).build(jax.devices()[:1])


def on_mesh(layout, batch):
    """The batch as training lays it out."""

    def put(a):
        return jax.device_put(a, layout.spec("batch", "seq", shape=a.shape))

    return jax.tree.map(put, batch)


def batch_of(arrays, call):
    """A call of a case; encoders' rows may be padded on the right."""
    tokens = arrays[f"{call}.tokens"]
    encoder = dataclasses.replace(
        plain_batch(tokens), segments=arrays.get(f"{call}.mask", np.ones_like(tokens))
    )
    return dataclasses.replace(plain_batch(arrays[f"{call}.decoder_tokens"]), encoder=encoder)


def run(graph, params, batch):
    model = nnx.merge(graph, params)
    return model.logits(model(batch)[0])


def check_logits(name, mesh, layout, calls=("plain", "padding"), **changes):
    """2e-5 on logits of about 2; the reference differs from its own float64 by up to 3e-6."""
    folder = parity_folder(name)
    arrays = np.load(folder / "case.npz")
    with jax.set_mesh(mesh):
        config, _, params = huggingface.read(folder, layout)
        graph, _ = abstract(replace(config, **changes), layout)
        for call in calls:
            batch = on_mesh(layout, cut(batch_of(arrays, call), 8))
            logits = np.asarray(jax.jit(run, static_argnums=0)(graph, params, batch))
            expected = arrays[f"{call}.logits"][:, :8]
            assert (logits[..., expected.shape[-1] :] == -1e30).all()
            logits = logits[..., : expected.shape[-1]]
            np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5, err_msg=call)


def cut(batch, length):
    """The decoder's first tokens, a number that a mesh divides."""
    encoder, batch = batch.encoder, dataclasses.replace(batch, encoder=None)
    batch = jax.tree.map(lambda a: a[:, :length], batch)
    return dataclasses.replace(batch, encoder=encoder)


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    check_logits(name, one(), training_layout())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("t5", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("t5_v1_1", {"fsdp": 2, "tensor": 2, "context": 2}),
    ],
    ids=str,
)
def test_logits_on_a_mesh(name, sizes):
    layout = training_layout() if "context" in sizes else generation_layout()
    check_logits(name, Mesh(**sizes).build(), layout, ("padding",))


def test_layers_in_a_python_loop():
    check_logits("t5_v1_1", one(), training_layout(), ("padding",), unroll=0)


def read(name):
    """Config and parameters of a case, and its arrays."""
    folder = parity_folder(name)
    config, _, params = huggingface.read(folder, generation_layout())
    return config, params, np.load(folder / "case.npz")


def check_greedy(name, new=24, **settings):
    """The reference's first `new` tokens, the encoder having run once."""
    config, params, arrays = read(name)
    greedy, sources = arrays["greedy"], arrays["greedy_encoder.tokens"].tolist()
    rows = Generator(config, params, **settings).generate(
        greedy[:, :1].tolist(), GREEDY, new, sources=sources
    )
    assert rows == greedy[:, 1 : 1 + new].tolist()


@pytest.mark.parametrize(("name", "unstack"), [("t5", True), ("t5_v1_1", False)])
def test_greedy_tokens_through_the_cache(one_device, name, unstack):
    check_greedy(name, unstack=unstack)


def test_greedy_tokens_on_a_mesh():
    with jax.set_mesh(Mesh(data=2, fsdp=2, tensor=2).build()):
        check_greedy("t5", new=6)


def test_sources_of_any_length_in_one_batch(one_device):
    """Each row as alone, sampled or with beams; no row sees the padding of its source."""
    config, params, arrays = read("t5")
    sources = [arrays["plain.tokens"][0, :n].tolist() for n in (16, 3)]
    generator = Generator(config, params)
    warm = Sampling(temperature=0.7, seed=3)
    both = generator.generate([[0], [0, 5]], warm, 6, sources=sources, samples=2)
    assert both[:2] == generator.generate([[0]], warm, 6, sources=sources[:1], samples=2)
    beams = BeamSearch(generator)
    together = beams([[0], [0, 5]], beams=3, max_tokens=6, sources=sources)
    for row, (prompt, source) in zip(together, zip([[0], [0, 5]], sources)):
        alone = beams([prompt], beams=3, max_tokens=6, sources=[source])[0]
        assert [found.tokens for found in row] == [found.tokens for found in alone]
    first = beams([[0]], beams=1, max_tokens=6, sources=sources[:1])[0][0]
    assert first.tokens == generator.generate([[0]], GREEDY, 6, sources=sources[:1])[0]


def test_what_cannot_be_read_is_named(one_device):
    config, params, _ = read("t5")
    generator = Generator(config, params)
    for sources, message in [
        (None, "1 prompts, 0 sources: a model with an encoder needs a source for each prompt"),
        ([[1], [2]], "1 prompts, 2 sources"),
        ([[]], "source 1 is empty"),
        ([[97]], "source 1 has the token 97; the model's are 0 to 96"),
    ]:
        with pytest.raises(UserError, match=message):
            generator.generate([[0]], GREEDY, 2, sources=sources)
    with pytest.raises(ValueError, match=r"Batch\.encoder"):
        abstract_logits(config, plain_batch(np.zeros((1, 4), np.int32)))
    graph, _ = abstract(config, training_layout())
    with pytest.raises(UserError, match="not of EncoderDecoder"):
        attention_maps(graph, params, plain_batch(np.zeros((1, 4), np.int32)))
    with pytest.raises(UserError, match="encoder_layers=0: must be 1 or more"):
        replace(config, encoder_layers=0)
    for arrangement in (SandwichNorm(), Doubled()):
        with pytest.raises(UserError, match=f"arrangement={type(arrangement).__name__}: "):
            replace(config, arrangement=arrangement)


def abstract_logits(config, batch):
    graph, shapes = abstract(config, training_layout())
    return jax.eval_shape(lambda params: run(graph, params, batch), shapes)


def packed():
    """Two pairs of texts in one row: 5 + 3 tokens of the encoder, 4 + 4 of the decoder."""
    numbers = np.random.default_rng(0)
    encoder, decoder = (plain_batch(numbers.integers(0, 97, (1, 8))) for _ in range(2))
    encoder = dataclasses.replace(encoder, segments=np.array([[1] * 5 + [2] * 3], np.int32))
    segments = np.array([[1] * 4 + [2] * 4], np.int32)
    return dataclasses.replace(decoder, segments=segments, encoder=encoder)


def test_nothing_leaks(one_device):
    """Gradients of exactly zero at every embedding that an output must not see, and nowhere else.

    An output sees its own text's earlier tokens and all of its source.
    """
    config, params, _ = read("t5")
    graph, _ = abstract(config, training_layout())
    batch = jax.tree.map(jnp.asarray, packed())

    def embeddings():
        model = nnx.merge(graph, params)
        return model.embed(batch.encoder), model.embed(batch)

    def output(both, place):
        model = nnx.merge(graph, params)
        # The encoder's batch has no encoder of its own.
        model.embed = lambda batch, key=None: both[0] if batch.encoder is None else both[1]
        return jnp.sum(jnp.sin(model(batch)[0][0, place]))

    found = jax.jit(jax.vmap(jax.grad(output), in_axes=(None, 0)))(embeddings(), jnp.arange(8))
    source, own = (np.abs(np.asarray(a)[:, 0]).max(-1) != 0 for a in found)
    segments = np.asarray(batch.segments[0])
    same = segments[:, None] == segments
    np.testing.assert_array_equal(own, same & np.tril(np.ones((8, 8), bool)))
    np.testing.assert_array_equal(source, segments[:, None] == batch.encoder.segments[0])


def sines(logits):
    """A sum over the logits of real words."""
    return jnp.sum(jnp.where(logits > -1e29, jnp.sin(logits), 0.0))


def test_remat_scan_and_loop_agree(one_device):
    """1e-5 relative on the gradient of the logits' sum of sines: the same sums, fused otherwise."""
    config, params, arrays = read("t5")
    batch = batch_of(arrays, "padding")

    def gradient(config):
        graph, _ = abstract(config, training_layout())

        def loss(params):
            return sines(run(graph, params, batch))

        return jax.jit(jax.grad(loss))(params)

    expected = gradient(config)
    learned = expected["encoder"]["attention_positions"]["table"]
    assert np.abs(np.asarray(learned)).max() > 1e-3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        gradient(replace(config, remat="dots", unroll=0)),
        expected,
    )


def test_gradients_on_a_mesh():
    """1e-4 absolute on gradients of up to some hundreds; those of the bucket tables are sums over
    all devices' rows and queries."""
    layout, found = training_layout(), []
    divided = Mesh(context=4, fsdp=1).build(jax.devices()[:4])
    for mesh in (one(), divided):
        with jax.set_mesh(mesh):
            folder = parity_folder("t5")
            _, graph, params = huggingface.read(folder, layout)
            pair = cut(batch_of(np.load(folder / "case.npz"), "padding"), 8)
            batch = on_mesh(layout, jax.tree.map(lambda a: np.concatenate([a, a]), pair))

            def loss(params, graph=graph, batch=batch):
                return sines(run(graph, params, batch))

            found.append(jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), *found)


def test_buckets_are_the_reference_s():
    """Exactly, for all distances up to 300."""
    table = np.load(parity_folder("tables") / "t5_buckets.npz")
    distance = jnp.asarray(table["distance"])
    for name in table.files:
        if name == "distance":
            continue
        numbers, largest, kind = name.removeprefix("buckets").split("_")
        largest = int(largest.removeprefix("max"))
        found = bucket(distance, int(numbers), largest, causal=kind == "causal")
        np.testing.assert_array_equal(found, table[name], err_msg=name)


def test_version_1_1_is_written_as_such(one_device, tmp_path):
    config, params, _ = read("t5_v1_1")
    huggingface.write(tmp_path, config, params)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["feed_forward_proj"] == "gated-gelu" and not settings["tie_word_embeddings"]
    assert t5().encoder.num_layers == 12


def test_dropout_drops_the_same_on_a_mesh():
    """2e-5 on logits of about 2; without a key nothing is dropped."""
    layout, found = training_layout(), []
    for mesh in (one(), Mesh(fsdp=2, tensor=2).build(jax.devices()[:4])):
        with jax.set_mesh(mesh):
            folder = parity_folder("t5_v1_1")
            config, graph, params = huggingface.read(folder, layout)
            assert config.dropout == config.attention.dropout == 0.1
            batch = on_mesh(layout, cut(batch_of(np.load(folder / "case.npz"), "padding"), 8))

            @jax.jit
            def both(params, batch, graph=graph):
                model = nnx.merge(graph, params)
                keys = None, jax.random.key(3)
                return [model.logits(model(batch, key=key)[0]) for key in keys]

            found.append([np.asarray(logits) for logits in both(params, batch)])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=0, atol=2e-5)
    assert np.abs(found[0][1] - found[0][0]).max() > 0.1
