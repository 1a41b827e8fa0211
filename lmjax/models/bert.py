"""BERT: an encoder that predicts hidden words and whether one sentence follows another."""

from __future__ import annotations

from typing import Any

from lmjax.config import preset, replace
from lmjax.models.attention import AttentionConfig
from lmjax.models.family import ModelFamily, register
from lmjax.models.feed_forward import FeedForwardConfig
from lmjax.models.gpt import size_of
from lmjax.models.head_classes import BERT_HEADS
from lmjax.models.heads import ClassifierConfig, HeadTransformConfig
from lmjax.models.infill import MaskFormat
from lmjax.models.initializers import Normal
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
from lmjax.models.norms import LayerNormConfig
from lmjax.models.positions import LearnedPositions
from lmjax.models.residual import PostNorm
from lmjax.models.transformer import TransformerConfig

# layers, hidden, heads
SIZES = {"base": (12, 768, 12), "large": (24, 1024, 16)}


@preset
def bert(size: str = "base") -> TransformerConfig:
    """BERT (Devlin et al. 2019, arXiv:1810.04805): base, large; uncased vocabulary.

    Activations are the tanh form of gelu, as in the authors' code; the checkpoints that
    transformers has say "gelu" and are run with the exact one.
    """
    layers, hidden, heads = size_of(SIZES, size, "bert")
    return TransformerConfig(
        vocab_size=30_522,
        hidden=hidden,
        num_layers=layers,
        max_length=512,
        attention=AttentionConfig(
            num_heads=heads, head_dim=hidden // heads, causal=False, dropout=0.1
        ),
        feed_forward=FeedForwardConfig(size=4 * hidden, activation="gelu_tanh"),
        norm=LayerNormConfig(epsilon=1e-12),
        positions=LearnedPositions(),
        token_types=2,
        arrangement=PostNorm(),
        embedding_norm=LayerNormConfig(epsilon=1e-12),
        head_transform=HeadTransformConfig(activation="gelu_tanh"),
        classifier=ClassifierConfig(),
        dropout=0.1,
        initializer=Normal(std=0.02, truncated=True),
    )


MASKED_LM = "BertForMaskedLM"  # the class of transformers without the head of sentences


def read_bert(settings: Settings) -> TransformerConfig:
    """A BERT's config from its config.json."""
    base = bert()
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    activation = ACTIVATIONS[settings["hidden_act"]]
    epsilon = settings["layer_norm_eps"]
    masked_only = MASKED_LM in (settings.get("architectures") or ())
    return replace(
        base,
        vocab_size=settings["vocab_size"],
        hidden=hidden,
        num_layers=settings["num_hidden_layers"],
        max_length=settings["max_position_embeddings"],
        attention=replace(
            base.attention,
            num_heads=heads,
            head_dim=hidden // heads,
            dropout=settings["attention_probs_dropout_prob"],
        ),
        feed_forward=FeedForwardConfig(size=settings["intermediate_size"], activation=activation),
        norm=replace(base.norm, epsilon=epsilon),
        embedding_norm=replace(base.embedding_norm, epsilon=epsilon),
        token_types=settings["type_vocab_size"],
        head_transform=HeadTransformConfig(activation=activation),
        classifier=None if masked_only else ClassifierConfig(),
        dropout=settings["hidden_dropout_prob"],
    )


def write_bert(config: TransformerConfig) -> dict[str, Any]:
    """A BERT's config.json."""
    masked_only = {"architectures": [MASKED_LM]} if config.classifier is None else {}
    return masked_only | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.num_layers,
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.token_types,
        "num_attention_heads": config.attention.num_heads,
        "intermediate_size": config.feed_forward.size,
        "hidden_act": activation_name(config),
        "layer_norm_eps": config.norm.epsilon,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention.dropout,
        "position_embedding_type": "absolute",
    }


EMBEDDINGS, LAYER = "bert.embeddings", "bert.encoder.layer.{layer}"
HEAD = "cls.predictions"
BERT_FAMILY = ModelFamily(
    name="bert",
    signs=frozenset(("intermediate_size", "hidden_act", "type_vocab_size")),
    unlike=frozenset(("embedding_size",)),
    model_type="bert",
    architecture="BertForPreTraining",
    names=(
        Name(f"{EMBEDDINGS}.word_embeddings.weight", ("embedding.table",), VocabularyTable()),
        Name(f"{EMBEDDINGS}.position_embeddings.weight", ("positions.table",), RowTable()),
        Name(f"{EMBEDDINGS}.token_type_embeddings.weight", ("token_types.table",), RowTable()),
        *norm(f"{EMBEDDINGS}.LayerNorm", "embedding_norm"),
        *dense(f"{LAYER}.attention.self.query", "blocks.attention.query", transform=Matrix()),
        *dense(f"{LAYER}.attention.self.key", "blocks.attention.key", transform=Matrix()),
        *dense(f"{LAYER}.attention.self.value", "blocks.attention.value", transform=Matrix()),
        *dense(
            f"{LAYER}.attention.output.dense",
            "blocks.attention.output",
            transform=Matrix(inputs=2),
        ),
        *norm(f"{LAYER}.attention.output.LayerNorm", "blocks.attention_norm"),
        *dense(f"{LAYER}.intermediate.dense", "blocks.feed_forward.up", transform=Matrix()),
        *dense(f"{LAYER}.output.dense", "blocks.feed_forward.down", transform=Matrix()),
        *norm(f"{LAYER}.output.LayerNorm", "blocks.feed_forward_norm"),
        *dense(f"{HEAD}.transform.dense", "head_transform.dense", transform=Matrix()),
        *norm(f"{HEAD}.transform.LayerNorm", "head_transform.norm"),
        Name(f"{HEAD}.bias", ("head_bias",), VocabularyTable()),
        *dense("bert.pooler.dense", "classifier.pooler", transform=Matrix()),
        *dense("cls.seq_relationship", "classifier.classes", transform=Matrix()),
    ),
    prefix="bert.",
    tied=(f"{HEAD}.decoder.weight", f"{EMBEDDINGS}.word_embeddings.weight"),
    buffers=(
        r"(bert\.)?embeddings\.position_ids",
        r"cls\.predictions\.decoder\.bias",
        # Encoders and files that are said to be MASKED_LM have them all the same.
        r"(bert\.)?pooler\..*",
        r"cls\.(?!predictions\.).*",  # heads of other tasks
    ),
    supported={
        "hidden_act": tuple(ACTIVATIONS),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "is_causal": (True, False),  # which is not obeyed
        "tie_word_embeddings": (True,),
    },
    heads=BERT_HEADS,
    read=read_bert,
    write=write_bert,
    infill=MaskFormat(),
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "attention_probs_dropout_prob": 0.1,
        "type_vocab_size": 2,
        "hidden_dropout_prob": 0.1,
    },
    older=((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta")),
)
register(BERT_FAMILY)
