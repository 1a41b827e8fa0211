"""BERT against transformers: words, next sentences, and what padding does not change."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.generation import Generator
from lmjax.interop import huggingface
from lmjax.models import Batch, abstract
from lmjax.parallel import Mesh, generation_layout, training_layout
from tests.parity_cases import parity_folder

CASES = ("bert_erf", "bert_tanh")


def logits_of(graph, params, batch):
    """Logits of words, and of the rows' classes."""

    def run(params, batch):
        model = nnx.merge(graph, params)
        hidden, _ = model(batch)
        return model.logits(hidden), model.classes(hidden)

    return jax.tree.map(np.asarray, jax.jit(run)(params, batch))


def on_mesh(layout, batch):
    """The batch as training lays it out."""

    def put(a):
        return jax.device_put(a, layout.spec("batch", "seq", shape=a.shape))

    return jax.tree.map(put, batch)


def check(folder, mesh, layout, **changes):
    """Both heads within the case's tolerance of 2e-5, on logits of about 2."""
    arrays = np.load(folder / "case.npz")
    with jax.set_mesh(mesh):
        config, _, params = huggingface.read(folder, layout)
        graph, _ = abstract(replace(config, **changes), layout)
        for call in ("plain", "padding"):
            tokens = arrays[f"{call}.tokens"]
            mask = arrays.get(f"{call}.mask", np.ones_like(tokens))
            positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
            types = arrays[f"{call}.segments"]
            batch = Batch(tokens=tokens, positions=positions, segments=mask, token_types=types)
            words, classes = logits_of(graph, params, on_mesh(layout, batch))
            expected = arrays[f"{call}.logits"]
            assert (words[..., expected.shape[-1] :] == -1e30).all()
            words = words[..., : expected.shape[-1]]
            np.testing.assert_allclose(words[mask == 1], expected[mask == 1], rtol=0, atol=2e-5)
            np.testing.assert_allclose(
                classes, arrays[f"{call}.nsp_logits"], rtol=0, atol=2e-5, err_msg=call
            )


@pytest.mark.parametrize("name", CASES)
def test_both_heads(name):
    check(parity_folder(name), Mesh(fsdp=1).build(jax.devices()[:1]), training_layout())


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2, "context": 2}], ids=str
)
def test_both_heads_on_a_mesh(sizes):
    layout = training_layout() if "context" in sizes else generation_layout()
    check(parity_folder("bert_erf"), Mesh(**sizes).build(), layout)


def test_layers_in_a_python_loop():
    one = Mesh(fsdp=1).build(jax.devices()[:1])
    check(parity_folder("bert_tanh"), one, training_layout(), unroll=0)


def test_older_names_of_tensors(one_device, tmp_path):
    """LayerNorm.gamma and LayerNorm.beta, and the head's bias twice."""
    original = parity_folder("bert_erf")
    folder = shutil.copytree(original, tmp_path / "bert")
    (folder / "model_gamma_beta.safetensors").replace(folder / "model.safetensors")
    _, _, params = huggingface.read(folder, training_layout())
    _, _, expected = huggingface.read(original, training_layout())
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_model_without_the_head_of_sentences(one_device, tmp_path):
    """Written as transformers' class without it, and read again."""
    config, _, params = huggingface.read(parity_folder("bert_erf"), training_layout())
    config = replace(config, classifier=None)
    params = {name: value for name, value in params.items() if name != "classifier"}
    huggingface.write(tmp_path, config, params)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "BertForMaskedLM"
    ]
    again, _, found = huggingface.read(tmp_path, training_layout())
    assert again.classifier is None
    jax.tree.map(np.testing.assert_array_equal, found, params)
    # Public files have the other head's tensors although their config.json does not want them.
    shutil.copy(parity_folder("bert_erf") / "model.safetensors", tmp_path)
    jax.tree.map(
        np.testing.assert_array_equal, huggingface.read(tmp_path, training_layout())[2], params
    )


def test_rows_without_token_types_are_of_type_0(one_device):
    folder = parity_folder("bert_erf")
    _, graph, params = huggingface.read(folder, training_layout())
    tokens = np.load(folder / "case.npz")["plain.tokens"]
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = Batch(tokens=tokens, positions=positions, segments=np.ones_like(tokens))
    zeros = dataclasses.replace(batch, token_types=np.zeros_like(tokens))
    jax.tree.map(
        np.testing.assert_array_equal,
        logits_of(graph, params, batch),
        logits_of(graph, params, zeros),
    )


def test_an_encoder_continues_no_text(one_device):
    config, _, params = huggingface.read(parity_folder("bert_erf"), training_layout())
    with pytest.raises(UserError, match="is an encoder"):
        Generator(config, params).generate([[1, 2]])
