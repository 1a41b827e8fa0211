"""Folders of every family: what is read is written again, tensor by tensor."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from lmjax.interop import huggingface
from lmjax.parallel import training_layout
from tests.parity_cases import parity_folder

CASES = {
    "gpt1": "openai-gpt",
    "gpt2": "gpt2",
    "opt": "opt",
    "opt_350m": "opt",
    "bloom": "bloom",
    "llama2_gqa": "llama",
    "mistral": "mistral",
    "baichuan_7b": "baichuan",
    "baichuan_13b": "baichuan",
    "baichuan2_7b": "baichuan",
    "baichuan2_13b": "baichuan",
    "qwen": "qwen",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "falcon_7b": "falcon",
    "falcon_40b": "falcon",
    "palm": "palm",
    "chatglm_6b": "chatglm",
    "chatglm2_6b": "chatglm",
    "glm": "glm",
    "glm_130b": "glm-130b",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "bert_erf": "bert",
    "bert_tanh": "bert",
    "t5": "t5",
    "t5_v1_1": "t5",
    "xlnet": "xlnet",
}
# These are LLaMAs in all that is computed, and are written as such, names of tensors included.
ALIKE = {"baichuan_7b": "llama"}


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_is_written_again(one_device, tmp_path, name):
    """The very tensors and a config.json that is read as the same config."""
    folder = parity_folder(name)
    config, _, params = huggingface.read(folder, training_layout())
    huggingface.write(tmp_path, config, params)
    kind = json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert kind == ALIKE.get(name, CASES[name])
    again = huggingface.read_config(tmp_path)[1]
    assert huggingface.architecture_of(again) == huggingface.architecture_of(config)
    written, original = tensors(tmp_path), tensors(folder)
    if name in ALIKE:
        return
    assert written.keys() <= original.keys()
    for title, tensor in written.items():
        np.testing.assert_array_equal(tensor, original[title], err_msg=title)
    # What is left out are buffers that nothing learns.
    for title in original.keys() - written.keys():
        assert title.endswith(("inv_freq", ".beta", "attn.bias")) or title == "lm_head.weight", (
            title
        )
