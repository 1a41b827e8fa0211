"""The decoder families beside transformers' own classes, live, on random configurations.

What is pinned of transformers 5, and why: eager attention, because its sdpa has no soft caps; a
mask that says what is padding, and one document a row, because rows of several are another matter
(test_transformers_packed.py); positions for GPT-1 and 2, which count padding otherwise; float32 by
name, because the dtype of a folder is obeyed by default. Tokens are numbers here: tokenizers begin
otherwise than those of transformers 4 (tests/lmjax/data).
"""

import math
import os

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.config import replace
from lmjax.generation import Generator, Sampling
from lmjax.generation.prompts import left_padded
from lmjax.interop import huggingface
from lmjax.models import (
    abstract,
    bloom,
    falcon,
    gemma2,
    gpt1,
    gpt2,
    llama,
    llama2,
    mistral,
    opt,
    skywork,
)
from lmjax.parallel import training_layout

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # nothing is downloaded
EXTRA = "the live comparison needs the extra parity: pip install -e '.[parity]', on Python 3.11"
torch = pytest.importorskip("torch", reason=EXTRA)
transformers = pytest.importorskip("transformers", reason=EXTRA)
torch.set_num_threads(1)  # the models are tiny, and waiting threads keep cores busy

CASES = 10  # configurations of a family
LENGTH, NEW = 12, 8  # tokens of the longest prompt, and after it


def options(key, *values):
    """A column of the table below: one setting, and what it may be."""
    return tuple({key: value} for value in values)


def sizes(keys, *rows):
    """A column of the table below: several settings at once. Few rows, so few things to compile."""
    return tuple(dict(zip(keys.split(), row)) for row in rows)


def rotary(kind="default", base=10_000.0, **rest):
    """Rotary positions of one kind; lengths of training below those of the prompts."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": base, **rest}}


ROTARY = (
    rotary(),
    rotary(base=100.0),
    rotary("linear", factor=3.0),
    rotary("linear", base=500.0, factor=1.5),
    rotary("yarn", factor=4.0, original_max_position_embeddings=8),
    rotary("yarn", 100.0, factor=8.0, original_max_position_embeddings=300, attention_factor=0.9),
    rotary(
        "yarn", 50.0, factor=2.0, original_max_position_embeddings=64, beta_fast=4.0, beta_slow=0.5
    ),
    rotary(
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8,
    ),
    rotary(
        "llama3",
        100.0,
        factor=4.0,
        low_freq_factor=0.5,
        high_freq_factor=6.0,
        original_max_position_embeddings=100,
    ),
)
TIED = options("tie_word_embeddings", True, False)
LENGTHS = options("max_position_embeddings", 32, 48)
GPT = (
    sizes("n_layer vocab_size n_embd n_head", (2, 97, 32, 4), (1, 61, 24, 3), (3, 131, 32, 2)),
    TIED,
    options("n_positions", 32, 48),
    options("layer_norm_epsilon", 1e-5, 1e-3),
)
SIZES = (
    "num_hidden_layers vocab_size intermediate_size"
    " hidden_size num_attention_heads num_key_value_heads head_dim"
)
GROUPS = sizes(
    SIZES, (2, 97, 40, 32, 4, 2, 8), (1, 61, 64, 24, 3, 1, 16), (3, 131, 64, 32, 4, 4, 8)
)
LLAMA = (GROUPS, ROTARY, TIED, LENGTHS, options("rms_norm_eps", 1e-6, 1e-2))
ATTENTION_BIAS = options("attention_bias", True, False)
# By model_type: columns, each of which gives every configuration one of its rows.
FAMILIES = {
    "openai-gpt": (*GPT, options("afn", "gelu", "relu", "silu", "swish")),
    "gpt2": (
        *GPT,
        options("n_inner", None, 40),
        options("activation_function", "gelu_new", "gelu", "relu", "silu", "gelu_pytorch_tanh"),
    ),
    "llama": (*LLAMA, ATTENTION_BIAS, options("mlp_bias", True, False)),
    "mistral": (*LLAMA, options("sliding_window", 4, 7, None)),
    # Qwen2's heads are as wide as their share of the hidden size.
    "qwen2": (*LLAMA, options("head_dim", 8)),
    "qwen3": (*LLAMA, ATTENTION_BIAS),
    "gemma": (*LLAMA, ATTENTION_BIAS, options("hidden_act", "gelu_pytorch_tanh", "gelu")),
    "gemma2": (
        *LLAMA,
        ATTENTION_BIAS,
        options("num_hidden_layers", 2, 2, 4),
        options("sliding_window", 4, 7),
        options("query_pre_attn_scalar", 8, 21, 64),
        options("attn_logit_softcapping", 0.5, 5.0, None),
        options("final_logit_softcapping", 1.0, 5.0, None),
    ),
    "opt": (
        # With 350M's narrow tables in the second and fourth.
        sizes(
            "num_hidden_layers vocab_size hidden_size num_attention_heads word_embed_proj_dim",
            (2, 97, 32, 4, 32),
            (2, 97, 32, 4, 16),
            (1, 61, 24, 3, 24),
            (3, 131, 24, 2, 32),
        ),
        TIED,
        LENGTHS,
        options("ffn_dim", 40, 64),
        options("do_layer_norm_before", True, False),
        options("activation_function", "relu", "gelu", "gelu_new"),
        options("enable_bias", True, False, True),
    ),
    "bloom": (
        # Numbers of heads that are powers of two, and that are not.
        sizes(
            "n_layer vocab_size hidden_size n_head",
            (2, 97, 32, 4),
            (1, 61, 24, 3),
            (3, 131, 48, 6),
            (2, 97, 16, 1),
        ),
        TIED,
        options("layer_norm_epsilon", 1e-5, 1e-3),
    ),
    "falcon": (
        sizes(
            "num_hidden_layers vocab_size hidden_size num_attention_heads ffn_hidden_size",
            (2, 97, 32, 4, None),
            (1, 61, 48, 6, 40),
            (3, 131, 32, 4, 40),
        ),
        (
            # 7B: one key head; its smaller sister: as many as query heads.
            {"new_decoder_architecture": False, "multi_query": True},
            {"new_decoder_architecture": False, "multi_query": False},
            # 40B: groups and two norms; 11B: groups and one norm.
            {"new_decoder_architecture": True, "num_kv_heads": 2},
            {"new_decoder_architecture": True, "num_kv_heads": 1},
            {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        ),
        TIED,
        LENGTHS,
        options("bias", True, False),
        (rotary(), rotary(base=100.0)),
        options("layer_norm_epsilon", 1e-5, 1e-3),
    ),
}


def configurations(family):
    """CASES random configurations; each row of each column is in one, if it has no more."""
    draw = np.random.default_rng(list(FAMILIES).index(family))
    columns = [draw.permutation(np.resize(column, CASES)) for column in FAMILIES[family]]
    return [{k: v for part in row for k, v in part.items()} for row in zip(*columns)]


def random_model(family, settings, seed):
    """A model of transformers', eager and in float32, with nothing left at 0 or 1."""
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(family, **settings, **ends)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # of norms and biases
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]))
    return model.eval()


def prompts(vocab_size, seed):
    """Two rows; in every other case the second is shorter, and padded on the left."""
    draw = np.random.default_rng(seed)
    lengths = (LENGTH, LENGTH - 5 * (seed % 2))
    return [draw.integers(0, vocab_size, length).tolist() for length in lengths]


def their_logits(model, batch):
    """Logits of a padded batch."""
    inputs = {"input_ids": batch.tokens, "attention_mask": batch.segments}
    if model.config.model_type in ("openai-gpt", "gpt2"):  # the others find positions by themselves
        inputs["position_ids"] = batch.positions
    with torch.no_grad():
        return model(**{k: torch.tensor(v, dtype=torch.long) for k, v in inputs.items()}).logits


def their_tokens(model, prompt):
    """What `generate` chooses, through its own cache where the family has one."""
    tokens = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    return tokens[0, len(prompt) :].tolist()


def our_logits(config, params, batch):
    """Logits of a padded batch, of the real vocabulary."""
    graph, _ = abstract(config, training_layout())

    def run(params, batch):
        model = nnx.merge(graph, params)
        return model.logits(model(batch)[0])

    return np.asarray(jax.jit(run)(params, batch))[..., : config.vocab_size]


def load(folder):
    """What transformers makes of a folder; nothing is missing or left over."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    return model.eval()


def assert_close(found, expected, batch, tolerance):
    """Equal at all tokens that are no padding.

    The tolerance is relative to the largest logit. 2e-5 is what float32 sums in another order
    come to (each side differs from its own float64 by up to a few 1e-6) with room for platforms.
    """
    real = batch.segments == 1
    found, expected = np.asarray(found)[real], np.asarray(expected)[real]
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("family", "number"), [(family, number) for family in FAMILIES for number in range(CASES)]
)
def test_logits_tokens_and_back(one_device, tmp_path, family, number):
    """Theirs is read: same logits, same greedy tokens; written again: the very same model."""
    settings = configurations(family)[number]
    model = random_model(family, settings, number)
    model.save_pretrained(tmp_path / "theirs")
    config, _, params = huggingface.read(tmp_path / "theirs", training_layout())

    rows = prompts(config.vocab_size, number)
    batch = left_padded(rows, LENGTH)
    expected = their_logits(model, batch)
    assert_close(our_logits(config, params, batch), expected, batch, 2e-5)
    # Layers in one stack give the tokens of layers apart, and are sooner compiled.
    generator = Generator(config, params, unstack=False)
    tokens = generator.generate(rows, Sampling(temperature=0.0), NEW)
    assert tokens == [their_tokens(model, row) for row in rows]

    huggingface.write(tmp_path / "ours", config, params)
    again = load(tmp_path / "ours")
    assert_close(their_logits(again, batch), expected, batch, 1e-6)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name


# Presets, and the classes that they are for transformers.
PRESETS = {
    "gpt1": (gpt1(), "OpenAIGPTLMHeadModel"),
    "gpt2": (gpt2(), "GPT2LMHeadModel"),
    "opt": (opt(), "OPTForCausalLM"),
    "opt_350m": (opt("350M"), "OPTForCausalLM"),
    "bloom": (bloom(), "BloomForCausalLM"),
    "llama": (llama(), "LlamaForCausalLM"),
    "llama2_70b": (llama2("70B"), "LlamaForCausalLM"),
    "skywork": (skywork(), "LlamaForCausalLM"),
    "mistral": (mistral(), "MistralForCausalLM"),
    "gemma2": (gemma2(), "Gemma2ForCausalLM"),
    "falcon_7b": (falcon("7B"), "FalconForCausalLM"),
    "falcon_40b": (falcon("40B"), "FalconForCausalLM"),
}


def shrunk(config):
    """The same kind of model, tiny; its windows are shorter than the prompts."""
    heads, kv_heads = config.attention.num_heads, config.attention.kv_heads
    return replace(
        config,
        vocab_size=97,
        hidden=32,
        num_layers=2,
        max_length=32,
        embedding_size=config.embedding_size and 16,
        embedding_scale=config.embedding_scale if config.embedding_scale == 1 else math.sqrt(32),
        attention=replace(
            config.attention,
            num_heads=4,
            num_kv_heads=4 if kv_heads == heads else min(kv_heads, 2),
            head_dim=8,
            windows=tuple(window and 5 for window in config.attention.windows),
        ),
        feed_forward=replace(config.feed_forward, size=4 * 32),
    )


def random_parameters(config, seed):
    """Parameters with nothing left at 0 or 1."""
    draw = np.random.default_rng(seed)

    def leaf(path, shape):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        value = 0.3 * draw.standard_normal(shape.shape, np.float32)
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), shape.sharding.spec)
        return jax.device_put(value + np.float32(name == "scale"), sharding)

    return jax.tree.map_with_path(leaf, abstract(config, training_layout())[1])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_written_for_transformers(one_device, tmp_path, name):
    """A model that began here gives the same logits there."""
    config, architecture = shrunk(PRESETS[name][0]), PRESETS[name][1]
    params = random_parameters(config, 1)
    huggingface.write(tmp_path, config, params)
    model = load(tmp_path)
    assert type(model).__name__ == architecture
    batch = left_padded(prompts(config.vocab_size, 1), LENGTH)
    expected = their_logits(model, batch)
    assert_close(our_logits(config, params, batch), expected, batch, 2e-5)
