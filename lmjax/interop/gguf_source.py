"""GGUF files read back: the model, its tokenizer and its chat template."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.data.chat.folder import DEFAULT, Template, write_templates
from lmjax.interop.families import family_of
from lmjax.interop.gguf_file import library
from lmjax.interop.gguf_packed import in_few_bits, read_kept
from lmjax.interop.gguf_tokenizer import tokenizer_files
from lmjax.interop.huggingface import by_path, lay, nest, put
from lmjax.interop.library_tokenizer import Unwritable
from lmjax.interop.tensor_files import Report, report_nothing, write_json
from lmjax.interop.tensor_names import entries_of, theirs
from lmjax.models import (
    LinearScaling,
    LongRoPEScaling,
    Parallel,
    PreNorm,
    Rotary,
    TransformerConfig,
    YaRNScaling,
    abstract,
    bloom,
    chatglm2,
    decoding_layout,
    dense_axes,
    falcon,
    gemma2,
    gpt2,
    llama,
    mixtral,
    quantized_weights,
)
from lmjax.models.family import families
from lmjax.models.gguf_layout import GGUFLayout
from lmjax.models.rotary import RotaryScaling
from lmjax.parallel import Layout

SUFFIX = ".gguf"
LINK, NOTE = "weights.gguf", "tokenizer_note.txt"
FACTORS = "rope_freqs.weight"  # that the frequencies of LLaMA 3.1 are divided by
# Models that differ from those of each architecture in what a file says.
BASES = {
    "llama": lambda: llama("7B"),
    "qwen2": lambda: llama("7B"),
    "qwen3": lambda: llama("7B"),
    "gemma": lambda: replace(gemma2(), arrangement=PreNorm()),
    "gemma2": gemma2,
    "gpt2": gpt2,
    "bloom": bloom,
    "falcon": falcon,
    "chatglm": chatglm2,
}
WIDE_GEMMA = 46  # layers of the Gemma 2 whose scores have another scale


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """A file, mapped into memory.

    Attributes:
      path: of the file.
    """

    path: Path

    @functools.cached_property
    def reader(self) -> Any:
        """The library's reader; UserError for a damaged file."""
        gguf = library()
        try:
            return gguf.GGUFReader(self.path)
        except Exception as error:  # of whatever is read next
            raise UserError(f"{self.path} is no GGUF file, or a damaged one: {error}") from None

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """The fields by name."""
        return {name: field.contents() for name, field in self.reader.fields.items()}

    @functools.cached_property
    def tensors(self) -> dict[str, Any]:
        """The tensors by name, as the library has them."""
        return {tensor.name: tensor for tensor in self.reader.tensors}

    def get(self, name: str, usual: Any = None) -> Any:
        """A field of the architecture, or `usual` where it is not there."""
        return self.fields.get(f"{self.layout.name}.{name}", usual)

    def needed(self, name: str) -> Any:
        """A field of the architecture; UserError where it is not there, or is one of each layer."""
        if (found := self.get(name)) is None or isinstance(found, list):
            problem = "is missing" if found is None else "differs between layers"
            raise UserError(f"{self.path}: the field {self.layout.name}.{name} {problem}")
        return found

    @functools.cached_property
    def layout(self) -> GGUFLayout:
        """The layout of the file's architecture; UserError for one that is none of ours."""
        known = {family.gguf.name: family.gguf for family in families() if family.gguf}
        name = self.fields.get("general.architecture")
        if name not in known or name not in BASES:
            raise UserError(
                f"{self.path} is of the architecture {name}; those that can be read are"
                f" {', '.join(sorted(BASES))}"
            )
        return known[name]

    def shape(self, title: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(int(size) for size in self.tensors[title].shape[::-1])

    def read(self, title: str) -> np.ndarray:
        """A tensor in float32; UserError for a kind that the library cannot read."""
        tensor = self.tensors[title]
        try:
            numbers = library().quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{self.path}: {title} is kept as {tensor.tensor_type.name}, which the package gguf"
                " cannot read"
            ) from None
        return np.asarray(numbers, np.float32).reshape(self.shape(title))


def read_config(file: GGUFFile) -> TransformerConfig:
    """The config of a file's model; UserError where a field is missing or cannot be had."""
    base, has = BASES[file.layout.name](), file.tensors.__contains__
    hidden, layers = file.needed("embedding_length"), file.needed("block_count")
    heads = file.needed("attention.head_count")
    head_dim = file.get("attention.key_length", hidden // heads)
    kv_heads = file.get("attention.head_count_kv", heads)
    if isinstance(kv_heads, list):
        file.needed("attention.head_count_kv")
    norms = "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"
    epsilon = file.get(norms[0], file.get(norms[1]))
    norm = base.norm if epsilon is None else replace(base.norm, epsilon=_short(epsilon))
    fused = has("blk.0.attn_qkv.bias")
    attention = replace(
        base.attention,
        num_heads=heads,
        num_kv_heads=None if kv_heads == heads else kv_heads,
        head_dim=head_dim,
        bias=fused or has("blk.0.attn_q.bias"),
        output_bias=has("blk.0.attn_output.bias"),
        positions=_positions(file, base.attention.positions, head_dim),
        query_key_norm=norm if has("blk.0.attn_q_norm.weight") else None,
        softcap=file.get("attn_logit_softcapping"),
    )
    if file.layout.name == "gemma2":
        shared = hidden // heads if layers == WIDE_GEMMA else head_dim
        windows = (file.get("attention.sliding_window", 4096), None)
        attention = replace(attention, scale=shared**-0.5, windows=windows)
    else:
        attention = replace(attention, scale=None, windows=(None,))
    return replace(
        base,
        vocab_size=file.shape("token_embd.weight")[0],
        hidden=hidden,
        num_layers=layers,
        max_length=_length(file),
        attention=attention,
        feed_forward=_feed_forward(file, base),
        norm=norm,
        embedding_norm=None if base.embedding_norm is None else norm,
        embedding_scale=math.sqrt(hidden) if base.embedding_scale != 1 else 1.0,
        arrangement=_arrangement(file, base),
        tied_head=not has("output.weight"),
        normalized_head=False,
        logit_softcap=file.get("final_logit_softcapping"),
    )


def _short(number: float) -> float:
    """The shortest decimal that is the same in float32, which a file has."""
    return float(str(np.float32(number)))


def _length(file: GGUFFile) -> int:
    table = "position_embd.weight"
    return file.shape(table)[0] if table in file.tensors else file.needed("context_length")


def _arrangement(file: GGUFFile, base: TransformerConfig) -> Any:
    if isinstance(base.arrangement, Parallel):
        return Parallel(shared_norm="blk.0.attn_norm_2.weight" not in file.tensors)
    return base.arrangement


def _feed_forward(file: GGUFFile, base: TransformerConfig) -> Any:
    size = file.needed("feed_forward_length")
    if (experts := file.get("expert_count", 0)) == 0:
        return replace(base.feed_forward, size=size, bias="blk.0.ffn_up.bias" in file.tensors)
    if file.layout.name != "llama":
        raise UserError(f"{file.path}: {file.layout.name} with experts cannot be read")
    size = file.get("expert_feed_forward_length", size)
    mixture = mixtral().feed_forward
    router = replace(mixture.router, chosen=file.needed("expert_used_count"))
    return replace(mixture, size=size, experts=experts, router=router)


def _positions(file: GGUFFile, base: Any, head_dim: int) -> Any:
    if not isinstance(base, Rotary):
        return base
    turned = file.get("rope.dimension_count", head_dim)
    return Rotary(
        base=_short(file.get("rope.freq_base", 10_000.0)),
        fraction=turned / head_dim,
        interleaved=file.layout.interleaved,
        scaling=_scaling(file),
    )


def _scaling(file: GGUFFile) -> RotaryScaling | None:
    """The stretching of rotary positions; UserError for a kind that is none of ours."""
    kind = file.get("rope.scaling.type", "none")
    factor = file.get("rope.scaling.factor", file.get("rope.scale_linear", 1.0))
    if FACTORS in file.tensors:
        factors = tuple(map(_short, file.read(FACTORS).tolist()))
        return LongRoPEScaling(short=factors, long=factors, length=_length(file))
    if kind == "none" or factor == 1:
        return None
    if kind == "linear":
        return LinearScaling(factor=_short(factor))
    if kind == "yarn":
        length = file.needed("rope.scaling.original_context_length")
        return YaRNScaling(factor=_short(factor), length=length)
    raise UserError(f"{file.path}: positions that are stretched by {kind} cannot be read")


def read(
    path: Path,
    layout: Layout,
    report: Report = report_nothing,
    apart: bool = False,
    few_bits: bool = False,
) -> tuple[TransformerConfig, nnx.GraphDef, dict]:
    """The model in a file, its weights in float32; see `huggingface.read`.

    Weights of fewer bits are the numbers that they stand for.

    Args:
      path: of the file.
      layout: how the parameters are cut over the mesh.
      report: is told the bytes that are read, and of how many, after each tensor.
      apart: see `huggingface.read_params`.
      few_bits: keep weights in Q8_0 and Q4_0 as they are; see `gguf_packed.in_few_bits`.

    Raises:
      UserError: a damaged file, another architecture, a tensor that is missing, has another shape,
        has no place or is kept in a way that cannot be read.
    """
    file = GGUFFile(path)
    config = read_config(file)
    paths, left = by_path(abstract(config, layout)[1]), set(file.tensors) - {FACTORS}
    if few_bits:
        kinds = {title: tensor.tensor_type.name for title, tensor in file.tensors.items()}
        config = in_few_bits(file.layout, config, paths, kinds)
    graph, shapes = abstract(config, layout)
    shapes = by_path(shapes) | paths
    forms = {
        ".".join(one): dataclasses.replace(form, layout=layout)
        for one, form in quantized_weights(config).items()
    }
    turned = dense_axes(config) if apart and decoding_layout(config, layout).outputs_first else {}
    total, done = sum(int(tensor.n_bytes) for tensor in file.tensors.values()), 0
    params: dict[str, Any] = {}
    for name, index in entries_of(file.layout, config, paths):
        title = theirs(name, index, config)
        if title not in left:
            raise UserError(f"{path}: the tensor {title} is missing")
        parts = [paths[one].shape[len(index) :] for one in name.ours]
        wanted = name.transform.shape(parts, config)
        if file.shape(title) != wanted:
            raise UserError(
                f"{path}: {title} is {list(file.shape(title))}; by the fields of the file it"
                f" should be {list(wanted)}"
            )
        left.remove(title)
        kept = read_kept(name, forms, file.tensors[title], wanted)
        if kept is None:
            put(params, shapes, name, index, file.read(title), apart, forms, turned)
        else:
            for one, arrays in zip(name.ours, kept, strict=True):
                lay(params, shapes, one, index, arrays, apart)
        done += int(file.tensors[title].n_bytes)
        report(done, total)
    if left:
        raise UserError(f"{path}: {min(left)} has no place in the architecture {file.layout.name}")
    return config, graph, nest(params, config.num_layers if apart else None)


def is_gguf(source: Path) -> bool:
    """Returns whether a path is that of a GGUF file."""
    return source.suffix == SUFFIX and source.is_file()


def weights_of(folder: Path) -> Path | None:
    """The file that a folder of `as_folder` stands for; None for any other folder."""
    link = folder / LINK
    return link.resolve() if link.is_symlink() else None


@contextlib.contextmanager
def as_folder(source: Path) -> Iterator[Path]:
    """A model folder with all of a GGUF file but its weights; any other source is given as it is.

    It has config.json, the tokenizer's files and the chat template, and goes when the block ends.

    Raises:
      UserError: see `read`.
    """
    if not is_gguf(source):
        yield source
        return
    file = GGUFFile(source)
    config = read_config(file)
    with tempfile.TemporaryDirectory(prefix="gguf-") as name:
        folder = Path(name) / source.name  # which stands in messages
        folder.mkdir()
        (folder / LINK).symlink_to(os.path.realpath(source))
        write_json(folder / "config.json", family_of(config)[1])
        try:
            for title, data in tokenizer_files(file.fields).items():
                (folder / title).write_bytes(data)
        except Unwritable as reason:
            (folder / NOTE).write_text(str(reason), encoding="utf-8")
        if template := file.fields.get("tokenizer.chat_template"):
            write_templates(folder, {DEFAULT: Template(template, source.name)})
        yield folder


def tokenizer_note(folder: Path) -> str | None:
    """The reason why the folder of a GGUF file has no tokenizer; None: there is none."""
    path = folder / NOTE
    return path.read_text(encoding="utf-8") if path.exists() else None
