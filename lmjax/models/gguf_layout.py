"""Layouts of GGUF files: names and forms of tensors by the architectures that llama.cpp knows.

    GPT2_FAMILY = ModelFamily(name="gpt2", ..., gguf=GPT2_GGUF)

Weights are (out, in), and the experts of a layer are one tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lmjax.models.names import (
    ATTENTION,
    Matrix,
    Name,
    RowTable,
    Shape,
    Transform,
    Vector,
    VocabularyTable,
    dense,
    norm,
)
from lmjax.models.rotary import Rotary
from lmjax.models.transformer import TransformerConfig

BLOCK = "blk.{layer}"
Refusal = Callable[[TransformerConfig], "str | None"]


@dataclasses.dataclass(frozen=True)
class GGUFLayout:
    """One architecture of llama.cpp's.

    Attributes:
      name: of the architecture.
      names: of the tensors.
      activations: of feed-forward layers, which the program has built in.
      rotary: whether positions turn queries and keys.
      interleaved: whether ours turn pairs (2i, 2i + 1) of them.
    """

    name: str
    names: tuple[Name, ...]
    activations: tuple[str, ...]
    rotary: bool = True
    interleaved: bool = False

    def refusal(self, config: TransformerConfig) -> str | None:
        """Reason why llama.cpp does not compute a model; None: it does."""
        if (activation := config.feed_forward.activation) not in self.activations:
            return (
                f"its feed_forward.activation={activation} is not {' or '.join(self.activations)}"
            )
        positions = config.attention.positions
        if isinstance(positions, Rotary) != self.rotary or (
            self.rotary and positions.interleaved != self.interleaved
        ):
            return f"its positions are not those of {self.name}"
        if config.attention.scale not in (None, config.attention.head_dim**-0.5):
            return f"it scales scores by head_dim**-0.5, not by {config.attention.scale}"
        if config.heads or not config.word_head:
            return "it is not just a language model: it has heads on labels, or none of words"
        return None


@dataclasses.dataclass(frozen=True)
class PairedMatrix(Matrix):
    """The weight of queries or keys, whose halves of each head become neighbouring rows."""

    def read(self, tensor: np.ndarray, parts: Sequence[Shape]) -> list[np.ndarray]:
        (_, heads, size), *_ = parts
        pairs = tensor.reshape(heads, size // 2, 2, -1).swapaxes(1, 2)
        return super().read(pairs.reshape(tensor.shape), parts)

    def write(self, parts: Sequence[np.ndarray], config: TransformerConfig) -> np.ndarray:
        heads, size = parts[0].shape[-2:]
        matrix = super().write(parts, config)
        return matrix.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(matrix.shape)


@dataclasses.dataclass(frozen=True)
class PairedVector(Vector):
    """The bias of queries or keys; see `PairedMatrix`."""

    def read(self, tensor: np.ndarray, parts: Sequence[Shape]) -> list[np.ndarray]:
        ((heads, size),) = parts
        return super().read(tensor.reshape(heads, size // 2, 2).swapaxes(1, 2).reshape(-1), parts)

    def write(self, parts: Sequence[np.ndarray], config: TransformerConfig) -> np.ndarray:
        heads, size = parts[0].shape
        return parts[0].reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(-1)


@dataclasses.dataclass(frozen=True)
class OffsetVector(Vector):
    """The scale of a norm that multiplies by 1 + scale; there it is the sum."""

    def read(self, tensor: np.ndarray, parts: Sequence[Shape]) -> list[np.ndarray]:
        return super().read(tensor - 1, parts)

    def write(self, parts: Sequence[np.ndarray], config: TransformerConfig) -> np.ndarray:
        return super().write(parts, config) + 1


@dataclasses.dataclass(frozen=True)
class ExpertMatrices(Transform):
    """The weights of a layer's experts: [experts, out, in] there and [experts, in, out] here."""

    def shape(self, parts: Sequence[Shape], config: TransformerConfig) -> Shape:
        experts, rows, columns = parts[0]
        return (experts, columns, rows)

    def read(self, tensor: np.ndarray, parts: Sequence[Shape]) -> list[np.ndarray]:
        return [tensor.swapaxes(1, 2)]

    def write(self, parts: Sequence[np.ndarray], config: TransformerConfig) -> np.ndarray:
        return parts[0].swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class HeadTable(VocabularyTable):
    """The table of a head, whose rows get the length 1 that a `normalized_head` gives them."""

    def write(self, parts: Sequence[np.ndarray], config: TransformerConfig) -> np.ndarray:
        table = super().write(parts, config)
        if not config.normalized_head:
            return table
        lengths = np.linalg.norm(table.astype(np.float32), axis=1, keepdims=True)
        return (table / np.maximum(lengths, 1e-12)).astype(table.dtype)


TABLES = (
    Name("token_embd.weight", ("embedding.table",), VocabularyTable()),
    Name("position_embd.weight", ("positions.table",), RowTable()),
    *norm("token_embd_norm", "embedding_norm"),
    Name("output.weight", ("head.table",), HeadTable()),
)
NORMS = (
    *norm(f"{BLOCK}.attn_norm", "blocks.attention_norm"),
    *norm(f"{BLOCK}.ffn_norm", "blocks.feed_forward_norm"),
    *norm(f"{BLOCK}.attn_q_norm", "blocks.attention.query_norm"),
    *norm(f"{BLOCK}.attn_k_norm", "blocks.attention.key_norm"),
    *norm(f"{BLOCK}.post_attention_norm", "blocks.attention_output_norm"),
    *norm(f"{BLOCK}.post_ffw_norm", "blocks.feed_forward_output_norm"),
    *norm("output_norm", "final_norm"),
)
PARALLEL_NORMS = (
    *norm(f"{BLOCK}.attn_norm", "blocks.norm"),
    *norm(f"{BLOCK}.attn_norm_2", "blocks.attention_norm"),
    *norm(f"{BLOCK}.attn_norm", "blocks.feed_forward_norm"),
    *norm("output_norm", "final_norm"),
)
OFFSET_NORMS = tuple(
    dataclasses.replace(name, transform=OffsetVector())
    for name in NORMS
    if "bias" not in name.theirs
)
OUTPUT = dense(f"{BLOCK}.attn_output", "blocks.attention.output", transform=Matrix(inputs=2))
DOWN = dense(f"{BLOCK}.ffn_down", "blocks.feed_forward.down", transform=Matrix())
UP = dense(f"{BLOCK}.ffn_up", "blocks.feed_forward.up", transform=Matrix())
GATE = dense(f"{BLOCK}.ffn_gate", "blocks.feed_forward.gate", transform=Matrix())
FUSED = dense(f"{BLOCK}.attn_qkv", *ATTENTION, transform=Matrix())
VALUE = dense(f"{BLOCK}.attn_v", "blocks.attention.value", transform=Matrix())
HALVES = (
    *dense(f"{BLOCK}.attn_q", "blocks.attention.query", transform=Matrix()),
    *dense(f"{BLOCK}.attn_k", "blocks.attention.key", transform=Matrix()),
)
PAIRS = tuple(
    dataclasses.replace(
        name, transform=PairedMatrix() if name.theirs.endswith("weight") else PairedVector()
    )
    for name in HALVES
)
EXPERTS = (
    Name(f"{BLOCK}.ffn_gate_inp.weight", ("blocks.feed_forward.router.weight",), Matrix()),
    *(
        Name(
            f"{BLOCK}.ffn_{part}_exps.weight",
            (f"blocks.feed_forward.experts.{part}.weight",),
            ExpertMatrices(),
        )
        for part in ("gate", "up", "down")
    ),
)
GATED = (*TABLES, *VALUE, *OUTPUT, *GATE, *UP, *DOWN)

LLAMA_GGUF = GGUFLayout("llama", (*GATED, *NORMS, *PAIRS, *EXPERTS), ("silu",))
QWEN2_GGUF = GGUFLayout("qwen2", (*GATED, *NORMS, *HALVES), ("silu",))
QWEN3_GGUF = dataclasses.replace(QWEN2_GGUF, name="qwen3")
GEMMA_GGUF = GGUFLayout("gemma", (*GATED, *OFFSET_NORMS, *HALVES), ("gelu_tanh",))
GEMMA2_GGUF = dataclasses.replace(GEMMA_GGUF, name="gemma2")
GPT2_GGUF = GGUFLayout(
    "gpt2", (*TABLES, *NORMS, *FUSED, *OUTPUT, *UP, *DOWN), ("gelu_tanh",), rotary=False
)
BLOOM_GGUF = dataclasses.replace(GPT2_GGUF, name="bloom")
FALCON_GGUF = GGUFLayout(
    "falcon",
    (*TABLES, *PARALLEL_NORMS, *FUSED, *OUTPUT, *UP, *DOWN),
    ("gelu", "gelu_tanh"),  # it has the tanh form for both
)
CHATGLM_GGUF = GGUFLayout(
    "chatglm",
    (
        *(*TABLES, *NORMS, *FUSED, *OUTPUT, *DOWN),
        *dense(
            f"{BLOCK}.ffn_up",
            "blocks.feed_forward.gate",
            "blocks.feed_forward.up",
            transform=Matrix(),
        ),
    ),
    ("silu",),
    interleaved=True,
)
