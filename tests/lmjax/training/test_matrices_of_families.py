"""Optimizers tell the matrices of every family from its vectors."""

import jax
import pytest

from lmjax import models
from lmjax.config import replace
from lmjax.models import abstract
from lmjax.parallel import Mesh, training_layout
from lmjax.training.matrices import decayed

FAMILIES = {
    "gpt2": models.gpt2("124M"),
    "opt": models.opt("125M"),
    "bloom": models.bloom("560M"),
    "llama": models.llama("7B"),
    "qwen": models.qwen("1.8B"),
    "falcon": models.falcon("7B"),
    "palm": models.palm("8B"),
    "gemma2": models.gemma2("2B"),
    "chatglm": models.chatglm("6B"),
    "glm": models.glm("110M"),
    "t5": models.t5("small"),
    "bert": models.bert("base"),
    "xlnet": models.xlnet("base"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_parameter_is_a_matrix_or_a_vector(name):
    """Weight decay acts on matrices; a bias or a scale, whatever it is a bias of, is none."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        params = abstract(replace(FAMILIES[name], num_layers=1), training_layout())[1]
    found = jax.tree.leaves_with_path(decayed(params))
    assert found
    for path, is_decayed in found:
        last = jax.tree_util.keystr(path[-1:], simple=True)
        assert is_decayed == (not last.endswith(("bias", "scale", "unknown")))
