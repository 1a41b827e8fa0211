"""How long a text of a public model may be, and which model a config.json without a type is."""

import json

import jax
import pytest

from lmjax.config import UserError, replace
from lmjax.generation import Generator, Sampling
from lmjax.generation.beams import BeamSearch
from lmjax.interop import huggingface
from lmjax.interop.families import architectures, family_for
from lmjax.models import bloom, chatglm2, gpt2, initialize, llama, t5, xlnet
from lmjax.models.rotary import LinearScaling
from lmjax.parallel import generation_layout

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
FALCON = LLAMA | {"model_type": "falcon"}
BLOOM = {"model_type": "bloom", "vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4}
T5 = {"model_type": "t5", "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48}
T5 |= {"num_layers": 1, "num_heads": 4, "n_positions": 32}
XLNET = {"model_type": "xlnet", "vocab_size": 64, "d_model": 32, "n_layer": 1, "n_head": 4}
XLNET |= {"d_inner": 48, "max_position_embeddings": 32}
BAICHUAN = LLAMA | {"model_type": "baichuan"}
GPT = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}
BEFORE = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def scaled(base=LLAMA, key="rope_scaling", **rope):
    return base | {key: rope}


CONTEXTS = {
    "none": (LLAMA, 32),
    "yarn, length left as it was": (scaled(type="yarn", factor=4.0, **{BEFORE: 32}), 128),
    "yarn, length raised": (
        scaled(LLAMA | {"max_position_embeddings": 128}, type="yarn", factor=4.0, **{BEFORE: 32}),
        128,
    ),
    "yarn, length raised further": (
        scaled(LLAMA | {"max_position_embeddings": 300}, type="yarn", factor=4.0, **{BEFORE: 32}),
        300,
    ),
    "yarn without the original length": (scaled(type="yarn", factor=2.5), 80),
    "yarn of transformers 5": (
        scaled(key="rope_parameters", rope_type="yarn", factor=4.0, rope_theta=1e6, **{BEFORE: 32}),
        128,
    ),
    "yarn, original beside it": (scaled(LLAMA | {BEFORE: 16}, type="yarn", factor=4.0), 64),
    "linear": (scaled(type="linear", factor=3.0), 96),
    "linear, length raised": (
        scaled(LLAMA | {"max_position_embeddings": 96}, type="linear", factor=3.0, **{BEFORE: 32}),
        96,
    ),
    "dynamic": (scaled(rope_type="dynamic", factor=2.0), 64),
    "llama3": (scaled(**LLAMA3, **{BEFORE: 16}), 128),
    "longrope by its factor": (scaled(**LONG, factor=4.0, **{BEFORE: 32}), 128),
    "longrope by the two lengths": (
        scaled(LLAMA | {"max_position_embeddings": 256}, **LONG, **{BEFORE: 32}),
        256,
    ),
    "default": (scaled(key="rope_parameters", rope_type="default", rope_theta=5.0), 32),
    "falcon, linear": (scaled(FALCON, type="linear", factor=2.0), 64),
    "falcon, seq_length": (FALCON | {"seq_length": 48}, 48),
    "the first conversions": (LLAMA | {"max_sequence_length": 64}, 64),
    "learned": (GPT | {"n_positions": 48}, 48),
    "bloom": (BLOOM | {"seq_length": 32}, None),
    "t5": (T5, None),
    "xlnet": (XLNET, None),
    "baichuan-7b": (BAICHUAN, 32),
    "baichuan-13b": (
        {k: v for k, v in BAICHUAN.items() if k != "max_position_embeddings"}
        | {"model_max_length": 32},
        None,
    ),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_the_context_of_a_public_model(tmp_path, name):
    """And of the one that is written again."""
    settings, expected = CONTEXTS[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = huggingface.read_config(tmp_path)[1]
    assert config.max_length == expected
    family, written = huggingface.family_of(config)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert huggingface.read_config(tmp_path)[1].max_length == expected
    assert family.model_type in (settings["model_type"], "llama")


@pytest.mark.parametrize("name", ["THUDM/chatglm2-6b-32k", "THUDM/chatglm3-6b-32k", None])
def test_what_the_ratio_of_chatglm_means(tmp_path, name):
    """By the programs that were published with both: positions are divided, or the base is larger.

    And what is written is the same again.
    """
    glm = chatglm2()
    settings = huggingface.family_of(glm)[1] | {"rope_ratio": 4, "_name_or_path": name}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = huggingface.read_config(tmp_path)[1]
    usual, divided = glm.attention.positions, name == "THUDM/chatglm2-6b-32k"
    expected = (
        replace(usual, scaling=LinearScaling(factor=4.0))
        if divided
        else replace(usual, base=40_000.0)
    )
    assert config.attention.positions == expected
    (tmp_path / "config.json").write_text(json.dumps(huggingface.family_of(config)[1]))
    assert huggingface.read_config(tmp_path)[1].attention == config.attention


def small(config, **changes):
    """A model of one layer with a vocabulary of 64."""
    attention = replace(config.attention, num_heads=4, num_kv_heads=None, head_dim=8)
    feed_forward = replace(config.feed_forward, size=48)
    sizes = {"vocab_size": 64, "hidden": 32, "num_layers": 1}
    return replace(config, attention=attention, feed_forward=feed_forward, **sizes, **changes)


def generator(config):
    _, params = initialize(config, generation_layout(), jax.random.key(0))
    return Generator(config, params, unstack=False)


def test_relative_positions_have_no_longest_text(one_device):
    """The prompt is longer than any length that was ever stated; searched, too."""
    written = generator(small(bloom()))
    assert len(written.generate([[1] * 40], Sampling(temperature=0), 3)[0]) == 3
    (found,) = BeamSearch(written)([[1] * 40], beams=2, max_tokens=3)
    assert len(found[0].tokens) == 3


def test_no_source_is_too_long(one_device):
    config = small(t5(), encoder_layers=1)
    found = generator(config).generate([[0]], Sampling(temperature=0), 3, sources=[[1] * 40])
    assert len(found[0]) == 3


def test_a_context_that_ends(one_device):
    """Where a table does, and where rotary positions were not made for more; what can be done."""
    rotary = generator(small(llama(), max_length=32))
    with pytest.raises(UserError, match=r"prompt 1 has 33 tokens, more than the 32.*rope_scaling"):
        rotary.generate([[1] * 33], max_tokens=3)
    assert len(rotary.generate([[1] * 31], Sampling(temperature=0), 5)[0]) == 2
    table = generator(small(gpt2(), max_length=32))
    with pytest.raises(UserError, match=r"more than the 32 .* table of positions has 32 rows"):
        table.generate([[1] * 33], max_tokens=3)


@pytest.mark.parametrize("model", [bloom(), t5(), xlnet()], ids=["bloom", "t5", "xlnet"])
def test_the_presets_of_relative_positions_have_none(model):
    assert model.max_length is None


# 2019's, and others that say what they are in another way.
KINDS = [
    ({"architectures": ["BertForMaskedLM"]}, "bert"),
    ({"architectures": ["BertForSequenceClassification"]}, "bert"),
    ({"architectures": ["BertModel"]}, "bert"),
    ({"architectures": ["GPT2LMHeadModel"]}, "gpt2"),
    ({"architectures": ["GPT2DoubleHeadsModel"]}, "gpt2"),
    ({"architectures": ["OpenAIGPTLMHeadModel"]}, "openai-gpt"),
    ({"architectures": ["LLaMAForCausalLM"]}, "llama"),
    ({"architectures": ["Qwen2ForCausalLM"]}, "qwen2"),
    ({"architectures": ["Gemma2ForCausalLM"]}, "gemma2"),
    ({"architectures": ["T5ForConditionalGeneration"]}, "t5"),
    ({"architectures": ["T5WithLMHeadModel"]}, "t5"),
    ({"architectures": ["XLNetLMHeadModel"]}, "xlnet"),
    ({"architectures": ["BertModel"], "model_type": None}, "bert"),
    ({"architectures": ["LlamaForCausalLM"], "model_type": ""}, "llama"),
    (dict.fromkeys(("n_ctx", "n_embd", "n_head", "n_layer", "n_positions")), "gpt2"),
    (dict.fromkeys(("n_ctx", "n_embd", "n_head", "n_layer", "n_positions", "afn")), "openai-gpt"),
    (dict.fromkeys(("hidden_act", "intermediate_size", "type_vocab_size")), "bert"),
    (dict.fromkeys(("d_model", "d_inner", "ff_activation")), "xlnet"),
    (dict.fromkeys(("d_model", "d_kv", "d_ff")), "t5"),
]


@pytest.mark.parametrize(("settings", "kind"), KINDS, ids=str)
def test_a_family_without_its_name(tmp_path, settings, kind):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert huggingface.is_model_folder(tmp_path)
    assert family_for(settings).model_type == kind
    assert f"model_type={kind}" in huggingface.assumption(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"architectures": ["RobertaForMaskedLM"], "hidden_act": "gelu", "type_vocab_size": 1},
        {"architectures": ["BertGenerationDecoder"]},
        {"hidden_act": "gelu", "intermediate_size": 3, "type_vocab_size": 2, "embedding_size": 4},
        {"n_embd": 3, "n_head": 3, "n_layer": 3, "n_positions": 3, "dff": 3},
        {"architectures": "RobertaModel"},
        {"hidden_size": 3, "model": {}},
        {},
    ],
    ids=str,
)
def test_what_to_add_is_said(tmp_path, settings):
    """Other models have much the same keys: they are not guessed."""
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r'there is no model_type.*add "model_type"') as error:
        huggingface.read_config(tmp_path)
    assert all(name in str(error.value) for name in architectures(settings))
    assert huggingface.assumption(tmp_path) == ""


def test_a_run_is_no_public_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"class": "Pretrain", "model": {}}))
    assert not huggingface.is_model_folder(tmp_path)
    assert not huggingface.is_model_folder(tmp_path / "nowhere")
