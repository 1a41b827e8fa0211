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
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.files import errors_told, replacing
from lmjax.interop import huggingface
from lmjax.interop.families import family_of, is_model_folder, read_config
from lmjax.interop.tensor_files import Report, TensorFiles, report_nothing, write_json
from lmjax.interop.tensor_names import Shapes, theirs, titles_of
from lmjax.launch import is_first
from lmjax.models import LoRA, TransformerConfig, abstract
from lmjax.models.family import ModelFamily
from lmjax.models.names import Grouped, Matrix, Name, Shape, Transform
from lmjax.parallel import Layout, training_layout
from lmjax.remote import local_copy

CONFIG = "adapter_config.json"
FILE = "adapter_model.safetensors"
FILES = ((FILE, f"{FILE}.index.json"), ("adapter_model.bin", "adapter_model.bin.index.json"))
PREFIX = "base_model.model."  # of PEFT's names
# Settings that change what is computed, or trained beside adapters, and the values that do not.
PLAIN = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "layer_replication": ([],),
    "alora_invocation_tokens": ([],),
    "monteclora_config": ({},),
    "kasa_config": ({},),
    "velora_config": ({},),
    "arrow_config": ({},),
}
# Ways to begin that change the weights beside the adapters.
CHANGING = re.compile("pissa|olora|corda|loftq|lora_ga")


class TheirLayer(NamedTuple):
    """A dense layer of theirs: the line of the map, and those of ours that it holds."""

    name: Name
    layers: tuple[str, ...]  # dotted paths of ours

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
    name = _settings(folder).get("base_model_name_or_path")
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
    _check_shapes(folder, files, found, shapes)
    rank = config.lora.rank

    def put(
        line: TheirLayer, part: str, transform: Transform, layer: int, tensor: np.ndarray
    ) -> None:
        paths = tuple(f"{layer}.adapter.{part}.weight" for layer in line.layers)
        huggingface.put(leaves, shapes, Name("", paths, transform), (layer,), tensor)

    for line, layer, a, b, scale in found:
        a, b = files.read(a), files.read(b).astype(np.float32)
        fill = rank - len(a)
        put(line, "a", SharedInputs(), layer, np.pad(a, ((0, fill), (0, 0))))
        b = np.pad(b * np.float32(scale / config.lora.scale), ((0, 0), (0, fill)))
        put(line, "b", line.outputs, layer, b)
    return config, graph, huggingface.nest(leaves)


def _check_shapes(
    folder: Path, files: TensorFiles, found: list[StoredAdapter], shapes: Shapes
) -> None:
    """Raises UserError where adapters are missing, or do not fit their layers."""
    wanted = sum(s.shape[0] for path, s in shapes.items() if path.endswith(".adapter.a.weight"))
    if wanted != sum(len(one.line.layers) for one in found):
        raise UserError(f"{folder / FILE}: some blocks have adapters that others lack")
    for line, _, a, b, _ in found:
        parts = [shapes[f"{layer}.weight"].shape[1:] for layer in line.layers]
        rank, inputs = files.shape(a).shape[0], math.prod(parts[0][: line.inputs])
        outputs = sum(math.prod(part[line.inputs :]) for part in parts)
        for title, shape in ((a, (rank, inputs)), (b, (outputs, rank))):
            if files.shape(title).shape != shape:
                raise UserError(
                    f"{files.where(title)} is {list(files.shape(title).shape)}; beside the model's"
                    f" layer it should be {list(shape)}"
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
        write_json(Path(folder) / CONFIG, of_model | _settings_of(config.lora, ranks, modules))


def _written(
    line: TheirLayer, leaves: dict, shapes: Shapes, config: TransformerConfig
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Their A and B of each block."""

    def whole(part: str) -> dict[str, np.ndarray]:
        found = {layer: leaves.get(f"{layer}.adapter.{part}.weight") for layer in line.layers}
        return {
            layer: huggingface.whole(leaf, (), "float32")
            for layer, leaf in found.items()
            if leaf is not None
        }

    every_a, every_b = whole("a"), whole("b")
    first = next(iter(every_a.values()))
    rank, shared = first.shape[-1], all(np.array_equal(first, a) for a in every_a.values())
    for layer in range(len(first)):
        own = [first] if shared else list(every_a.values())
        a = np.concatenate([part[layer].reshape(-1, rank).T for part in own])
        parts, row = [], 0
        for path in line.layers:
            outputs = shapes[f"{path}.weight"].shape[1 + line.inputs :]
            parts.append(np.zeros((len(a), *outputs), np.float32))
            if path in every_b:
                parts[-1][row : row + rank] = every_b[path][layer]
                row += 0 if shared else rank
        yield a, line.outputs.write(parts, config)


def _settings_of(lora: LoRA, ranks: dict[TheirLayer, int], modules: list[str]) -> dict[str, Any]:
    """An adapter_config.json, less what it says of the model.

    Args:
      lora: ours.
      ranks: of each of their layers with adapters.
      modules: all dense layers of theirs.
    """

    def alpha(rank: int) -> int | float:
        exact = lora.scale * (math.sqrt(rank) if lora.rank_stabilised else rank)
        return round(exact) if math.isclose(exact, round(exact), rel_tol=1e-12) else exact

    def short(module: str) -> str:
        """Last name, as is usual, where no other layer has it."""
        last = module.rpartition(".")[2]
        alike = {other for other in modules if other.rpartition(".")[2] == last}
        return last if len(alike) == 1 else module

    usual = lora.rank if lora.rank in ranks.values() else max(ranks.values())
    targets = {short(line.module): rank for line, rank in ranks.items()}
    unusual = {module: rank for module, rank in targets.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": alpha(usual),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilised,
        "rank_pattern": unusual,
        "alpha_pattern": {module: alpha(rank) for module, rank in unusual.items()},
        "target_modules": sorted(targets),
        "fan_in_fan_out": any(line.transposed for line in ranks),
        "bias": "none",
        "inference_mode": True,
    }


def _lines(family: ModelFamily, config: TransformerConfig) -> list[TheirLayer]:
    """The dense layers of their blocks that a model of this config may have."""
    found = []
    for name in family.names:
        weights = all(re.search(r"(^|\.)blocks\..*\.weight$", path) for path in name.ours)
        known = isinstance(name.transform, (Matrix, Grouped)) and "{expert}" not in name.theirs
        if weights and known and (name.when is None or name.when(config)):
            found.append(
                TheirLayer(name, tuple(path.removesuffix(".weight") for path in name.ours))
            )
    return found


def _find(folder: Path) -> tuple[TransformerConfig, TensorFiles, list[StoredAdapter]]:
    """The config with adapters, their file, and all of them in it."""
    settings, (family, config) = _settings(folder), read_config(base_folder(folder))
    files = TensorFiles(folder, FILES)
    left, found, ranks = set(files.names), [], {}
    for line in _lines(family, config):
        for layer in range(config.depth):
            for title in titles_of(family, theirs(line.name, (layer,), config)):
                module = title.removesuffix(".weight")
                a, b = (f"{PREFIX}{module}.lora_{part}.weight" for part in "AB")
                if {a, b} <= left:
                    left -= {a, b}
                    rank = files.shape(a).shape[0]
                    alpha = _alpha(settings, module)
                    ranks[rank, alpha] = None
                    scale = LoRA(rank=rank, alpha=alpha, rank_stabilised=_stable(settings)).scale
                    found.append(StoredAdapter(line, layer, a, b, scale))
    if left or not found:
        which = files.where(min(left)) if left else f"{folder / FILE} is empty and"
        raise UserError(f"{which} is for no dense layer of the blocks of a {family.model_type}")
    # The highest rank, and its alpha where all have that.
    rank, alpha = max(ranks)
    layers = {path.partition("blocks.")[2] for one in found for path in one.line.layers}
    lora = LoRA(
        rank=rank,
        alpha=alpha,
        rank_stabilised=_stable(settings),
        dropout=float(settings.get("lora_dropout") or 0.0),
        layers=tuple(sorted(layers)),
    )
    return replace(config, lora=lora), files, found


def _stable(settings: dict[str, Any]) -> bool:
    return bool(settings.get("use_rslora"))


def _alpha(settings: dict[str, Any], module: str) -> float:
    """Alpha of a layer, whose name is matched as in PEFT."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(alpha)
    return float(settings.get("lora_alpha", 8))  # which is PEFT's own default


def _settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json. UserError where it is damaged, or is not of plain LoRA."""
    path = folder / CONFIG
    with errors_told("cannot read the adapters"):
        try:
            settings = json.loads(path.read_text("utf-8"))
        except ValueError:
            settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is damaged: it should hold an object")
    if (kind := settings.get("peft_type")) != "LORA":
        raise UserError(f"{path}: peft_type={json.dumps(kind)} is not supported, only LORA")
    for name, plain in PLAIN.items():
        if (value := settings.get(name)) is not None and value not in plain:
            raise UserError(
                f"{path}: {name}={json.dumps(value)} is not supported, only {json.dumps(plain[0])}"
            )
    if CHANGING.match(start := str(settings.get("init_lora_weights"))):
        raise UserError(
            f"{path}: init_lora_weights={json.dumps(start)} changes the model's own weights too;"
            " PEFT converts such adapters to plain ones (path_initial_model_for_weight_conversion)"
        )
    return settings
