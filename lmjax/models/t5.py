"""T5: an encoder and a decoder with relative positions, trained to fill spans."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from lmjax.config import UserError, fields, preset, replace
from lmjax.models.attention import AttentionConfig
from lmjax.models.encoder_decoder import EncoderDecoderConfig
from lmjax.models.family import ModelFamily, register
from lmjax.models.feed_forward import Activation, FeedForwardConfig, GatedFeedForwardConfig
from lmjax.models.gpt import size_of
from lmjax.models.head_classes import T5_ENCODER_HEADS, T5_HEADS
from lmjax.models.infill import SentinelFormat
from lmjax.models.initializers import FanIn
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
from lmjax.models.norms import RMSNormConfig
from lmjax.models.positions import RelativeBuckets
from lmjax.models.transformer import TransformerConfig

# layers of each stack, hidden, heads, width of a head, width of the feed-forward layers
SIZES = {
    "small": (6, 512, 8, 64, 2048),
    "base": (12, 768, 12, 64, 3072),
    "large": (24, 1024, 16, 64, 4096),
    "3B": (24, 1024, 32, 128, 16_384),
    "11B": (24, 1024, 128, 128, 65_536),
}
# version 1.1: the two largest are wider and their feed-forward layers narrower
SIZES_1_1 = {
    "small": (8, 512, 6, 64, 1024),
    "base": (12, 768, 12, 64, 2048),
    "large": (24, 1024, 16, 64, 2816),
    "xl": (24, 2048, 32, 64, 5120),
    "xxl": (24, 4096, 64, 64, 10_240),
}


@preset
def t5(size: str = "base") -> EncoderDecoderConfig:
    """T5 (Raffel et al. 2020, arXiv:1910.10683): small, base, large, 3B, 11B."""
    layers, hidden, heads, head_dim, width = size_of(SIZES, size, "t5")
    return EncoderDecoderConfig(
        vocab_size=32_128,
        hidden=hidden,
        num_layers=layers,
        encoder_layers=layers,
        max_length=None,
        attention=AttentionConfig(
            num_heads=heads,
            head_dim=head_dim,
            bias=False,
            output_bias=False,
            positions=RelativeBuckets(),
            scale=1.0,
            dropout=0.1,
        ),
        feed_forward=FeedForwardConfig(size=width, activation="relu", bias=False),
        norm=RMSNormConfig(epsilon=1e-6),
        positions=None,
        head_scale=hidden**-0.5,
        dropout=0.1,
        initializer=FanIn(query_scale=head_dim**-0.5),
    )


@preset
def t5_v1_1(size: str = "base") -> EncoderDecoderConfig:
    """T5 version 1.1 (small, base, large, xl, xxl): gated, with a head of its own, no dropout.

    Sizes from the public checkpoints' config.json; see Shazeer 2020, arXiv:2002.05202, for the
    feed-forward layers. Where the model is fine-tuned, dropout is 0.1.
    """
    layers, hidden, heads, head_dim, width = size_of(SIZES_1_1, size, "t5_v1_1")
    base = t5()
    return replace(
        base,
        hidden=hidden,
        num_layers=layers,
        encoder_layers=layers,
        attention=replace(base.attention, num_heads=heads, head_dim=head_dim, dropout=0.0),
        feed_forward=GatedFeedForwardConfig(size=width, activation="gelu_tanh"),
        tied_head=False,
        head_scale=1.0,
        dropout=0.0,
        initializer=FanIn(query_scale=head_dim**-0.5),
    )


def read_t5(settings: Settings) -> EncoderDecoderConfig:
    """A T5's config from its config.json."""
    base, hidden, width = t5(), settings["d_model"], settings["d_ff"]
    tied, rate = settings["tie_word_embeddings"], settings["dropout_rate"]
    scaled = settings.get("scale_decoder_outputs", tied)
    activation, gated = read_feed_forward(settings)
    feed_forward = FeedForwardConfig(size=width, activation=activation, bias=False)
    if gated:
        feed_forward = GatedFeedForwardConfig(size=width, activation=activation)
    return replace(
        base,
        vocab_size=settings["vocab_size"],
        hidden=hidden,
        num_layers=settings["num_decoder_layers"] or settings["num_layers"],
        encoder_layers=settings["num_layers"],
        attention=replace(
            base.attention,
            num_heads=settings["num_heads"],
            head_dim=settings["d_kv"],
            positions=RelativeBuckets(
                buckets=settings["relative_attention_num_buckets"],
                max_distance=settings["relative_attention_max_distance"],
            ),
            dropout=rate,
        ),
        feed_forward=feed_forward,
        norm=RMSNormConfig(epsilon=settings["layer_norm_epsilon"]),
        tied_head=tied,
        head_scale=hidden**-0.5 if scaled else 1.0,
        dropout=rate,
        initializer=FanIn(query_scale=settings["d_kv"] ** -0.5),
    )


def read_t5_encoder(settings: Settings) -> TransformerConfig:
    """The config of a T5's encoder alone, which predicts no words."""
    both = read_t5(settings)
    shared = {name: getattr(both, name) for name in fields(TransformerConfig)}
    alone = shared | {
        "num_layers": both.encoder_layers,
        "attention": both.encoder.attention,
        "word_head": False,
        "tied_head": True,
        "head_scale": 1.0,
    }
    return TransformerConfig(**alone)


def read_feed_forward(settings: Settings) -> tuple[Activation, bool]:
    """The activation of the feed-forward layers, and whether they have gates.

    UserError for a name that feed_forward_proj cannot have.
    """
    given = settings["feed_forward_proj"]
    gate, _, name = given.rpartition("-")
    if gate not in ("", "gated") or name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(
            f"feed_forward_proj={json.dumps(given)} is not supported, only one of {known}, or"
            " gated- and one of them"
        )
    name = "gelu_new" if given == "gated-gelu" else name
    # The parts, which transformers writes beside it, come before it.
    name = settings.get("dense_act_fn") or name
    return ACTIVATIONS[name], settings.get("is_gated_act", gate == "gated")


def written_feed_forward(config: TransformerConfig) -> str | None:
    """The `feed_forward_proj` of a config."""
    name = activation_name(config)
    if not is_gated(config):
        return name
    # "gated-gelu" is the tanh form, and the exact one has another name.
    exact = {"gelu_new": "gelu", "gelu": "gelu_python"}
    return f"gated-{exact.get(name, name)}"


def write_t5(config: TransformerConfig) -> dict[str, Any]:
    """A T5's config.json."""
    attention, positions = config.attention, config.attention.positions
    if not isinstance(positions, RelativeBuckets):
        positions = RelativeBuckets()
    return {
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.hidden,
        "d_kv": attention.head_dim,
        "d_ff": config.feed_forward.size,
        "num_layers": getattr(config, "encoder_layers", config.num_layers),
        "num_decoder_layers": config.num_layers,
        "num_heads": attention.num_heads,
        "relative_attention_num_buckets": positions.buckets,
        "relative_attention_max_distance": positions.max_distance,
        "feed_forward_proj": written_feed_forward(config),
        "layer_norm_epsilon": config.norm.epsilon,
        "dropout_rate": config.dropout,
        "tie_word_embeddings": config.tied_head,
        "scale_decoder_outputs": config.head_scale != 1,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def is_gated(config: TransformerConfig) -> bool:
    """Returns whether feed-forward layers have gates, as in version 1.1."""
    return isinstance(config.feed_forward, GatedFeedForwardConfig)


def is_plain(config: TransformerConfig) -> bool:
    """The opposite of `is_gated`."""
    return not is_gated(config)


def attention_names(theirs: str, ours: str) -> tuple[Name, ...]:
    """The four matrices of an attention."""
    inputs = {"q": "query", "k": "key", "v": "value"}
    names = [dense(f"{theirs}.{a}", f"{ours}.{b}", transform=Matrix()) for a, b in inputs.items()]
    output = dense(f"{theirs}.o", f"{ours}.output", transform=Matrix(inputs=2))
    return tuple(weight for weight, _ in (*names, output))


def stack_names(stack: str, ours: str, feed_forward: int) -> tuple[Name, ...]:
    """Names that encoder and decoder share; `feed_forward` is the number of its sublayer."""
    block, blocks = f"{stack}.block.{{layer}}.layer", f"{ours}blocks"
    fed, into = f"{block}.{feed_forward}", f"{blocks}.feed_forward"
    return (
        *norm(f"{block}.0.layer_norm", f"{blocks}.attention_norm"),
        *attention_names(f"{block}.0.SelfAttention", f"{blocks}.attention"),
        Name(
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            (f"{ours}attention_positions.table",),
            RowTable(),
        ),
        *norm(f"{fed}.layer_norm", f"{blocks}.feed_forward_norm"),
        Name(f"{fed}.DenseReluDense.wi.weight", (f"{into}.up.weight",), Matrix(), is_plain),
        Name(f"{fed}.DenseReluDense.wi_0.weight", (f"{into}.gate.weight",), Matrix(), is_gated),
        Name(f"{fed}.DenseReluDense.wi_1.weight", (f"{into}.up.weight",), Matrix(), is_gated),
        Name(f"{fed}.DenseReluDense.wo.weight", (f"{into}.down.weight",), Matrix()),
        *norm(f"{stack}.final_layer_norm", f"{ours}final_norm"),
    )


CROSS = "decoder.block.{layer}.layer.1"
T5_FAMILY = ModelFamily(
    name="t5",
    signs=frozenset(("d_model", "d_kv", "d_ff")),
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    names=(
        Name("shared.weight", ("embedding.table",), VocabularyTable()),
        *stack_names("encoder", "encoder.", feed_forward=1),
        *stack_names("decoder", "", feed_forward=2),
        *norm(f"{CROSS}.layer_norm", "blocks.cross_attention_norm"),
        *attention_names(f"{CROSS}.EncDecAttention", "blocks.cross_attention"),
        Name("lm_head.weight", ("head.table",), VocabularyTable()),
    ),
    prefix="",
    tied=("lm_head.weight", "shared.weight"),
    buffers=(
        r"(transformer\.)?(en|de)coder\.embed_tokens\.weight",  # the table again
        r".*EncDecAttention\.relative_attention_bias\.weight",  # which no version reads
    ),
    tied_without_head=True,
    supported={
        "dense_act_fn": tuple(ACTIVATIONS),
        "is_encoder_decoder": (True,),
    },
    heads=T5_HEADS,
    read=read_t5,
    write=write_t5,
    infill=SentinelFormat(replies=True),
    defaults={
        "num_decoder_layers": None,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "relu",
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.1,
        "tie_word_embeddings": True,
    },
    aliases={
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    },
)
T5_ENCODER_FAMILY = dataclasses.replace(
    T5_FAMILY,
    name="t5_encoder",
    architecture="T5EncoderModel",
    names=(
        Name("shared.weight", ("embedding.table",), VocabularyTable()),
        *stack_names("encoder", "", feed_forward=1),
    ),
    heads=T5_ENCODER_HEADS,
    supported=T5_FAMILY.supported | {"is_encoder_decoder": (True, False)},
    read=read_t5_encoder,
    infill=None,
)
register(T5_FAMILY, T5_ENCODER_FAMILY)
