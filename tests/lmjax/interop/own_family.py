"""A family of a user's own, all of it in this file: GPT-Neo (Black et al. 2021), laid out as GPT-3.

Its chat format and its blanks are made up.
"""

from __future__ import annotations

from typing import Any

from lmjax.config import UserError, preset, replace
from lmjax.models import TransformerConfig, gpt3
from lmjax.models.family import ChatStyle, ModelFamily, register
from lmjax.models.infill import MaskFormat
from lmjax.models.names import (
    ACTIVATIONS,
    Matrix,
    Name,
    RowTable,
    Settings,
    VocabularyTable,
    activation_name,
    dense,
    norm,
)
from lmjax.models.stretches import pattern

# layers, hidden, heads
SIZES = {"125M": (12, 768, 12), "1.3B": (24, 2048, 16), "2.7B": (32, 2560, 20)}


@preset
def gpt_neo(size: str = "125M") -> TransformerConfig:
    """GPT-Neo: 125M, 1.3B, 2.7B; dense and banded layers in turn, scores without a scale."""
    if size not in SIZES:
        raise UserError(f'gpt_neo("{size}"): the sizes are {", ".join(SIZES)}')
    layers, hidden, heads = SIZES[size]
    base = gpt3()
    attention = replace(
        base.attention, num_heads=heads, head_dim=hidden // heads, bias=False, scale=1.0
    )
    feed_forward = replace(base.feed_forward, size=4 * hidden)
    return replace(
        base, hidden=hidden, num_layers=layers, attention=attention, feed_forward=feed_forward
    )


def read_gpt_neo(settings: Settings) -> TransformerConfig:
    """A GPT-Neo's config from its config.json."""
    hidden, heads = settings["hidden_size"], settings["num_heads"]
    kinds = [kind for kinds, times in settings["attention_types"] for kind in kinds * times]
    windows = pattern([{"global": None, "local": settings["window_size"]}[kind] for kind in kinds])
    base = gpt_neo()
    return replace(
        base,
        vocab_size=settings["vocab_size"],
        hidden=hidden,
        num_layers=settings["num_layers"],
        max_length=settings["max_position_embeddings"],
        attention=replace(
            base.attention, num_heads=heads, head_dim=hidden // heads, windows=windows
        ),
        feed_forward=replace(
            base.feed_forward,
            size=settings["intermediate_size"] or 4 * hidden,
            activation=ACTIVATIONS[settings["activation_function"]],
        ),
        norm=replace(base.norm, epsilon=settings["layer_norm_epsilon"]),
        tied_head=settings["tie_word_embeddings"],
    )


def write_gpt_neo(config: TransformerConfig) -> dict[str, Any]:
    """A GPT-Neo's config.json."""
    kinds = ["global" if window is None else "local" for window in config.windows]
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_layers": config.num_layers,
        "num_heads": config.attention.num_heads,
        "max_position_embeddings": config.max_length,
        "attention_types": [[kinds, 1]],
        "window_size": next((window for window in config.windows if window), 256),
        "intermediate_size": config.feed_forward.size,
        "activation_function": activation_name(config),
        "layer_norm_epsilon": config.norm.epsilon,
        "tie_word_embeddings": config.tied_head,
    }


BLOCK = "transformer.h.{layer}"
PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
GPT_NEO_FAMILY = ModelFamily(
    name="gpt_neo",
    model_type="gpt_neo",
    architecture="GPTNeoForCausalLM",
    names=(
        Name("transformer.wte.weight", ("embedding.table",), VocabularyTable()),
        Name("transformer.wpe.weight", ("positions.table",), RowTable()),
        *norm(f"{BLOCK}.ln_1", "blocks.attention_norm"),
        *(
            line
            for theirs, ours in PROJECTIONS.items()
            for line in dense(
                f"{BLOCK}.attn.attention.{theirs}", f"blocks.attention.{ours}", transform=Matrix()
            )
        ),
        *dense(
            f"{BLOCK}.attn.attention.out_proj",
            "blocks.attention.output",
            transform=Matrix(inputs=2),
        ),
        *norm(f"{BLOCK}.ln_2", "blocks.feed_forward_norm"),
        *dense(f"{BLOCK}.mlp.c_fc", "blocks.feed_forward.up", transform=Matrix()),
        *dense(f"{BLOCK}.mlp.c_proj", "blocks.feed_forward.down", transform=Matrix()),
        *norm("transformer.ln_f", "final_norm"),
        Name("lm_head.weight", ("head.table",), VocabularyTable()),
    ),
    prefix="transformer.",
    tied=("lm_head.weight", "transformer.wte.weight"),
    buffers=(r".*attn\.attention\.(bias|masked_bias)",),
    supported={"activation_function": tuple(ACTIVATIONS)},
    read=read_gpt_neo,
    write=write_gpt_neo,
    defaults={
        "intermediate_size": None,
        "window_size": 256,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    aliases={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
    chat=(
        ChatStyle(
            "neo",
            {
                "special": ("<|turn|>",),
                "user": ("<|turn|>", "ask {content}"),
                "assistant": ("<|turn|>", "say ", "{content}"),
                "stop": ("<|turn|>",),
            },
        ),
    ),
    infill=MaskFormat(mask="<|gap|>", cls=None, sep=None),
)
register(GPT_NEO_FAMILY)
