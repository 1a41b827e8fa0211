"""Hugging Face folders: exactly in and out again, and what is wrong with one is named."""

import json
import math
import re
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmjax.config import UserError, replace
from lmjax.generation.weights import stacked, turned
from lmjax.interop import huggingface
from lmjax.models import GatedFeedForwardConfig, RMSNormConfig, decoding_layout, initialize
from lmjax.parallel import Mesh, generation_layout, training_layout
from tests.parity_cases import with_older_names

PARITY = Path(__file__).parents[2] / "data" / "parity"
CASES = ("gpt1", "gpt2", "llama", "llama2_gqa")
EVERY = "transformer.h.1.mlp.c_fc.weight"  # a tensor of GPT-2's


def read(folder):
    """Config and parameters."""
    config, _, params = huggingface.read(folder, training_layout())
    return config, params


def assert_same(found, expected):
    """Exactly equal configs and parameters."""
    assert found[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


def change(folder, name="model.safetensors", **changes):
    """Rewrites a safetensors file; None takes a tensor out. Dots in names are written as `__`."""
    tensors = load_file(folder / name)
    for key, tensor in changes.items():
        tensors.pop(key.replace("__", "."), None)
        if tensor is not None:
            tensors[key.replace("__", ".")] = np.ascontiguousarray(tensor)
    save_file(tensors, folder / name)


def configure(folder, **changes):
    """Rewrites config.json; None takes a key out."""
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


@pytest.fixture
def gpt2(tmp_path):
    """A folder to be changed."""
    return shutil.copytree(PARITY / "gpt2", tmp_path / "gpt2")


@pytest.fixture
def llama(tmp_path):
    """A folder to be changed."""
    return shutil.copytree(PARITY / "llama", tmp_path / "llama")


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_is_written_again(one_device, tmp_path, name):
    """The same tensors under the same names, bit for bit, and a config.json that says the same."""
    config, params = read(PARITY / name)
    huggingface.write(tmp_path, config, params)
    written = load_file(tmp_path / "model.safetensors")
    original = load_file(PARITY / name / "model.safetensors")
    assert written.keys() == original.keys()
    for tensor in original:
        np.testing.assert_array_equal(written[tensor], original[tensor], err_msg=tensor)
    assert_same(read(tmp_path), (config, params))
    kept = json.loads((tmp_path / "config.json").read_text())
    known = json.loads((PARITY / name / "config.json").read_text())
    shared = (kept.keys() & known.keys()) - {"torch_dtype"}
    assert {key: kept[key] for key in shared} == {key: known[key] for key in shared}
    assert shared >= {"model_type", "architectures", "vocab_size"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_sharded_model_is_the_same_in_and_out(one_device, tmp_path):
    config, params = read(PARITY / "llama2_gqa")
    with jax.set_mesh(Mesh(data=2, fsdp=2, tensor=2).build()):
        sharded = huggingface.read(PARITY / "llama2_gqa", generation_layout())
        weight = sharded[2]["blocks"]["feed_forward"]["up"]["weight"]
        assert weight.sharding.spec == jax.P(None, "fsdp", "tensor")
        huggingface.write(tmp_path, config, sharded[2])
    assert_same(read(tmp_path), (config, params))


@pytest.mark.parametrize("name", CASES)
def test_layers_apart_are_those_of_the_stack(one_device, name):
    """Read layer by layer, as decoding wants them on a CPU, parameters have the same bits."""
    family, config = huggingface.read_config(PARITY / name)
    found, expected = (
        huggingface.read_params(PARITY / name, family, config, generation_layout(), apart=apart)[1]
        for apart in (True, False)
    )
    assert len(found["blocks"]) == config.num_layers
    layout = generation_layout()
    found = turned(config, found, decoding_layout(config, layout), layout)
    jax.tree.map(np.testing.assert_array_equal, stacked(found), expected)


def test_parameters_do_not_change_with_their_file(one_device, gpt2):
    """What was read stays as it was when the file is written over."""
    _, params = read(gpt2)
    before = jax.tree.map(np.array, params)
    path = gpt2 / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 4)
        file.write(bytes(path.stat().st_size // 2))
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_other_names_of_the_same_tensors(one_device, gpt2, llama):
    """Without the prefix, with buffers, with the tied head beside its table."""
    for folder in (gpt2, llama):
        expected = read(folder)
        with_older_names(folder)
        assert_same(read(folder), expected)
    table = load_file(gpt2 / "model.safetensors")["wte.weight"]
    change(gpt2, lm_head__weight=table)
    assert_same(read(gpt2), read(PARITY / "gpt2"))


@pytest.mark.parametrize("name", ["llama", "llama2_gqa"])
def test_configs_of_transformers_5(one_device, tmp_path, name):
    folder = shutil.copytree(PARITY / name, tmp_path / name)
    (folder / "config_transformers5.json").replace(folder / "config.json")
    configure(folder, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    _, new = huggingface.read_config(folder)
    _, old = huggingface.read_config(PARITY / name)
    assert new.attention.positions.base == 5e5
    positions = replace(new.attention.positions, base=10_000.0)
    assert replace(new, attention=replace(new.attention, positions=positions)) == old


def test_several_files_and_half_precision(one_device, gpt2):
    """Two files and an index; bfloat16 is widened, which loses nothing."""
    tensors = load_file(gpt2 / "model.safetensors")
    half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    names = sorted(half)
    files = {name: f"model-0000{1 + (name > names[9])}-of-00002.safetensors" for name in names}
    for file in set(files.values()):
        save_file({name: half[name] for name in names if files[name] == file}, gpt2 / file)
    (gpt2 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (gpt2 / "model.safetensors").unlink()
    _, params = read(gpt2)
    table = np.asarray(params["embedding"]["table"])[:97]
    np.testing.assert_array_equal(table, half["transformer.wte.weight"].astype(np.float32))


def test_biases_and_a_tied_head(one_device, tmp_path):
    """Options of LLaMA's config.json that no case has."""
    config, _ = read(PARITY / "llama2_gqa")
    config = replace(
        config,
        attention=replace(config.attention, bias=True, output_bias=True, head_dim=16),
        feed_forward=GatedFeedForwardConfig(size=32, bias=True),
        tied_head=True,
    )
    _, params = initialize(config, training_layout(), jax.random.key(0))
    huggingface.write(tmp_path, config, params)
    written = load_file(tmp_path / "model.safetensors")
    assert written["model.layers.1.self_attn.k_proj.bias"].shape == (32,)
    assert "lm_head.weight" not in written
    found, again = read(tmp_path)
    assert huggingface.architecture_of(found) == huggingface.architecture_of(config)
    cut = jax.tree.map(np.asarray, params)  # the rows that pad the vocabulary come back as zeros
    cut["embedding"]["table"] = cut["embedding"]["table"] * (np.arange(128) < 97)[:, None]
    jax.tree.map(np.testing.assert_array_equal, again, cut)


def test_wrong_tensors_are_named(one_device, gpt2):
    original = load_file(gpt2 / "model.safetensors")[EVERY]
    key = EVERY.replace(".", "__")
    for tensor, message in [
        (None, rf"{EVERY} is missing"),
        (original[:, :-1], rf"{EVERY} is \[48, 191\]; by config.json it should be \[48, 192\]"),
        (original.astype(np.int8), rf"{EVERY} holds I8, not one of F64, F32, F16, BF16"),
    ]:
        change(gpt2, **{key: tensor})
        with pytest.raises(UserError, match=message):
            read(gpt2)
    change(gpt2, **{key: original}, transformer__h__2__ln_1__bias=original[0])
    with pytest.raises(UserError, match=r"transformer\.h\.2\.ln_1\.bias has no place in the gpt2"):
        read(gpt2)
    change(gpt2, transformer__h__2__ln_1__bias=None, lm_head__weight=np.zeros((97, 48), "i1"))
    with pytest.raises(UserError, match=r"lm_head\.weight holds I8, not one of F64"):
        read(gpt2)


def test_damaged_and_missing_files_are_named(one_device, gpt2):
    file = gpt2 / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut off"):
        read(gpt2)
    file.unlink()
    with pytest.raises(UserError, match="holds no weights"):
        read(gpt2)
    (gpt2 / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        read(gpt2)
    (gpt2 / "config.json").unlink()
    with pytest.raises(UserError, match="not a model folder"):
        read(gpt2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, 'model_type="mamba" is not one of openai-gpt, gpt2, llama'),
        (
            {"rope_scaling": {"type": "mrope", "factor": 2.0}},
            'rope_scaling.type="mrope" is not supported for llama, only "default", "linear"',
        ),
        (
            {"rope_parameters": {"rope_type": "proportional"}},
            'rope_parameters.rope_type="proportional" is not supported',
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        ({"hidden_act": "mish"}, 'hidden_act="mish" is not supported for llama, only "gelu_new"'),
        ({"hidden_size": None}, "llama needs 'hidden_size', which is not there"),
        ({"num_experts": 8}, "num_experts=8 is not supported for llama, only 0, 1"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=true is not supported for llama"),
        (
            {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            'partial_rotary_factor=0.5 is not supported with rope_type="linear", only 1.0',
        ),
        ({"vocab_size": "97"}, 'config.json: vocab_size="97": should be a number, at least 1'),
        ({"hidden_size": [48]}, r"hidden_size=\[48\]: should be a number, at least 1"),
        ({"hidden_size": -48}, "hidden_size=-48: should be a number, at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: should be a number, at least 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers=true: should be a number, at least 1"),
        ({"num_hidden_layers": 1.5}, r"num_layers: expected int, got 1.5"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06: should be a number, at least 0"),
        ({"rms_norm_eps": 10**400}, "config.json: .*too large"),
        ({"rope_theta": math.inf}, "rope_theta=Infinity: should be a number, at least 0"),
        ({"rope_theta": 0}, "base=0.0: must be above 0"),
        ({"tie_word_embeddings": "false"}, 'embeddings="false": should be true or false'),
        ({"attention_dropout": 2}, "attention.dropout=2.0: must be 0 or more, and below 1"),
        ({"rope_scaling": "linear"}, 'rope_scaling="linear": should be an object or null'),
        ({"rope_scaling": {"rope_type": "linear"}}, "llama needs 'factor', which is not there"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor: expected float"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2}}, "factor=-2.0: must be above 0"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_served(llama, changes, message):
    configure(llama, **changes)
    with pytest.raises(UserError, match=message):
        huggingface.read_config(llama)


def test_an_empty_setting_is_named(llama):
    path = llama / "config.json"
    settings = json.loads(path.read_text())
    for key in ("hidden_size", "attention_dropout", "hidden_act"):
        path.write_text(json.dumps(settings | {key: None}))
        with pytest.raises(UserError, match=rf"config\.json: .*\({key}: null\)"):
            huggingface.read_config(llama)


def test_a_model_that_no_family_has_is_not_written(one_device, tmp_path):
    config, params = read(PARITY / "gpt2")
    config = replace(config, norm=RMSNormConfig())
    with pytest.raises(UserError, match="nearest is gpt2, which cannot have norm=RMSNorm"):
        huggingface.write(tmp_path / "new", config, params)
    assert not (tmp_path / "new").exists()


FALCON = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 61}
LLAMA = FALCON | {"intermediate_size": 40, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("falcon", FALCON | {"activation": "mish"}, 'activation="mish"'),
        ("falcon", FALCON | {"rope_scaling": {"type": "axial"}}, 'rope_scaling.type="axial"'),
        ("falcon", FALCON | {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
        ("gemma", LLAMA | {"use_bidirectional_attention": True}, "bidirectional_attention=true"),
        ("gemma2", LLAMA | {"layer_types": ["full_attention"]}, "1 entries for 2 layers"),
        ("gemma2", LLAMA | {"attn_logit_softcapping": -1.0}, "softcap=-1.0: must be above 0"),
        ("gemma2", LLAMA | {"final_logit_softcapping": 0.0}, "softcap=0.0: must be above 0"),
        ("qwen2", LLAMA | {"layer_types": ["sliding_attention"] * 2}, "gives no window"),
        ("llama", LLAMA | {"layer_types": ["sliding_attention"] * 2}, "sliding_attention is not"),
        ("mistral", LLAMA | {"layer_types": ["full_attention"] * 2}, "full_attention is not"),
        ("qwen3", LLAMA | {"layer_types": ["chunked_attention"] * 2}, "chunked_attention is not"),
        ("mistral", LLAMA | {"sliding_window": 0}, "windows=(0,): must be 1 or more, or none"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(tmp_path, kind, settings, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | settings))
    with pytest.raises(UserError, match=re.escape(message)):
        huggingface.read_config(tmp_path)


def test_few_key_heads_behind_one_norm(tmp_path):
    """Falcon-11B: 40B's groups and 7B's norm."""
    eleven = {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "falcon"} | FALCON | eleven))
    config = huggingface.read_config(tmp_path)[1]
    assert config.attention.kv_heads == 2 and config.arrangement.shared_norm
    family, written = huggingface.family_of(config)
    assert family.model_type == "falcon" and written.items() >= eleven.items()
