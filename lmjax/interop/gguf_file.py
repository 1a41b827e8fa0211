"""Models as GGUF files, which llama.cpp runs (https://github.com/ggml-org/ggml, docs/gguf.md)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lmjax.config import UserError
from lmjax.data.tokenizers import Tokenizer
from lmjax.interop.families import family_of
from lmjax.interop.gguf_tokenizer import tokenizer_fields
from lmjax.interop.huggingface import by_path, whole
from lmjax.interop.library_tokenizer import Unwritable
from lmjax.interop.tensor_files import Report, report_nothing
from lmjax.interop.tensor_names import entries_of, theirs
from lmjax.launch import is_first
from lmjax.models import TransformerConfig, merge_adapters, with_quantization
from lmjax.models.experts import ExpertsConfig
from lmjax.models.gguf_layout import GGUFLayout
from lmjax.models.norms import RMSNormConfig
from lmjax.models.rotary import (
    DynamicNTKScaling,
    DynamicScaling,
    LinearScaling,
    Rotary,
    YaRNScaling,
)

if TYPE_CHECKING:
    import gguf

GGUFType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q4_0"]
BLOCK = 32  # numbers that share a scale
SMALL = ("position_embd", "ffn_gate_inp")  # tensors that stay float32, beside all vectors


def library() -> Any:
    """The package `gguf`; UserError where it is missing."""
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf: pip install 'lmjax[gguf]'") from None
    return gguf


def write(
    path: str | os.PathLike,
    config: TransformerConfig,
    params: dict,
    tokenizer: Tokenizer | None = None,
    kind: GGUFType = "f16",
    template: str | None = None,
    report: Report = report_nothing,
) -> list[str]:
    """Writes a model, its tokenizer and its chat template as one file, tensor by tensor.

    Vectors, routers and tables of positions are float32 in files of every kind.

    Args:
      path: of the file, which is replaced when the new one is whole.
      config: of the model; adapters are merged.
      params: float32, as `huggingface.read` or `initialize` gives them; a mesh must be set.
      tokenizer: of the model; None: the file has none, and takes and gives tokens.
      kind: how weights are kept: q8_0 is 8 bits and a scale for 32 numbers, q5_1 5 bits, a scale
        and a least number, q4_0 4 bits and a scale.
      template: chat template in Jinja.
      report: is told the bytes that are written, and of how many, after each tensor.

    Returns:
      Sentences for the user about what the file cannot do.

    Raises:
      UserError: llama.cpp knows no such model, or the file cannot be written.
    """
    gguf, path = library(), Path(path)
    params, config = with_quantization(*merge_adapters(params, config), None)
    layout = layout_of(config)
    paths = by_path(params)
    try:
        entries = list(entries_of(layout, config, paths))
    except ValueError as error:
        raise UserError(f"no GGUF file of the architecture {layout.name}: {error}") from None
    fields, notes = model_fields(layout, config)
    fields |= _tokenizer_fields(tokenizer, config, notes)
    if template is not None:
        fields["tokenizer.chat_template"] = template
    fields["general.file_type"] = int(gguf.LlamaFileType[_file_type(kind)])
    shapes = _shapes(layout, config, paths, entries, gguf.GGMLQuantizationType[kind.upper()], notes)

    arrays = _arrays(config, paths, entries)
    if not is_first():
        for _ in arrays:  # the first process needs the parts that lie here
            pass
        return notes
    partial = path.with_name(f".{path.name}.partial")
    try:
        _write_file(partial, layout.name, fields, shapes, arrays, report)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} was not written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return notes


def _write_file(
    path: Path,
    architecture: str,
    fields: dict[str, Any],
    shapes: dict[str, tuple[tuple[int, ...], Any]],
    arrays: Iterator[tuple[str, np.ndarray]],
    report: Report,
) -> None:
    """Writes fields, the list of all tensors, then one tensor after another."""
    gguf = library()
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        _add(writer, name, value)
    for title, (shape, kept) in shapes.items():
        plain = {"F32": np.float32, "F16": np.float16}.get(kept.name)
        if plain is None:  # bytes of blocks
            shape = gguf.quant_shape_to_byte_shape(shape, kept)
        dtype = np.dtype(plain or np.uint8)
        size = math.prod(shape) * dtype.itemsize
        writer.add_tensor_info(title, shape, dtype, size, None if plain else kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done, total = 0, sum(4 * math.prod(shape) for shape, _ in shapes.values())
    for title, array in arrays:
        writer.write_tensor_data(encoded(array, shapes[title][1]))
        done += array.nbytes
        report(done, total)
    writer.close()


def layout_of(config: TransformerConfig) -> GGUFLayout:
    """The layout of a model; UserError where llama.cpp has none for it."""
    family, _ = family_of(config)
    if (layout := family.gguf) is None:
        raise UserError(f"llama.cpp has no model like those of the family {family.name}")
    if (reason := layout.refusal(config)) is not None:
        raise UserError(f"llama.cpp's {layout.name} is not this model: {reason}")
    return layout


def model_fields(layout: GGUFLayout, config: TransformerConfig) -> tuple[dict[str, Any], list[str]]:
    """Fields that describe a model, and what the user should know of them."""
    attention, feed, notes = config.attention, config.feed_forward, []
    length = config.max_length
    rms = isinstance(config.norm, RMSNormConfig)
    fields: dict[str, Any] = {
        "embedding_length": config.hidden,
        "block_count": config.num_layers,
        "feed_forward_length": feed.size,
        "attention.head_count": attention.num_heads,
        "attention.head_count_kv": attention.kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        f"attention.layer_norm_{'rms_' if rms else ''}epsilon": float(config.norm.epsilon),
        "vocab_size": config.vocab_size,
    }
    if isinstance(attention.positions, Rotary):
        rotary = attention.positions
        fields["rope.dimension_count"] = int(attention.head_dim * rotary.fraction)
        fields["rope.freq_base"] = float(rotary.base)
        scaling, length = _scaling(rotary, length, notes)
        fields |= scaling
    if isinstance(feed, ExpertsConfig):
        fields |= {"expert_count": feed.experts, "expert_used_count": feed.router.chosen}
    if attention.softcap is not None:
        fields["attn_logit_softcapping"] = float(attention.softcap)
    if config.logit_softcap is not None:
        fields["final_logit_softcapping"] = float(config.logit_softcap)
    windows = [window for window in attention.windows if window is not None]
    if windows and layout.name == "gemma2":
        fields["attention.sliding_window"] = min(windows)
    elif windows and (length is None or min(windows) < length):
        length = min(windows)
        notes.append(
            f"llama.cpp has no window of {length} tokens for this model: the file says that its "
            f"context is {length} tokens, up to which it is the same model"
        )
    fields["context_length"] = length or 2048
    return {f"{layout.name}.{name}": value for name, value in fields.items()}, notes


def _scaling(
    rotary: Rotary, length: int | None, notes: list[str]
) -> tuple[dict[str, Any], int | None]:
    """Fields of stretched positions, and the context that the file can have."""
    scaling = rotary.scaling
    if scaling is None:
        return {}, length
    if isinstance(scaling, LinearScaling):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}, length
    if isinstance(scaling, YaRNScaling) and scaling.attention is None:
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling.factor),
            "rope.scaling.original_context_length": int(scaling.length),
        }, length
    if isinstance(scaling, DynamicScaling | DynamicNTKScaling):
        notes.append(
            f"llama.cpp does not stretch positions with the text: the file says that the context "
            f"is {scaling.length} tokens, up to which it is the same model"
        )
        return {}, int(scaling.length)
    raise UserError(f"a GGUF file cannot have positions with {type(scaling).__name__}")


def _tokenizer_fields(
    tokenizer: Tokenizer | None, config: TransformerConfig, notes: list[str]
) -> dict[str, Any]:
    try:
        if tokenizer is None:
            raise Unwritable("the model has none")
        return tokenizer_fields(tokenizer, config.vocab_size)
    except Unwritable as reason:
        notes.append(f"the file has no tokenizer, and takes tokens for text: {reason}")
        return {"tokenizer.ggml.model": "no_vocab"}


def _shapes(layout, config, paths, entries, kind, notes) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and kind of each tensor of the file, by name."""
    kinds, found, odd = type(kind), {}, []
    for name, index in entries:
        title = theirs(name, index, config)
        parts = [paths[path].shape[len(index) :] for path in name.ours]
        shape = name.transform.shape(parts, config)
        kept = kind
        if len(shape) < 2 or any(part in title for part in SMALL):
            kept = kinds.F32
        elif kind not in (kinds.F32, kinds.F16, kinds.BF16) and shape[-1] % BLOCK:
            kept = kinds.F16
            odd.append(title)
        found[title] = shape, kept
    if odd:
        notes.append(
            f"{len(odd)} tensors are float16: the rows of {odd[0]} are no multiple of {BLOCK}"
        )
    return found


def _arrays(config, paths, entries) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of the file in float32, one by one."""
    for name, index in entries:
        leaves = [whole(paths[path], index, "float32") for path in name.ours]
        array = name.transform.write(leaves, config)
        yield theirs(name, index, config), np.ascontiguousarray(array, np.float32)


def encoded(array: np.ndarray, kind: Any) -> np.ndarray:
    """A float32 tensor as the file has it."""
    if kind.name == "F32":
        return array
    if kind.name == "F16":
        return array.astype(np.float16)
    return library().quants.quantize(array, kind)


def _file_type(kind: GGUFType) -> str:
    return {"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """Adds a field, its type that of the value."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
