"""Adapters in PEFT's files: the logits of `peft` itself on the same files, both ways.

Tolerance 1e-5 of logits of about 1, as `peft` adds what adapters give in another order.
"""

import json
import os

import jax
import numpy as np
import pytest

from lmjax.config import UserError, replace
from lmjax.interop import adapter_folder
from lmjax.interop.adapter_folder import read_adapted, write_adapters
from lmjax.interop.convert import convert
from lmjax.interop.folder import model_folder, read_params
from lmjax.models import LoRA, plain_batch
from lmjax.parallel import Mesh, training_layout
from tests.lmjax.models.adapted import with_random_b
from tests.whole_logits import logits_of_config

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # nothing is downloaded
EXTRA = "the live comparison needs the extra parity: pip install -e '.[parity]', on Python 3.11"
torch = pytest.importorskip("torch", reason=EXTRA)
transformers = pytest.importorskip("transformers", reason=EXTRA)
peft = pytest.importorskip("peft", reason=EXTRA)
torch.set_num_threads(1)  # the models are tiny, and waiting threads keep cores busy

TOKENS = np.random.default_rng(0).integers(0, 90, (2, 12))
NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GATED = dict(
    vocab_size=90,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# model_type -> settings of a tiny model, and modules that adapters are put beside
CASES = {
    "llama": (GATED, ["q_proj", "v_proj", "lm_head"]),
    "qwen2": (GATED, ALL),
    "mistral": (GATED | {"sliding_window": None}, ["o_proj", "down_proj"]),
    "gpt2": (
        dict(vocab_size=90, n_embd=24, n_layer=2, n_head=4, n_positions=32),
        ["c_attn", "attn.c_proj", "c_fc"],
    ),
    "bloom": (
        dict(vocab_size=90, hidden_size=24, n_layer=2, n_head=4),
        ["query_key_value", "dense_h_to_4h"],
    ),
    "falcon": (
        dict(
            vocab_size=90,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
        ),
        ["query_key_value", "dense"],
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of random models by model_type, made as they are asked for."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def base(kind):
        if kind not in made:
            torch.manual_seed(1)
            config = transformers.AutoConfig.for_model(kind, **CASES[kind][0], **NO_ENDS)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(parameter + 0.2 * torch.randn_like(parameter))
            model.save_pretrained(root / kind)
            made[kind] = root / kind
        return made[kind]

    return base


def wrapped(base, **settings):
    """A random model of transformers' with random adapters of peft's; alpha is not the rank."""
    kind = json.loads((base / "config.json").read_text())["model_type"]
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(2)
    config = peft.LoraConfig(
        **dict(
            r=3,
            lora_alpha=7,
            target_modules=CASES[kind][1],
            init_lora_weights=False,
            fan_in_fan_out=kind == "gpt2",
        )
        | settings
    )
    return peft.get_peft_model(model, config)


def theirs(model):
    with torch.no_grad():
        return model.eval()(torch.as_tensor(TOKENS)).logits.numpy()


def ours(config, params):
    return logits_of_config(config, params, plain_batch(TOKENS))


def assert_same(found, expected):
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    "kind",
    [
        *("llama", "gpt2", "falcon"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen2", "mistral", "bloom")),
    ],
)
def test_logits_are_those_of_peft(one_device, bases, kind, tmp_path):
    """Theirs read here, and ours of other ranks for fused layers read there and here again."""
    model = wrapped(bases(kind), use_rslora=kind == "qwen2")
    expected = theirs(model)
    model.save_pretrained(tmp_path / "theirs")
    config, _, params = read_adapted(tmp_path / "theirs", training_layout())
    assert (config.lora.rank, config.lora.alpha) == (3, 7.0)
    assert np.abs(theirs(model.base_model.model) - theirs(model.unload())).max() > 1e-2
    assert_same(ours(config, params), expected)

    (tmp_path / "ours").mkdir()
    params = with_random_b(params)  # no longer one A for all that is fused
    write_adapters(tmp_path / "ours", config, params, str(bases(kind)))
    base = transformers.AutoModelForCausalLM.from_pretrained(bases(kind), dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    expected = ours(config, params)
    assert_same(theirs(again), expected)
    assert_same(ours(*read_adapted(tmp_path / "ours", training_layout())[::2]), expected)


def test_ranks_and_alphas_by_layer(one_device, bases, tmp_path):
    model = wrapped(
        bases("llama"),
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 5, r"layers\.1\.self_attn\.v_proj": 2},
        alpha_pattern={"v_proj": 4},
    )
    expected = theirs(model)
    model.save_pretrained(tmp_path)
    config, _, params = read_adapted(tmp_path, training_layout())
    assert config.lora.rank == 5
    assert_same(ours(config, params), expected)


@pytest.mark.parametrize("kind", ["gpt2", "falcon"])
def test_parts_of_a_fused_layer(one_device, bases, kind, tmp_path):
    """Query and value alone, each with an A of its own: rank 2 x 2 in their fused layer."""
    config = replace(model_folder(str(bases(kind))), lora=LoRA(rank=2, alpha=5.0))
    params = with_random_b(read_params(bases(kind), config, training_layout(), seed=3))
    write_adapters(tmp_path, config, params, str(bases(kind)))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (4, 10)
    base = transformers.AutoModelForCausalLM.from_pretrained(bases(kind), dtype=torch.float32)
    assert_same(theirs(peft.PeftModel.from_pretrained(base, tmp_path)), ours(config, params))


def test_a_mesh_changes_nothing(bases, tmp_path):
    model = wrapped(bases("llama"), target_modules=ALL)
    expected = theirs(model)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    with jax.set_mesh(Mesh(fsdp=4, tensor=2).build()):
        config, _, params = read_adapted(tmp_path / "theirs", training_layout())
        write_adapters(tmp_path / "ours", config, params, str(bases("llama")))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / name).is_file()
    base = transformers.AutoModelForCausalLM.from_pretrained(bases("llama"), dtype=torch.float32)
    assert_same(theirs(peft.PeftModel.from_pretrained(base, tmp_path / "ours")), expected)


def test_a_folder_is_merged_and_converted(one_device, bases, tmp_path):
    model = wrapped(bases("gpt2"))
    model.save_pretrained(tmp_path / "adapters")
    convert(tmp_path / "adapters", tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "merged")
    convert(tmp_path / "adapters", tmp_path / "direct", to_run=False)
    expected = theirs(model)
    for folder in ("merged", "direct"):
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert_same(theirs(merged), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type=.IA3. is not supported, only LORA"),
        ({"use_dora": True}, "use_dora=true is not supported, only false"),
        ({"bias": "all"}, "bias=.all. is not supported, only .none."),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the model's own weights"),
        ({"base_model_name_or_path": "meta-llama/Llama-2-7b"}, "is no model folder here"),
        ({"lora_alpha": 0}, "lora.alpha=0.0: must be above 0"),
    ],
)
def test_what_is_not_plain_is_refused(bases, tmp_path, change, message):
    wrapped(bases("llama")).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        adapter_folder.read_adapted_config(tmp_path)


def test_layers_that_we_do_not_adapt_are_refused(one_device, bases, tmp_path):
    wrapped(bases("llama"), target_modules=["q_proj", "embed_tokens"]).save_pretrained(
        tmp_path / "table"
    )
    with pytest.raises(
        UserError, match=r"embed_tokens.* is for no dense layer of the blocks of a llama"
    ):
        read_adapted(tmp_path / "table", training_layout())
    one = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
    wrapped(bases("llama"), **one).save_pretrained(tmp_path / "last")
    with pytest.raises(UserError, match="some blocks have adapters that others lack"):
        read_adapted(tmp_path / "last", training_layout())
