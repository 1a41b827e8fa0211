"""Every setting of config.json that transformers knows for a family, and what becomes of it here.

python -m tests.lmjax.interop.settings_table > lmjax/interop/SETTINGS.md
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

HEADER = """# What becomes of the settings of a public folder

config.json of every family that transformers has, setting by setting, as transformers 5 reads it:

- obeyed: models with these values give the numbers of transformers (logits within 2e-5 of the
  largest, greedy tokens equal), and are written for it again;
- refused: the model would be computed otherwise; a message names the setting and what is allowed;
- ignored: the setting changes no number, in transformers and here;
- told (of generation_config.json): it is said when the model is loaded, and a setting of the
  command decides.

A setting that is not there means what transformers takes it for. Each value of these tables is
tried: tests/lmjax/interop/test_transformers.py makes a model of transformers' with it and compares.
tests/lmjax/interop/settings_table.py holds them; this page is printed from there.
"""

Column = tuple[dict[str, Any], ...]  # settings that are given together, one way after another


@dataclasses.dataclass(frozen=True)
class Table:
    """The settings of one family.

    Attributes:
      obeyed: columns; models are made with a row of each, and give the same numbers.
      refused: values with which the model is computed otherwise; the message names the key.
      ignored: values that change no number, there and here.
      remarks: what a reader of the page should know of a key.
    """

    obeyed: tuple[Column, ...]
    refused: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    remarks: dict[str, str] = dataclasses.field(default_factory=dict)


def options(key: str, *values: Any) -> Column:
    """A column of one setting."""
    return tuple({key: value} for value in values)


def rows(keys: str, *values: tuple) -> Column:
    """A column of several settings. Few rows where they are sizes, so few things to compile."""
    return tuple(dict(zip(keys.split(), row)) for row in values)


def rope(kind: str = "default", base: float = 10_000.0, **rest: Any) -> dict[str, Any]:
    """Rotary positions of one kind; lengths of training below those of the prompts."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": base, **rest}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
FOURS = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 5.0, 9.0]}
BEFORE = "original_max_position_embeddings"
# Factors of longrope are for heads of 8.
ROTARY = (
    rope(),
    rope("yarn", factor=4.0, **{BEFORE: 8}),
    rope("dynamic", 100.0, factor=4.0) | {"max_position_embeddings": 8},
    rope("linear", factor=3.0),
    rope("llama3", factor=8.0, **LLAMA3, **{BEFORE: 8}),
    rope("yarn", 100.0, factor=8.0, attention_factor=0.9, **{BEFORE: 300}),
    rope("yarn", 50.0, factor=2.0, beta_fast=4.0, beta_slow=0.5, **{BEFORE: 64}),
    rope("yarn", 100.0, factor=2.0, truncate=False, beta_fast=8.0, **{BEFORE: 32}),
    rope("yarn", factor=4.0, mscale=1.5, mscale_all_dim=0.5, **{BEFORE: 8}),
    rope("dynamic", factor=2.0) | {"max_position_embeddings": 16},
)
MORE_ROTARY = (
    rope(base=100.0, partial_rotary_factor=0.5),  # which the default kind has no use for
    rope("yarn", factor=None, **{BEFORE: 8}),
    rope("yarn", factor=2.0) | {BEFORE: 8},
    rope("yarn", factor=0.5, mscale=1.5, mscale_all_dim=0.5, **{BEFORE: 48}),
    rope("linear", base=500.0, factor=1.5, attention_factor=3.0),
    rope("llama3", 100.0, factor=4.0, low_freq_factor=0.5, high_freq_factor=6.0, **{BEFORE: 100}),
    rope("yarn", 1e6, factor=4.0),
)
LONGROPE = (
    rope("longrope", **FOURS, **{BEFORE: 10}) | {"max_position_embeddings": 64},
    rope("longrope", 100.0, factor=4.0, **FOURS, **{BEFORE: 16}),
    rope("longrope", factor=4.0, attention_factor=0.8, **FOURS) | {BEFORE: 4},
)
ACTIVATIONS = (
    *("gelu_new", "gelu", "relu", "silu", "gelu_pytorch_tanh"),
    *("swish", "gelu_python_tanh", "gelu_fast", "gelu_accurate", "gelu_python"),
)
UNKNOWN = ("quick_gelu", "mish", "relu2", "tanh")  # transformers has them, we do not
TIED = options("tie_word_embeddings", True, False)
LENGTHS = options("max_position_embeddings", 32, 48)
GPT = (
    rows("n_layer vocab_size n_embd n_head", (2, 97, 32, 4), (1, 61, 24, 3), (3, 131, 32, 2)),
    TIED,
    options("n_positions", 32, 48),
    options("layer_norm_epsilon", 1e-5, 1e-3),
    options("resid_pdrop", 0.1, 0.3),
    options("attn_pdrop", 0.2, 0.1),
)
SIZES = (
    "num_hidden_layers vocab_size intermediate_size"
    " hidden_size num_attention_heads num_key_value_heads head_dim"
)
GROUPS = rows(SIZES, (2, 97, 40, 32, 4, 2, 8), (1, 61, 64, 24, 3, 1, 16), (3, 131, 64, 32, 4, 4, 8))
EIGHTS = rows(SIZES, (2, 97, 40, 32, 4, 2, 8), (3, 131, 64, 32, 4, 4, 8))
LLAMA = (
    LENGTHS,
    TIED,
    options("rms_norm_eps", 1e-6, 1e-2),
    options("attention_dropout", 0.0, 0.2),
)
BIAS = options("attention_bias", True, False)
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWED = "num_hidden_layers use_sliding_window sliding_window max_window_layers layer_types"
QWEN_WINDOWS = rows(
    WINDOWED,
    (3, False, 4, 0, None),
    (3, True, 4, 1, None),
    (2, True, 5, 2, None),  # no layer is left
    (2, True, 5, 28, None),
    (3, True, None, 0, None),
    (5, True, 4, 0, [SLIDING, FULL, SLIDING, FULL, SLIDING]),
    (4, True, 4, 4, [FULL, SLIDING, SLIDING, FULL]),
)
ROPE_REFUSED = {
    "rope_parameters.rope_type": ("proportional", "axial", "mrope"),
    "rope_scaling.type": ("proportional", "mrope"),
    "rope_parameters.full_attention": ({"rope_type": "default"},),
}
ROPE_REMARKS = {
    "rope_parameters": "rope_scaling, rope_theta and type of older files mean the same",
    "rope_parameters.rope_type": "rotations that differ between layers or axes",
    "rope_parameters.full_attention": "rotations that differ between layers",
    BEFORE: "beside rope_parameters too; factor times it is the context, where that is more than"
    " max_position_embeddings",
    "partial_rotary_factor": "no scaling of a part of each head, which transformers cannot compute",
}
BIASLESS = {"attention_bias": (True,), "mlp_bias": (True,)}  # of families that have none
# What config.json says of every model.
EVERY_REFUSED = {
    "quantization_config": ({"quant_method": "bitsandbytes"},),
    "is_encoder_decoder": (True,),
    "num_experts": (8,),
    "num_local_experts": (8,),
    "n_routed_experts": (8,),
    "pruned_heads": ({"0": [1]},),
    "transformers_weights": ("other.safetensors",),
    "per_layer_config": ({"1": {"rms_norm_eps": 0.5}},),
    "is_causal": (False,),
}
EVERY_IGNORED = {
    "use_cache": (False,),
    "output_attentions": (True,),
    "output_hidden_states": (True,),
    "return_dict": (True,),
    "chunk_size_feed_forward": (1,),
    "id2label": ({"0": "a", "1": "b", "2": "c"},),
    "label2id": ({"a": 0, "b": 1, "c": 2},),
    "problem_type": ("regression",),
    "initializer_range": (0.5,),
    "transformers_version": ("4.30.0",),
    "_name_or_path": ("somewhere/else",),
    "classifier_dropout": (0.3,),
}
EVERY_REMARKS = {
    "quantization_config": "other than gptq, awq and compressed-tensors",
    "transformers_weights": "names another file of weights",
    "is_causal": "makes an encoder of a decoder",
    "classifier_dropout": "in the training of a head on labels, where it is obeyed",
    "id2label": "obeyed where there is a head on labels: the names of its outputs",
    "label2id": "the opposite of id2label",
    "problem_type": "kept where there is a head on labels",
    "initializer_range": "how fresh weights are drawn",
    "dtype": "and torch_dtype: parameters are float32 here, and computed with in model.dtype",
    "architectures": "which heads there are; where weights lie beside config.json, they tell it",
    "model_type": "where it is missing, architectures or the other keys tell it",
    "bos_token_id": "see generation_config.json",
    "eos_token_id": "see generation_config.json",
    "pad_token_id": "a row of the token table that transformers does not train further; by it"
    " transformers finds a text's last token, for a head on labels, which we find by its length",
}
SUMMARY = ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels")
GPT_IGNORED = {
    **{key: ("last",) if key == "summary_type" else (None,) for key in SUMMARY[:1]},
    "summary_use_proj": (False,),
    "summary_activation": ("tanh",),
    "summary_proj_to_labels": (False,),
    "summary_first_dropout": (0.3,),
    "embd_pdrop": (0.3,),
}
GPT_REMARKS = {
    "embd_pdrop": "in training: embeddings are dropped at the rate resid_pdrop",
    **{key: "of heads that are not read" for key in (*SUMMARY, "summary_first_dropout")},
}
TABLES = {
    "openai-gpt": Table(
        (*GPT, options("afn", "gelu", "relu", "silu", "swish")),
        {"afn": ("tanh", "gelu_new")},
        {**GPT_IGNORED, "n_inner": (40,), "is_causal": (False,)},
        {**GPT_REMARKS, "afn": '"gelu" is the tanh form'},
    ),
    "gpt2": Table(
        (
            *GPT,
            options("n_inner", None, 40),
            options("activation_function", *ACTIVATIONS),
            options("scale_attn_weights", True, False),
        ),
        {
            "activation_function": UNKNOWN,
            "scale_attn_by_inverse_layer_idx": (True,),
            "add_cross_attention": (True,),
        },
        {**GPT_IGNORED, "reorder_and_upcast_attn": (True,), "n_ctx": (7,)},
        {**GPT_REMARKS, "reorder_and_upcast_attn": "scores are always float32 here"},
    ),
    "llama": Table(
        (GROUPS, *LLAMA, ROTARY, BIAS, options("mlp_bias", True, False)),
        {**ROPE_REFUSED, "hidden_act": UNKNOWN, "layer_types": ([SLIDING, FULL],)},
        {"pretraining_tp": (4,), "sliding_window": (4,)},
        {**ROPE_REMARKS, "sliding_window": "LLaMAs have no windows"},
    ),
    "mistral": Table(
        (EIGHTS, *LLAMA, LONGROPE, options("sliding_window", 4, 7, None)),
        {**ROPE_REFUSED, "hidden_act": UNKNOWN, "layer_types": ([SLIDING, FULL],)},
        BIASLESS,
        ROPE_REMARKS,
    ),
    "mixtral": Table(
        (
            EIGHTS,
            *LLAMA,
            ROTARY[:5],
            options("hidden_act", "silu", "gelu", "relu"),
            options("sliding_window", 4, None, None),
            rows("num_local_experts num_experts_per_tok", (4, 2), (8, 2), (5, 3)),
            options("router_jitter_noise", 0.0, 0.1),
        ),
        {
            **ROPE_REFUSED,
            "hidden_act": UNKNOWN,
            "num_experts_per_tok": (1,),
            **dict.fromkeys(("num_experts", "num_local_experts"), ()),  # which others refuse
        },
        {**BIASLESS, "router_aux_loss_coef": (0.5,), "output_router_logits": (True,)},
        {
            **ROPE_REMARKS,
            "num_experts": "means num_local_experts",
            "num_experts_per_tok": "in training one expert's weight would always be 1",
            "router_jitter_noise": "in training; of the router's input alone",
            "router_aux_loss_coef": "in training; the loss is model.feed_forward.router.balance",
            "output_router_logits": "in training; the metrics have the router's losses",
        },
    ),
    "qwen2": Table(
        # Qwen2's heads are as wide as their share of the hidden size.
        (
            GROUPS,
            *LLAMA,
            MORE_ROTARY,
            options("head_dim", 8),
            options("hidden_act", *ACTIVATIONS),
            QWEN_WINDOWS,
        ),
        {**ROPE_REFUSED, "hidden_act": UNKNOWN, "layer_types": (["chunked_attention"] * 2,)},
        BIASLESS,
        ROPE_REMARKS,
    ),
    "qwen3": Table(
        (GROUPS, *LLAMA, ROTARY[:3], BIAS, QWEN_WINDOWS),
        {**ROPE_REFUSED, "hidden_act": UNKNOWN, "layer_types": (["chunked_attention"] * 2,)},
        {"mlp_bias": (True,)},
        ROPE_REMARKS,
    ),
    "gemma": Table(
        (
            GROUPS,
            *LLAMA,
            ROTARY[:5],
            BIAS,
            options("hidden_act", "gelu_pytorch_tanh", "gelu", "silu", "relu"),
        ),
        {
            **ROPE_REFUSED,
            "hidden_act": UNKNOWN,
            "hidden_activation": ("silu", "gelu"),
            "use_bidirectional_attention": (True,),
            "layer_types": ([SLIDING, FULL],),
        },
        {"mlp_bias": (True,)},
        {
            **ROPE_REMARKS,
            "hidden_act": '"gelu" is the tanh form',
            "hidden_activation": "which versions before 5 go by, and later ones do not",
        },
    ),
    "gemma2": Table(
        (
            GROUPS,
            *LLAMA,
            ROTARY[:2],
            BIAS,
            rows(
                "num_hidden_layers layer_types",
                (2, None),
                (3, None),  # the pattern ends in its middle
                (5, None),
                (3, [FULL, SLIDING, SLIDING]),
                (2, [FULL, FULL]),
            ),
            options("hidden_activation", "gelu_pytorch_tanh", "gelu", "silu", "relu"),
            options("sliding_window", 4, 7),
            options("query_pre_attn_scalar", 8, 21, 64),
            options("attn_logit_softcapping", 0.5, 5.0, None),
            options("final_logit_softcapping", 1.0, 5.0, None),
        ),
        {
            **ROPE_REFUSED,
            "hidden_activation": UNKNOWN,
            "use_bidirectional_attention": (True,),
            "layer_types": (["chunked_attention"] * 2, [FULL]),
        },
        {"mlp_bias": (True,), "hidden_act": ("relu",)},
        {**ROPE_REMARKS, "hidden_act": "Gemma 2 goes by hidden_activation"},
    ),
    "opt": Table(
        (
            # With 350M's narrow tables in the second and fourth.
            rows(
                "num_hidden_layers vocab_size hidden_size num_attention_heads word_embed_proj_dim",
                (2, 97, 32, 4, 32),
                (2, 97, 32, 4, 16),
                (1, 61, 24, 3, None),
                (3, 131, 24, 2, 32),
            ),
            TIED,
            LENGTHS,
            options("ffn_dim", 40, 64),
            options("do_layer_norm_before", True, False),
            options("activation_function", *ACTIVATIONS),
            options("enable_bias", True, False, True),
            options("dropout", 0.1, 0.2),
            options("attention_dropout", 0.0, 0.3),
        ),
        {
            "activation_function": UNKNOWN,
            "_remove_final_layer_norm": (True,),
            "layer_norm_elementwise_affine": (False,),
        },
        {"layerdrop": (0.5,), "init_std": (0.7,)},
        {
            "layerdrop": "in training: layers are never left out here",
            "init_std": "how fresh weights are drawn",
        },
    ),
    "bloom": Table(
        (
            # Numbers of heads that are powers of two, and that are not.
            rows(
                "n_layer vocab_size hidden_size n_head",
                (2, 97, 32, 4),
                (1, 61, 24, 3),
                (3, 131, 48, 6),
                (2, 97, 16, 1),
            ),
            TIED,
            options("layer_norm_epsilon", 1e-5, 1e-3),
            options("hidden_dropout", 0.0, 0.2),
            options("attention_dropout", 0.0, 0.3),
        ),
        {"apply_residual_connection_post_layernorm": (True,)},
        {"pretraining_tp": (2,), "slow_but_exact": (True,), "seq_length": (4,)},
        {"seq_length": "ALiBi has no longest text"},
    ),
    "falcon": Table(
        (
            rows(
                "num_hidden_layers vocab_size hidden_size num_attention_heads ffn_hidden_size",
                (2, 97, 32, 4, None),
                (1, 61, 48, 6, 40),
                (3, 131, 32, 4, 40),
            ),
            rows(
                "new_decoder_architecture multi_query num_kv_heads num_ln_in_parallel_attn",
                # 7B: one key head; its smaller sister: as many as query heads.
                (False, True, None, None),
                (False, False, None, 1),
                # 40B: groups and two norms; 11B: groups and one norm.
                (True, True, 2, None),
                (True, False, 1, 2),
                (True, True, 2, 1),
            ),
            TIED,
            LENGTHS,
            options("bias", True, False),
            (rope(), rope(base=100.0), *ROTARY[1:5]),
            options("activation", *ACTIVATIONS),
            options("layer_norm_epsilon", 1e-5, 1e-3),
            options("hidden_dropout", 0.0, 0.2),
            options("attention_dropout", 0.0, 0.3),
        ),
        {
            **ROPE_REFUSED,
            "activation": UNKNOWN,
            "alibi": (True,),
            "parallel_attn": (False,),
            "num_ln_in_parallel_attn": (2,),
        },
        {},
        {
            **ROPE_REMARKS,
            "num_ln_in_parallel_attn": "two norms need new_decoder_architecture, there as here",
        },
    ),
    "bert": Table(
        (
            rows(
                "num_hidden_layers vocab_size hidden_size num_attention_heads intermediate_size",
                (2, 97, 32, 4, 40),
                (1, 61, 24, 3, 64),
                (3, 131, 32, 2, 40),
            ),
            LENGTHS,
            options("type_vocab_size", 2, 3),
            options("layer_norm_eps", 1e-12, 1e-3),
            options("hidden_act", *ACTIVATIONS),
            options("hidden_dropout_prob", 0.1, 0.2),
            options("attention_probs_dropout_prob", 0.1, 0.3),
        ),
        {
            "hidden_act": UNKNOWN,
            "is_decoder": (True,),
            "add_cross_attention": (True,),
            "tie_word_embeddings": (False,),
            "position_embedding_type": ("relative_key", "relative_key_query"),
        },
        {"is_causal": (False,)},
        {"position_embedding_type": "which versions before 5 go by, and later ones do not"},
    ),
    "t5": Table(
        (
            rows(
                "num_layers num_decoder_layers vocab_size d_model num_heads d_kv d_ff",
                (2, None, 97, 32, 4, 8, 40),
                (1, 3, 61, 24, 3, 16, 64),
                (3, 2, 131, 32, 2, 8, 40),
            ),
            (
                *options(
                    "feed_forward_proj",
                    *("relu", "gated-gelu", "gelu", "gated-silu", "swish", "gated-gelu_python"),
                ),
                {"feed_forward_proj": "gated-gelu", "dense_act_fn": "relu"},
                {"feed_forward_proj": "relu", "dense_act_fn": "silu", "is_gated_act": True},
            ),
            rows(
                "relative_attention_num_buckets relative_attention_max_distance",
                (8, 6),
                (32, 128),
                (6, 10),
                (5, 9),
            ),
            options("layer_norm_epsilon", 1e-6, 1e-3),
            rows(
                "tie_word_embeddings scale_decoder_outputs",
                (True, True),
                (False, False),
                (False, True),
                (True, False),
            ),
            options("dropout_rate", 0.1, 0.2),
        ),
        {
            "feed_forward_proj": ("gated-mish", "mish", "gelu-gated"),
            "dense_act_fn": UNKNOWN,
            "is_encoder_decoder": (False,),
        },
        {"initializer_factor": (0.5,), "n_positions": (4,), "is_decoder": (True,)},
        {
            "n_positions": "relative positions have no longest text",
            "initializer_factor": "how fresh weights are drawn",
            "is_decoder": "set for each of the two stacks",
            "dense_act_fn": "comes before feed_forward_proj, whose part it is",
            "is_gated_act": "comes before feed_forward_proj, whose part it is",
        },
    ),
    "xlnet": Table(
        (
            rows(
                "n_layer vocab_size d_model n_head d_inner d_head",
                (2, 97, 32, 4, 40, 8),
                (1, 61, 24, 3, 64, None),
                (3, 131, 32, 2, 40, 16),
            ),
            TIED,
            options("ff_activation", *ACTIVATIONS),
            options("layer_norm_eps", 1e-12, 1e-3),
            options("dropout", 0.1, 0.2),
        ),
        {
            "ff_activation": UNKNOWN,
            "attn_type": ("uni",),
            "bi_data": (True,),
            "clamp_len": (4,),
        },
        {
            "mem_len": (3,),
            "reuse_len": (2,),
            "same_length": (True,),
            "use_mems_eval": (False,),
            "use_mems_train": (True,),
            "untie_r": (False,),
            "is_causal": (False,),
            "summary_type": ("mean",),
            "summary_use_proj": (False,),
            "summary_activation": ("relu",),
            "summary_last_dropout": (0.3,),
            "start_n_top": (2,),
            "end_n_top": (3,),
        },
        {
            "mem_len": "texts are read at once here",
            **{key: "of heads that are not read" for key in ("start_n_top", "end_n_top")},
            **{key: "of heads that are not read" for key in (*SUMMARY, "summary_last_dropout")},
        },
    ),
}

TOKENIZERS, FAMILY_TOKENIZERS, FOLDER_TOKENS = (
    f"tests/lmjax/data/test_{name}.py"
    for name in ("public_tokenizers", "family_tokenizers", "folder_tokens")
)
ENDS, TEMPLATES = (
    f"tests/lmjax/{name}.py" for name in ("generation/test_ends", "data/chat/test_jinja_format")
)
# Of the other files: the setting, what becomes of it, how it is meant, and the test that shows it.
OTHERS = {
    "tokenizer_config.json": (
        ("tokenizer_class", "obeyed", "how vocab.json, merges.txt and others are cut", TOKENIZERS),
        ("bos_token", "obeyed", "and the other roles, as a name or an object", TOKENIZERS),
        ("eos_token", "obeyed", "what ends a document", TOKENIZERS),
        (
            "added_tokens_decoder",
            "obeyed",
            "tokens beside the vocabulary, names of its own",
            FOLDER_TOKENS,
        ),
        (
            "additional_special_tokens",
            "obeyed",
            "and extra_special_tokens: no text makes them",
            FOLDER_TOKENS,
        ),
        ("pad_token", "obeyed", "a single character stays text", FOLDER_TOKENS),
        ("add_bos_token", "obeyed", "what stands before a text; before the post-processor", ""),
        ("add_eos_token", "obeyed", "what stands behind a text; before the post-processor", ""),
        ("add_prefix_space", "obeyed", "by the classes that know it", TOKENIZERS),
        ("do_lower_case", "obeyed", "beside tokenizer.json too", FAMILY_TOKENIZERS),
        ("strip_accents", "obeyed", "beside tokenizer.json too", FAMILY_TOKENIZERS),
        ("tokenize_chinese_chars", "obeyed", "beside tokenizer.json too", FAMILY_TOKENIZERS),
        ("keep_accents", "obeyed", "of XLNet and ALBERT", ""),
        ("extra_ids", "obeyed", "T5's sentinels", FAMILY_TOKENIZERS),
        (
            "chat_template",
            "obeyed",
            "text, or a list of named ones; or files of their own",
            TEMPLATES,
        ),
        ("split_special_tokens", "ignored", "no text makes a special token here, unless asked", ""),
        ("clean_up_tokenization_spaces", "ignored", "decoding gives every space back", ""),
        (
            "legacy",
            "ignored",
            "LLaMA's first space is behind special tokens as the file has it",
            "",
        ),
        ("model_max_length", "ignored", "config.json says how long a text may be", ""),
        ("padding_side", "ignored", "and truncation_side: texts are not padded by a tokenizer", ""),
    ),
    "generation_config.json": (
        ("eos_token_id", "obeyed", "an id or a list; those of config.json as well", ENDS),
        ("temperature", "told", "and top_k, top_p, min_p: settings of each command", ENDS),
        ("repetition_penalty", "told", "and all others that change how a text is written", ENDS),
        ("bos_token_id", "ignored", "the tokenizer says what begins a text", ""),
        ("pad_token_id", "ignored", "rows are padded with what no token sees", ""),
        ("max_length", "ignored", "and max_new_tokens: max_tokens of each command", ""),
    ),
}


def covered(kind: str) -> set[str]:
    """The keys that the table of a family speaks of, those of every model included."""
    table = TABLES[kind]
    given = {key for column in table.obeyed for row in column for key in row}
    told = {*table.refused, *table.ignored, *table.remarks}
    return given | told | {*EVERY_REFUSED, *EVERY_IGNORED, *EVERY_REMARKS}


def page() -> str:
    """The page of all tables, as lmjax/interop/SETTINGS.md has it."""
    parts = [HEADER, section("Every model", {}, EVERY_REFUSED, EVERY_IGNORED, EVERY_REMARKS)]
    for kind, table in TABLES.items():
        tried: dict[str, list[Any]] = {}
        for column in table.obeyed:
            for row in column:
                for key, value in flat(row):
                    tried.setdefault(key, [])
                    tried[key] += [] if value in tried[key] else [value]
        refused = {key: values for key, values in table.refused.items() if values}
        parts.append(section(kind, tried, refused, table.ignored, table.remarks))
    for file, settings in OTHERS.items():
        lines = [f"## {file}", "", "| setting | | | shown by |", "|---|---|---|---|"]
        lines += [f"| `{key}` | {what} | {text} | {test} |" for key, what, text, test in settings]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def flat(row: dict[str, Any]) -> list[tuple[str, Any]]:
    """The settings of a row, those within rope_parameters by themselves."""
    rotary = row.get("rope_parameters", {})
    inner = [(f"rope_parameters.{key}", value) for key, value in rotary.items()]
    return [pair for pair in row.items() if pair[0] != "rope_parameters"] + inner


def section(title: str, obeyed, refused, ignored, remarks) -> str:
    """One part of the page."""
    lines = [f"## {title}", "", "| setting | | values | |", "|---|---|---|---|"]
    for verdict, settings in (("obeyed", obeyed), ("refused", refused), ("ignored", ignored)):
        for key, values in settings.items():
            remark = remarks.get(key, "") if verdict != "obeyed" or key not in refused else ""
            shown = ", ".join(f"`{json.dumps(value)}`" for value in values)
            lines.append(f"| `{key}` | {verdict} | {shown} | {remark} |")
    told = {*obeyed, *refused, *ignored}
    lines += [f"| `{key}` | | | {text} |" for key, text in remarks.items() if key not in told]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
