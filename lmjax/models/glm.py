"""GLM and GLM-130B: blank infilling, a text that sees itself whole and spans that follow it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmjax.config import UserError, preset, replace
from lmjax.models.attention import AttentionConfig
from lmjax.models.batch import Batch
from lmjax.models.family import ModelFamily, register
from lmjax.models.feed_forward import FeedForwardConfig, GatedFeedForwardConfig
from lmjax.models.gpt import size_of
from lmjax.models.infill import BlankFormat
from lmjax.models.initializers import DeepNormXavier, Normal
from lmjax.models.names import (
    ATTENTION,
    Grouped,
    Matrix,
    Name,
    RowTable,
    Settings,
    Transform,
    VocabularyTable,
    dense,
    norm,
)
from lmjax.models.norms import LayerNormConfig
from lmjax.models.positions import BlockPositions
from lmjax.models.residual import DeepNorm
from lmjax.models.rotary import Rotary
from lmjax.models.transformer import TransformerConfig

# layers, hidden, heads, vocabulary, length. The vocabularies are BERT's, GPT-2's and one of
# Chinese, each with GLM's own tokens and rows up to a multiple of 128.
GLM_SIZES = {
    "110M": (12, 768, 12, 30_592, 512),
    "335M": (24, 1024, 16, 30_592, 512),
    "410M": (30, 1024, 16, 30_592, 512),
    "515M": (30, 1152, 18, 30_592, 512),
    "roberta-large": (24, 1024, 16, 50_304, 512),
    "large-chinese": (24, 1024, 16, 50_048, 1024),
    "2B": (36, 2048, 32, 50_304, 1024),
    "10B": (48, 4096, 64, 50_304, 1024),
    "10B-chinese": (48, 4096, 64, 50_048, 1024),
}


@preset
def glm(size: str = "110M") -> TransformerConfig:
    """GLM (Du et al. 2022, arXiv:2103.10360): nine models of 110M to 10B parameters.

    Sizes, dropout and initialisation from the authors' launch files and code.
    """
    layers, hidden, heads, vocabulary, length = size_of(GLM_SIZES, size, "glm")
    return TransformerConfig(
        vocab_size=vocabulary,
        hidden=hidden,
        num_layers=layers,
        max_length=length,
        attention=AttentionConfig(num_heads=heads, head_dim=hidden // heads, dropout=0.1),
        feed_forward=FeedForwardConfig(size=4 * hidden),
        positions=BlockPositions(),
        dropout=0.1,
        initializer=Normal(std=0.02, scale_residual=True),
    )


@preset
def glm_130b(size: str = "130B") -> TransformerConfig:
    """GLM-130B (Zeng et al. 2022, arXiv:2210.02414, section 2 and table 11)."""
    layers, hidden, heads = size_of({"130B": (70, 12_288, 96)}, size, "glm_130b")
    return TransformerConfig(
        vocab_size=150_528,
        hidden=hidden,
        num_layers=layers,
        max_length=2048,
        attention=AttentionConfig(
            num_heads=heads, head_dim=hidden // heads, positions=Rotary(), dropout=0.1
        ),
        feed_forward=GatedFeedForwardConfig(size=32_768, activation="gelu", bias=True),
        positions=None,
        arrangement=DeepNorm(alpha=math.sqrt(2 * layers)),
        dropout=0.1,
        initializer=DeepNormXavier(),
    )


def blank_row(
    context: Sequence[int], spans: Sequence[tuple[int, Sequence[int]]], run_on: bool = False
) -> Batch:
    """One row of a batch: a text with blanks, and spans that fill them or begin to (GLM's A and B).

    The text sees itself whole; each span sees the text, the spans before it and what of it has
    come. A span's tokens have the position of its blank and block positions 1, 2, ...

    Args:
      context: tokens of the text, each of its blanks one of the mask tokens.
      spans: for each the place of its blank in the text, and its tokens from the start token on.
      run_on: positions go on behind the text instead, and there are no block positions: GLM-130B
        behind a text that ends with [gMASK].

    Raises:
      UserError: a place outside of the text.
    """
    length = end = len(context)
    rows = [(context, np.arange(length), np.zeros(length), np.zeros(length))]
    for blank, tokens in spans:
        if not 0 <= blank < length:
            raise UserError(f"the blank {blank} is not in the text, which has {length} tokens")
        inside, after_positions = np.arange(len(tokens)), end + np.arange(len(tokens))
        end += len(tokens)
        both = (after_positions, 0 * inside) if run_on else (blank + 0 * inside, 1 + inside)
        rows.append((tokens, *both, after_positions))
    columns = (np.concatenate(parts).astype(np.int32) for parts in zip(*rows))
    tokens, positions, block_positions, ranks = columns
    return Batch(
        tokens=tokens,
        positions=positions,
        segments=np.ones_like(tokens),
        ranks=ranks,
        block_positions=block_positions,
    )


def read_glm(settings: Settings) -> TransformerConfig:
    """A GLM's config from its config.json."""
    if "num_hidden_layers" in settings:
        raise UserError(
            "model_type glm with num_hidden_layers is a GLM-4, which is not supported: GLM's have"
            " num_layers"
        )
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    base = glm()
    return replace(
        base,
        vocab_size=settings["vocab_size"],
        hidden=hidden,
        num_layers=settings["num_layers"],
        max_length=settings["max_sequence_length"],
        attention=replace(
            base.attention,
            num_heads=heads,
            head_dim=hidden // heads,
            dropout=settings.get("attention_dropout_prob", 0.0),
        ),
        feed_forward=FeedForwardConfig(size=4 * hidden),
        dropout=settings.get("output_dropout_prob", 0.0),
    )


def write_glm(config: TransformerConfig) -> dict[str, Any]:
    """A GLM's config.json."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_layers": config.num_layers,
        "num_attention_heads": config.attention.num_heads,
        "max_sequence_length": config.max_length,
        "embedding_dropout_prob": config.dropout,
        "attention_dropout_prob": config.attention.dropout,
        "output_dropout_prob": config.dropout,
        "block_position_encoding": True,
        "relative_encoding": False,
        "output_predict": True,
    }


def read_glm_130b(settings: Settings) -> TransformerConfig:
    """A GLM-130B's config from its sizes; no folder of the authors' has a config.json."""
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    layers = settings["num_layers"]
    base = glm_130b()
    return replace(
        base,
        vocab_size=settings["vocab_size"],
        hidden=hidden,
        num_layers=layers,
        max_length=settings.get("max_sequence_length", 2048),
        attention=replace(base.attention, num_heads=heads, head_dim=hidden // heads),
        feed_forward=replace(base.feed_forward, size=settings["inner_hidden_size"]),
        norm=LayerNormConfig(epsilon=settings.get("layernorm_epsilon", 1e-5)),
        arrangement=DeepNorm(alpha=math.sqrt(2 * layers)),
    )


def write_glm_130b(config: TransformerConfig) -> dict[str, Any]:
    """The sizes that `read_glm_130b` reads."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_layers": config.num_layers,
        "num_attention_heads": config.attention.num_heads,
        "inner_hidden_size": config.feed_forward.size,
        "max_sequence_length": config.max_length,
        "layernorm_epsilon": config.norm.epsilon,
    }


def glm_blocks(layer: str, fused: Transform, *up: str) -> tuple[Name, ...]:
    """The names of a block, as all GLM models have them.

    Args:
      layer: what stands before them.
      fused: how queries, keys and values are put together.
      up: our first layers of the feed-forward layer.
    """
    flat = fused if isinstance(fused, Grouped) else None
    return (
        *norm(f"{layer}.input_layernorm", "blocks.attention_norm"),
        *dense(f"{layer}.attention.query_key_value", *ATTENTION, transform=fused, bias=flat),
        *dense(f"{layer}.attention.dense", "blocks.attention.output", transform=Matrix(inputs=2)),
        *norm(f"{layer}.post_attention_layernorm", "blocks.feed_forward_norm"),
        *dense(f"{layer}.mlp.dense_h_to_4h", *up, transform=Matrix()),
        *dense(f"{layer}.mlp.dense_4h_to_h", "blocks.feed_forward.down", transform=Matrix()),
    )


TRANSFORMER = "glm.transformer"
GLM_MASKS = ("[MASK]", "[sMASK]", "[gMASK]")
GLM_FAMILY = ModelFamily(
    name="glm",
    model_type="glm",
    architecture="GLMForConditionalGeneration",
    names=(
        Name("glm.word_embeddings.weight", ("embedding.table",), VocabularyTable()),
        Name(f"{TRANSFORMER}.position_embeddings.weight", ("positions.text.table",), RowTable()),
        Name(
            f"{TRANSFORMER}.block_position_embeddings.weight",
            ("positions.block.table",),
            RowTable(),
        ),
        *glm_blocks(f"{TRANSFORMER}.layers.{{layer}}", Matrix(), "blocks.feed_forward.up"),
        *norm(f"{TRANSFORMER}.final_layernorm", "final_norm"),
    ),
    prefix="glm.",
    tied=("lm_head.weight", "glm.word_embeddings.weight"),
    buffers=(),
    supported={
        "block_position_encoding": (True,),
        "relative_encoding": (False,),
        "attention_scale": (1.0,),
        "spell_length": (),
    },
    read=read_glm,
    write=write_glm,
    infill=BlankFormat(masks=(*GLM_MASKS, "<mask>")),  # the last in RoBERTa's vocabulary
)
# The layout of SwissArmyTransformer, which the authors use.
GLM_130B_FAMILY = ModelFamily(
    name="glm_130b",
    model_type="glm-130b",
    architecture="GLM130B",
    names=(
        Name("transformer.word_embeddings.weight", ("embedding.table",), VocabularyTable()),
        *glm_blocks(
            "transformer.layers.{layer}",
            Grouped(),
            "blocks.feed_forward.up",
            "blocks.feed_forward.gate",
        ),
        *norm("transformer.final_layernorm", "final_norm"),
    ),
    prefix="",
    tied=("lm_head.weight", "transformer.word_embeddings.weight"),
    buffers=(r"mixins\..*inv_freq",),
    supported={},
    read=read_glm_130b,
    write=write_glm_130b,
    # Its vocabulary names tokens otherwise, and no text ends after a last blank of any kind.
    infill=BlankFormat(rest=GLM_MASKS, run_on=("[gMASK]",), sop="<sop>", eop="<eop>"),
)
register(GLM_FAMILY, GLM_130B_FAMILY)
