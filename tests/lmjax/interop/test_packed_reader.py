"""Public folders in few bits read as such: beside the same folder read as floats."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmjax.config import replace
from lmjax.generation.generator import Generator
from lmjax.interop import folder as any_folder
from lmjax.interop import huggingface
from lmjax.interop.packed_writer import write_packed
from lmjax.models import (
    Int4,
    Int8,
    LoRA,
    Quantization,
    bloom,
    initialize,
    llama,
    mixtral,
    plain_batch,
    with_quantization,
)
from lmjax.parallel import Mesh, training_layout
from tests.whole_logits import program

SMALL = replace(
    llama(),
    vocab_size=128,
    hidden=64,
    num_layers=2,
    max_length=16,
    attention=replace(llama().attention, num_heads=4, num_kv_heads=2, head_dim=16),
    feed_forward=replace(llama().feed_forward, size=96),
)
# Query, key and value are one tensor there.
FUSED = replace(
    bloom(),
    vocab_size=128,
    hidden=64,
    num_layers=2,
    max_length=16,
    attention=replace(bloom().attention, num_heads=4, head_dim=16),
    feed_forward=replace(bloom().feed_forward, size=256),
)
EXPERTS = replace(
    mixtral(),
    vocab_size=128,
    hidden=32,
    num_layers=2,
    max_length=16,
    attention=replace(mixtral().attention, num_heads=4, num_kv_heads=2, head_dim=8),
    feed_forward=replace(mixtral().feed_forward, size=64, experts=4),
)
INT4 = Int4(block=32, scales="float16")
FORMS = {
    "gptq": (SMALL, "gptq", INT4),
    "gptq, 8 bits with zeros": (SMALL, "gptq", Int8(block=32, symmetric=False, scales="float16")),
    "awq": (SMALL, "awq", Int4(block=32, symmetric=False, scales="float16")),
    "compressed": (SMALL, "compressed-tensors", Int8(block=None, scales="float16")),
    "compressed, zeros": (SMALL, "compressed-tensors", replace(INT4, symmetric=False)),
    "fused": (FUSED, "compressed-tensors", INT4),
    "experts": (EXPERTS, "gptq", INT4),
}


@pytest.fixture(scope="module", autouse=True)
def one_mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


def written(folder, model=SMALL, kind="gptq", code=INT4):
    """A folder with the weights of a fresh model, rounded to the nearest."""
    params = initialize(model, training_layout(), jax.random.key(0))[1]
    small, config = with_quantization(params, model, Quantization(weights=code))
    write_packed(folder, config, small, kind=kind)
    return folder


def read_small(folder, apart=False):
    """Config, structure and parameters in few bits, and the reason for floats."""
    family, config = huggingface.read_config(folder)
    config, reason = huggingface.in_few_bits(folder, family, config)
    how = family, config, training_layout()
    return config, *huggingface.read_params(folder, *how, apart=apart), reason


def logits(graph, params):
    tokens = np.random.default_rng(0).integers(0, 128, (2, 12)).astype(np.int32)
    return np.asarray(program(graph, None, params, plain_batch(tokens)))


def block_bytes(params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params["blocks"]))


VARIANTS = ("fused", "gptq, 8 bits with zeros", "compressed, zeros")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in VARIANTS)) for n in FORMS]
)
def test_few_bits_are_kept(name, tmp_path):
    """The same codes as were written, logits of the floats, and equal files when written again.

    Weights are the same numbers to the last bit; products of few rows sum them in another order,
    hence 1e-5. Bytes of the blocks: 4 bits, and a scale of 16 and a zero of 8 for 32 numbers, are
    0.3 of 16 bits; norms, biases and routers are in float32.
    """
    model, kind, code = FORMS[name]
    folder = written(tmp_path / "first", model, kind, code)
    config, graph, params, reason = read_small(folder)
    assert (reason, config.quantization) == ("", Quantization(weights=code))
    _, floats, whole = huggingface.read(folder, training_layout())
    np.testing.assert_allclose(logits(graph, params), logits(floats, whole), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, with_quantization(params, config, None)[0], whole)
    write_packed(tmp_path / "second", config, params, kind=kind)
    for file in ("model.safetensors", "config.json"):
        assert (folder / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    if code.bits == 4 and model is not EXPERTS:
        assert block_bytes(params) <= 0.35 * block_bytes(whole) / 2


@pytest.mark.parametrize("name", ["gptq", pytest.param("experts", marks=pytest.mark.slow)])
def test_layers_apart(name, tmp_path):
    """As the generator reads them on a CPU: each layer by itself, the same tokens."""
    folder = written(tmp_path / "x", *FORMS[name])
    config, _, stacked, _ = read_small(folder)
    _, _, apart, _ = read_small(folder, apart=True)
    for number, block in enumerate(apart["blocks"]):
        one = jax.tree.map(lambda a, n=number: a[n], stacked["blocks"])
        jax.tree.map(np.testing.assert_array_equal, block, one)
    prompts = [[5, 6, 7]]
    tokens = Generator(config, apart).generate(prompts, max_tokens=4)
    _, plain = huggingface.read_config(folder)
    whole = huggingface.read(folder, training_layout())[2]
    assert tokens == Generator(plain, whole).generate(prompts, max_tokens=4)


def change(folder, edit, settings=None):
    """Rewrites the tensors of a folder, and its quantization_config."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    if settings:
        told = json.loads((folder / "config.json").read_text("utf-8"))
        told["quantization_config"] |= settings
        (folder / "config.json").write_text(json.dumps(told), "utf-8")


def shuffle(tensors):
    for name in tensors:
        if name.endswith("layers.1.mlp.down_proj.g_idx"):
            tensors[name] = np.random.default_rng(0).permutation(tensors[name])


def some_floats(tensors):
    """One layer's projection stays in float32."""
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"model.layers.0.mlp.up_proj.{part}"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((96, 64), np.float32)


@pytest.mark.parametrize(
    ("edit", "said"),
    [(shuffle, "no neighbours"), (some_floats, "feed_forward.up is packed in others alone")],
)
def test_what_no_setting_has_is_read_as_floats(edit, said, tmp_path):
    """Says why, and gives the floats that it did before."""
    folder = written(tmp_path / "x")
    change(folder, edit)
    config, _, params, reason = read_small(folder)
    assert config.quantization is None
    assert said in reason
    whole = huggingface.read(folder, training_layout())[2]
    jax.tree.map(np.testing.assert_array_equal, params, whole)


def test_only_some_layers_and_other_zeros(tmp_path):
    """All layers' projections up are floats; one zero is not in the middle, scales in bfloat16."""

    def edit(tensors):
        for layer in (0, 1):
            up = f"model.layers.{layer}.mlp.up_proj"
            for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"):
                del tensors[f"{up}.{part}"]
            tensors[f"{up}.weight"] = np.full((96, 64), 0.5, np.float32)
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = tensors[name].astype(jax.numpy.bfloat16)

    code = replace(INT4, symmetric=False)
    folder = written(tmp_path / "x", kind="compressed-tensors", code=code)
    change(folder, edit)
    config, graph, params, reason = read_small(folder)
    assert reason == ""
    assert config.quantization.weights == replace(code, scales="float32")
    assert "feed_forward.up" not in config.quantization.layers
    assert len(config.quantization.layers) == 6
    _, floats, whole = huggingface.read(folder, training_layout())
    np.testing.assert_allclose(logits(graph, params), logits(floats, whole), atol=1e-5)


def test_a_run_begins_with_few_bits(tmp_path):
    """Under adapters the very integers of the folder are kept, none rounded again."""
    folder = written(tmp_path / "x")
    _, _, params, _ = read_small(folder)
    config = replace(SMALL, lora=LoRA(rank=2, layers=("query",), base=INT4))
    found = any_folder.read_params(folder, config, training_layout())
    kept, same = (tree["blocks"]["attention"]["query"]["weight"] for tree in (found, params))
    jax.tree.map(np.testing.assert_array_equal, kept, same)
    few = replace(SMALL, quantization=Quantization(weights=INT4))
    found = any_folder.read_params(folder, few, training_layout())
    jax.tree.map(np.testing.assert_array_equal, found, params)
