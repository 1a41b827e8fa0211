"""Folders of LoRA adapters as PEFT has them: adapter_config.json and adapter_model.safetensors.

The model that they belong to is another folder, which adapter_config.json names. Where their layer
is several of ours (a fused query_key_value), its A is read into each of ours, and our A's are
written one after another, with zeros in B between: the same function, at a higher rank.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.files import replacing
from lmjax.interop import huggingface
from lmjax.interop.adapter_settings import (
    CONFIG,
    alpha_of,
    is_rank_stabilised,
    read_adapter_settings,
    settings_of,
)
from lmjax.interop.families import family_of, is_model_folder, read_config
from lmjax.interop.tensor_files import Report, TensorFiles, report_nothing, write_json
from lmjax.interop.tensor_names import Shapes, theirs, titles_of
from lmjax.launch import is_first
from lmjax.models import LoRA, TransformerConfig, abstract
from lmjax.models.family import ModelFamily
from lmjax.models.lora import OUTPUT_HEAD
from lmjax.models.names import Grouped, Matrix, Name, Shape, Transform
from lmjax.parallel import Layout, training_layout
from lmjax.remote import local_copy

FILE = "adapter_model.safetensors"
FILES = ((FILE, f"{FILE}.index.json"), ("adapter_model.bin", "adapter_model.bin.index.json"))
PREFIX = "base_model.model."  # of PEFT's names


class TheirLayer(NamedTuple):
    """A layer of theirs that adapters stand beside: the line of the map, and ours that it holds."""

    name: Name
    layers: tuple[str, ...]  # dotted paths of ours

    @property
    def in_blocks(self) -> bool:
        """Returns whether each block has one; otherwise it is the head of words."""
        return self.layers != (OUTPUT_HEAD,)

    def parts(self, shapes: Shapes, config: TransformerConfig) -> list[Shape]:
        """Shapes of the weights of our layers, inputs first, in one block."""
        if not self.in_blocks:
            return [(shapes[f"{OUTPUT_HEAD}.table"].shape[1], config.vocab_size)]
        return [shapes[f"{layer}.weight"].shape[1:] for layer in self.layers]

    @property
    def module(self) -> str:
        """Its path in a block of theirs, such as self_attn.q_proj."""
        return self.name.theirs.removesuffix(".weight").rpartition("}.")[2]

    @property
    def inputs(self) -> int:
        """Number of axes of our weights that are inputs."""
        return self.name.transform.inputs if isinstance(self.name.transform, Matrix) else 1

    @property
    def outputs(self) -> Transform:
        """Layout of their B in ours; it is (outputs, rank) wherever the layer is (in, out) too."""
        return Grouped() if isinstance(self.name.transform, Grouped) else Matrix()

    @property
    def transposed(self) -> bool:
        """Returns whether their weight is (in, out), as those of Conv1D."""
        return isinstance(self.name.transform, Matrix) and not self.name.transform.transposed


class StoredAdapter(NamedTuple):
    """Adapters of one of their layers in a file."""

    line: TheirLayer
    layer: int
    a: str
    b: str
    scale: float
    own: str | None  # the weight of their head, which PEFT writes beside its adapter


class SharedInputs(Transform):
    """Their A, (rank, inputs), which each of our parts has for itself."""

    def read(self, tensor: np.ndarray, parts: list[Shape]) -> list[np.ndarray]:
        return [tensor.T.reshape(part) for part in parts]


def is_adapter_folder(folder: str | os.PathLike) -> bool:
    """Returns whether a folder holds adapters, and no model."""
    folder = local_copy(folder, "folder")
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_folder(folder: str | os.PathLike) -> Path:
    """Folder of the model that adapters belong to.

    Raises:
      UserError: adapter_config.json names none that is here.
    """
    folder = local_copy(folder, "folder")
    name = read_adapter_settings(folder).get("base_model_name_or_path")
    for path in (Path(name), folder / name) if name else ():
        if is_model_folder(path):
            return path
    raise UserError(
        f"{folder / CONFIG}: base_model_name_or_path={json.dumps(name)} is no model folder here;"
        " write the path of the folder with the model's config.json there"
    )


def text_folder(folder: str | os.PathLike) -> Path:
    """The folder with tokenizer and chat template: of adapters without them, the model's."""
    folder = local_copy(folder, "folder")
    if not is_adapter_folder(folder):
        return folder
    try:
        read_tokenizer(folder)
    except UserError:
        return base_folder(folder)
    return folder


def read_adapted_config(folder: str | os.PathLike) -> TransformerConfig:
    """The config of the model with the folder's adapters. UserError as `read_adapted`."""
    return _find(local_copy(folder, "folder"))[0]


def read_adapted(
    folder: str | os.PathLike, layout: Layout, report: Report = report_nothing
) -> tuple[TransformerConfig, nnx.GraphDef, dict]:
    """The model with a folder's adapters; see `huggingface.read`.

    Layers of another rank or alpha than most have the highest rank, filled up with zeros, and what
    differs in B.

    Raises:
      UserError: not plain LoRA; a tensor that is missing, or for no dense layer of the blocks; or
        the model's folder is not here.
    """
    folder = local_copy(folder, "folder")
    config, files, found = _find(folder)
    _, _, params = huggingface.read(base_folder(folder), layout, report)
    graph, tree = abstract(config, layout)
    shapes, leaves = huggingface.by_path(tree), huggingface.by_path(params)
    _check_shapes(folder, files, found, shapes, config)
    rank = config.lora.rank

    def put(
        line: TheirLayer, part: str, transform: Transform, layer: int, tensor: np.ndarray
    ) -> None:
        paths = tuple(f"{layer}.adapter.{part}.weight" for layer in line.layers)
        index = (layer,) if line.in_blocks else ()
        huggingface.put(leaves, shapes, Name("", paths, transform), index, tensor)

    for line, layer, a, b, scale, own in found:
        if own is not None:
            _require_own_head(files, own, leaves[f"{OUTPUT_HEAD}.table"])
        a, b = files.read(a), files.read(b).astype(np.float32)
        fill = rank - len(a)
        put(line, "a", SharedInputs(), layer, np.pad(a, ((0, fill), (0, 0))))
        # Rows that pad the vocabulary have no tokens.
        rows = 0 if line.in_blocks else config.padded_vocab - config.vocab_size
        b = np.pad(b * np.float32(scale / config.lora.scale), ((0, rows), (0, fill)))
        put(line, "b", line.outputs, layer, b)
    return config, graph, huggingface.nest(leaves)


def _check_shapes(
    folder: Path,
    files: TensorFiles,
    found: list[StoredAdapter],
    shapes: Shapes,
    config: TransformerConfig,
) -> None:
    """Raises UserError where adapters are missing, or do not fit their layers."""
    wanted = sum(
        shape.shape[0] if "blocks." in path else 1
        for path, shape in shapes.items()
        if path.endswith(".adapter.a.weight")
    )
    if wanted != sum(len(one.line.layers) for one in found):
        raise UserError(f"{folder / FILE}: some blocks have adapters that others lack")
    for line, _, a, b, *_ in found:
        parts = line.parts(shapes, config)
        rank, inputs = files.shape(a).shape[0], math.prod(parts[0][: line.inputs])
        outputs = sum(math.prod(part[line.inputs :]) for part in parts)
        for title, shape in ((a, (rank, inputs)), (b, (outputs, rank))):
            if files.shape(title).shape != shape:
                raise UserError(
                    f"{files.where(title)} is {list(files.shape(title).shape)}; beside the model's"
                    f" layer it should be {list(shape)}"
                )


def _require_own_head(files: TensorFiles, title: str, table: jax.Array) -> None:
    """Raises UserError where the head beside its adapter is not that of the model's folder."""
    found = files.read(title).astype(np.float32)
    if not np.array_equal(found, huggingface.whole(table, (), "float32")[: len(found)]):
        raise UserError(
            f"{files.where(title)} is another head than that of the model's folder: it was trained,"
            " or is of another model"
        )


def write_adapters(
    folder: str | os.PathLike, config: TransformerConfig, params: dict, base: str | None
) -> None:
    """Writes the adapters of a model alone, as PEFT loads them.

    A mesh must be set; with several processes all of them call this, and the first one writes.

    Args:
      folder: exists.
      config: of the model, with adapters.
      params: all of its parameters.
      base: the model's folder; None: it is not known.

    Raises:
      UserError: there are no adapters, or PEFT has no such layers.
    """
    if config.lora is None:
        raise UserError("the model has no adapters")
    family, _ = family_of(config)
    leaves, tensors, ranks = huggingface.by_path(params), {}, {}
    # Of float weights, also where the base is kept in few bits.
    plain = replace(config, lora=replace(config.lora, base=None))
    shapes = huggingface.by_path(abstract(plain, training_layout())[1])
    adapted = {path.partition(".adapter.")[0] for path in leaves if ".adapter." in path}
    lines = [line for line in _lines(family, config) if adapted & set(line.layers)]
    if lost := adapted - {layer for line in lines for layer in line.layers}:
        raise UserError(
            f"PEFT has no adapters for {', '.join(sorted(lost))} of {family.model_type}"
        )
    for line in lines:
        for layer, (a, b) in enumerate(_written(line, leaves, shapes, config)):
            title = theirs(line.name, (layer,), config).removesuffix(".weight")
            if not config.word_head:
                title = title.removeprefix(family.prefix)
            tensors[f"{PREFIX}{title}.lora_A.weight"] = np.ascontiguousarray(a)
            tensors[f"{PREFIX}{title}.lora_B.weight"] = np.ascontiguousarray(b)
            ranks[line] = len(a)
    if is_first():
        from safetensors.numpy import save

        with replacing(Path(folder) / FILE) as unfinished:
            unfinished.write_bytes(save(tensors, {"format": "pt"}))
        task = "CAUSAL_LM" if config.word_head and config.attention.causal else None
        of_model = {"base_model_name_or_path": base, "task_type": task}
        modules = [line.module for line in _lines(family, config)]
        of_layers = [(line.module, rank) for line, rank in ranks.items()]
        transposed = any(line.transposed for line in ranks)
        settings = settings_of(config.lora, of_layers, modules, transposed)
        write_json(Path(folder) / CONFIG, of_model | settings)


def _written(
    line: TheirLayer, leaves: dict, shapes: Shapes, config: TransformerConfig
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Their A and B of each block."""

    def whole(part: str) -> dict[str, np.ndarray]:
        found = {layer: leaves.get(f"{layer}.adapter.{part}.weight") for layer in line.layers}
        arrays = {
            layer: huggingface.whole(leaf, (), "float32")
            for layer, leaf in found.items()
            if leaf is not None
        }
        return arrays if line.in_blocks else {layer: a[None] for layer, a in arrays.items()}

    every_a, every_b = whole("a"), whole("b")
    first = next(iter(every_a.values()))
    rank, shared = first.shape[-1], all(np.array_equal(first, a) for a in every_a.values())
    for layer in range(len(first)):
        own = [first] if shared else list(every_a.values())
        a = np.concatenate([part[layer].reshape(-1, rank).T for part in own])
        parts, row = [], 0
        for path, shape in zip(line.layers, line.parts(shapes, config), strict=True):
            outputs = shape[line.inputs :]
            parts.append(np.zeros((len(a), *outputs), np.float32))
            if path in every_b:
                parts[-1][row : row + rank] = every_b[path][layer][:, : outputs[0]]
                row += 0 if shared else rank
        yield a, line.outputs.write(parts, config)


def _lines(family: ModelFamily, config: TransformerConfig) -> list[TheirLayer]:
    """The dense layers of their blocks, and their head, that a model of this config may have."""
    found = []
    for name in family.names:
        weights = all(re.search(r"(^|\.)blocks\..*\.weight$", path) for path in name.ours)
        known = isinstance(name.transform, (Matrix, Grouped)) and "{expert}" not in name.theirs
        fits = name.when is None or name.when(config)
        if weights and known and fits:
            found.append(
                TheirLayer(name, tuple(path.removesuffix(".weight") for path in name.ours))
            )
        own_head = config.word_head and not config.tied_head
        if name.ours == (f"{OUTPUT_HEAD}.table",) and own_head and fits:
            found.append(TheirLayer(name, (OUTPUT_HEAD,)))
    return found


def _find(folder: Path) -> tuple[TransformerConfig, TensorFiles, list[StoredAdapter]]:
    """The config with adapters, their file, and all of them in it."""
    settings, (family, config) = read_adapter_settings(folder), read_config(base_folder(folder))
    files = TensorFiles(folder, FILES)
    left, found, ranks = set(files.names), [], {}
    stable = is_rank_stabilised(settings)
    for line in _lines(family, config):
        for layer in range(config.depth if line.in_blocks else 1):
            for title in titles_of(family, theirs(line.name, (layer,), config)):
                module = title.removesuffix(".weight")
                a, b = (f"{PREFIX}{module}.lora_{part}.weight" for part in "AB")
                if {a, b} <= left:
                    own = f"{PREFIX}{module}.base_layer.weight"
                    own = own if own in left and not line.in_blocks else None
                    left -= {a, b, own}
                    rank = files.shape(a).shape[0]
                    alpha = alpha_of(settings, module)
                    ranks[rank, alpha] = None
                    scale = LoRA(rank=rank, alpha=alpha, rank_stabilised=stable).scale
                    found.append(StoredAdapter(line, layer, a, b, scale, own))
    if left or not found:
        which = files.where(min(left)) if left else f"{folder / FILE} is empty and"
        raise UserError(f"{which} is for no dense layer of the blocks of a {family.model_type}")
    # The highest rank, and its alpha where all have that.
    rank, alpha = max(ranks)
    layers = {path.partition("blocks.")[2] or path for one in found for path in one.line.layers}
    lora = LoRA(
        rank=rank,
        alpha=alpha,
        rank_stabilised=stable,
        dropout=float(settings.get("lora_dropout") or 0.0),
        layers=tuple(sorted(layers)),
    )
    return replace(config, lora=lora), files, found
