"""Hugging Face model folders: config.json and tensor files, read and written."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.config import replace
from lmjax.files import local_path
from lmjax.interop.families import architecture_of as architecture_of
from lmjax.interop.families import assumption as assumption
from lmjax.interop.families import family_of as family_of
from lmjax.interop.families import is_model_folder as is_model_folder
from lmjax.interop.families import read_config as read_config
from lmjax.interop.packed_files import open_tensors
from lmjax.interop.packed_formats import KEY
from lmjax.interop.packed_reader import read_packed, with_packed
from lmjax.interop.settings import read_settings
from lmjax.interop.tensor_files import (
    LARGEST_FILE,
    Report,
    report_nothing,
    size_of,
    write_json,
    write_tensors,
)
from lmjax.interop.tensor_names import Index, Shapes, entries_of, find_tensors, theirs
from lmjax.launch import is_first
from lmjax.models import (
    LoRA,
    TransformerConfig,
    abstract,
    decoding_layout,
    dense_axes,
    merge_adapters,
    quantized_weights,
    with_quantization,
)
from lmjax.models.family import ModelFamily
from lmjax.models.names import Name
from lmjax.models.outputs_first import DenseAxes
from lmjax.models.quantized import WeightForm
from lmjax.models.weight_codes import WeightCode
from lmjax.parallel import Layout, training_layout
from lmjax.remote import local_copy

Dtype = Literal["float32", "bfloat16"]
CACHE_LINE = 64  # bytes


def read(
    folder: str | os.PathLike, layout: Layout, report: Report = report_nothing
) -> tuple[TransformerConfig, nnx.GraphDef, dict]:
    """The model in a folder that transformers or a public checkpoint's authors wrote.

    Parameters go one tensor at a time to where `layout` wants them on the mesh that is set, in the
    precision of the file, and are float32 there. Beside them the host holds at most two copies of
    one tensor as it is in the file (`python -m benchmarks.interop_memory`).

    Args:
      folder: config.json and the weights: safetensors, or PyTorch's .bin files.
      layout: how the parameters are cut over the mesh.
      report: is told the bytes that are read, and of how many, after each tensor.

    Returns:
      The config, the model's structure and its parameters: `nnx.merge(graph, params)` is the model.

    Raises:
      UserError: an unknown model_type or a feature that is not supported; a wrong, missing, extra
        or mis-shaped tensor; a damaged file. The message names it.
    """
    folder = local_copy(folder, "folder")
    family, config = read_config(folder)
    graph, params = read_params(folder, family, config, layout, report)
    return config, graph, params


def read_params(
    folder: str | os.PathLike,
    family: ModelFamily,
    config: TransformerConfig,
    layout: Layout,
    report: Report = report_nothing,
    apart: bool = False,
    keep: WeightCode | None = None,
) -> tuple[nnx.GraphDef, dict]:
    """The structure and the parameters of a folder's model, whose config was read before.

    See `read`; `family` and `config` are what `read_config` gives. `apart` keeps the parameters of
    each block apart, in a list, instead of stacking them, in the order of `decoding_layout`. With
    `keep` the weights of the blocks are kept so (`LoRA.base`), and as `config.quantization` says
    where it is set: as they are in the folder where it has them just so (see `in_few_bits`), or
    else a device has no more than one of them in float32 at a time.
    """
    files = open_tensors(Path(folder), read_settings(Path(folder)))
    graph, _ = abstract(config, layout)
    paths = by_path(abstract(replace(config, quantization=None), layout)[1])
    found = find_tensors(family, config, paths, files)
    total, done = sum(size_of(files.shape(title)) for *_, title in found), 0
    params: dict[str, jax.Array] = {}
    small = config if keep is None else replace(config, lora=LoRA(base=keep, layers=("*",)))
    weights = {
        ".".join(path): dataclasses.replace(form, layout=layout)
        for path, form in quantized_weights(small).items()
    }
    shapes = paths if not weights else by_path(abstract(small, layout)[1]) | paths
    turned = dense_axes(config) if apart and decoding_layout(small, layout).outputs_first else {}
    for name, index, title in found:
        if (kept := read_packed(name, weights, files, title)) is not None:
            for path, parts in zip(name.ours, kept, strict=True):
                lay(params, shapes, path, index, parts, apart)
        else:
            put(params, shapes, name, index, files.read(title), apart, weights, turned)
        done += size_of(files.shape(title))
        report(done, total)
    return graph, nest(params, config.num_layers if apart else None)


def in_few_bits(
    folder: str | os.PathLike, family: ModelFamily, config: TransformerConfig
) -> tuple[TransformerConfig, str]:
    """The config that keeps the weights of a folder as it has them: in few bits, if it does.

    Args:
      folder: config.json and the weights.
      family: what `read_config` gives.
      config: what `read_config` gives.

    Returns:
      See `with_packed`.

    Raises:
      UserError: see `read`.
    """
    files = open_tensors(Path(folder), read_settings(Path(folder)))
    paths = by_path(abstract(config, Layout(rules=()))[1])
    return with_packed(family, config, paths, files)


def write(
    folder: str | os.PathLike,
    config: TransformerConfig,
    params: dict,
    dtype: Dtype = "float32",
    largest_file: int = LARGEST_FILE,
    report: Report = report_nothing,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes config.json and safetensors, which transformers loads; adapters are merged.

    Tensors are gathered and written one by one; config.json comes last. A mesh must be set, the
    one that the parameters lie on; with several processes all of them call this, and the first one
    writes.

    Args:
      folder: is made where it is not there; a model in it is replaced.
      config: of the model. One with a head on labels becomes the class of transformers with this
        head alone, whatever other heads `params` has.
      params: float32, as `read` or `initialize` gives them.
      dtype: of the written tensors.
      largest_file: in bytes; what is more goes to several files with an index.
      report: is told the bytes that are written, and of how many, after each tensor.
      extra: more of config.json, such as eos_token_id.

    Raises:
      UserError: no family of Hugging Face's can express the config.
    """
    folder = local_path(folder, "folder")
    params, config = with_quantization(*merge_adapters(params, config), None)
    family, settings = family_of(config)
    paths = by_path(params)
    if config.heads:  # which are all that the class has
        config = replace(config, word_head=False, classifier=None)
        kept = by_path(abstract(config, training_layout())[1])
        paths = {path: leaf for path, leaf in paths.items() if path in kept}
    entries = list(entries_of(family, config, paths))
    shapes = {}
    for name, index in entries:
        parts = [paths[path].shape[len(index) :] for path in name.ours]
        shape = name.transform.shape(parts, config)
        shapes[theirs(name, index, config)] = jax.ShapeDtypeStruct(shape, dtype)

    def tensor(name: Name, index: Index) -> np.ndarray:
        leaves = [whole(paths[path], index, dtype) for path in name.ours]
        return name.transform.write(leaves, config)

    tensors = (tensor(*entry) for entry in entries)  # holds none that was asked for before
    if not is_first():
        for _ in tensors:  # the first process needs the parts that lie here
            pass
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, shapes, tensors, largest_file, report)
    write_json(folder / "config.json", settings | {"torch_dtype": dtype, **extra})


def rewrite(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    dtype: Dtype | None = None,
    largest_file: int = LARGEST_FILE,
    report: Report = report_nothing,
) -> None:
    """Writes the model of one folder into another, from file to file: no device sees it whole.

    The source is checked like by `read`. Tensors keep their names; buffers and copies of tied
    tables are left out. config.json stays what it was, less the precision. Needs a mesh.

    Args:
      source: config.json and the weights.
      folder: is made where it is not there; a model in it is replaced.
      dtype: of the written tensors; None: as each is.
      largest_file: see `write`.
      report: see `write`.

    Raises:
      UserError: see `read`.
    """
    source, folder = local_copy(source, "source"), local_path(folder, "folder")
    family, config = read_config(source)
    files = open_tensors(source, read_settings(source))
    found = find_tensors(family, config, by_path(abstract(config, training_layout())[1]), files)
    shapes = {title: files.shape(title) for *_, title in found}
    settings = read_settings(source)
    settings.pop(KEY, None)  # weights that were packed are written as floats
    if dtype is not None:
        shapes = {t: jax.ShapeDtypeStruct(shape.shape, dtype) for t, shape in shapes.items()}
        # transformers calls it `dtype` since its version 5, and reads both.
        settings = {key: value for key, value in settings.items() if key != "dtype"}
        settings["torch_dtype"] = dtype
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, shapes, map(files.read, shapes), largest_file, report)
    write_json(folder / "config.json", settings)


def by_path(tree: dict) -> dict[str, Any]:
    """The leaves of nested dictionaries by dotted path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def nest(leaves: dict[str, jax.Array], layers: int | None = None) -> dict:
    """The opposite of `by_path`; `layers` of blocks that lie apart become a list."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *inner, last = path.split(".")
        node = tree
        for step in inner:
            node = node.setdefault(step, {})
        node[last] = leaf
    if layers is not None:
        tree["blocks"] = [tree["blocks"][str(layer)] for layer in range(layers)]
    return tree


def whole(leaf: jax.Array, index: Index, dtype: Dtype) -> np.ndarray:
    """A parameter, or one layer or expert of it, on the host."""
    if leaf.dtype == dtype and on_host(leaf):  # cut without a program to compile
        return np.asarray(leaf)[index]
    part = cut(leaf, index, dtype) if index else leaf.astype(dtype)
    if part.is_fully_addressable:  # by this process, which joins it on the host
        return np.asarray(part)
    return np.asarray(jax.reshard(part, PartitionSpec(*(None,) * part.ndim)))


def on_host(leaf: jax.Array) -> bool:
    """True for an array on a single CPU, of which numpy has a view without a copy."""
    [device, *others] = leaf.devices()
    return not others and device.platform == "cpu"


@functools.partial(jax.jit, static_argnames="dtype")
def cut(leaf: jax.Array, index: tuple[int | jax.Array, ...], dtype: Dtype) -> jax.Array:
    """One layer of a parameter, without an intermediate in the parameter's own precision.

    Of experts, which may be divided over the mesh, one of a layer.
    """
    for number in index:
        first, *rest = jax.typeof(leaf).sharding.spec
        if first is not None:
            leaf = jax.reshard(leaf, PartitionSpec(None, *rest))
        leaf = jax.lax.dynamic_index_in_dim(leaf, number, 0, keepdims=False)
    return leaf.astype(dtype)


def put(
    params: dict[str, jax.Array],
    shapes: Shapes,
    name: Name,
    index: Index,
    tensor: np.ndarray,
    apart: bool = False,
    weights: Mapping[str, WeightForm] = MappingProxyType({}),
    turned: Mapping[str, DenseAxes] = MappingProxyType({}),
) -> None:
    """Puts one of their tensors into `params`, which are made as they are needed.

    With `apart` a parameter of block 3 is called `blocks.3....`, and is not stacked on the others.
    Of those in `weights`, what is to be kept is put; those in `turned` have their outputs first.
    """
    inner = [shapes[path].shape[len(index) :] for path in name.ours]
    for path, part in zip(name.ours, name.transform.read(tensor, inner), strict=True):
        shape, mesh = shapes[path], jax.sharding.get_mesh()
        spec = shape.sharding.spec
        sharding = NamedSharding(mesh, PartitionSpec(*spec[len(index) :]))
        sizes = shape.shape[len(index) :]
        if (axes := turned.get(path)) is not None:
            part = axes.outputs_first(part)
            sizes = part.shape
        part = jax.device_put(whole_lines(part, sizes), sharding)
        parts = {"": part}
        if (weight := weights.get(path)) is not None:
            parts = encode_layer(_one_of(weight, part), part.astype(shape.dtype))
        lay(params, shapes, path, index, parts, apart)


def lay(
    params: dict[str, jax.Array],
    shapes: Shapes,
    path: str,
    index: Index,
    parts: Mapping[str, jax.Array],
    apart: bool = False,
) -> None:
    """Lays a parameter, or the arrays that are kept of it, into the stacks; see `put`."""
    block, own, to = path.removeprefix("blocks."), index, path
    if apart and block != path:
        to, own = f"blocks.{index[0]}.{block}", index[1:]
    for name, part in parts.items():
        ending = f".{name}" if name else ""
        shape, at = shapes[f"{path}{ending}"], f"{to}{ending}"
        if not own:
            params[at] = part.astype(shape.dtype)
        else:
            if at not in params:  # of experts apart by layer it is the layer's
                axes = len(shape.shape) - part.ndim - len(own)
                spec = PartitionSpec(*shape.sharding.spec[axes:])
                sizes = *shape.shape[axes : axes + len(own)], *part.shape
                params[at] = _zeros(sizes, shape.dtype, spec)
            params[at] = put_layer(params[at], part, own)
        # Waits, so that the host's copies do not pile up behind slow devices.
        params[at].block_until_ready()


def _zeros(sizes: tuple[int, ...], dtype: jnp.dtype, spec: PartitionSpec) -> jax.Array:
    """On the mesh; for a single CPU by the host, without a program to compile."""
    mesh = jax.sharding.get_mesh()
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        return jnp.zeros(sizes, dtype, out_sharding=spec)
    zeros = np.zeros(sizes, dtype)  # no memory as long as it is only read
    return jax.device_put(zeros, NamedSharding(mesh, spec), may_alias=False)


def _one_of(form: WeightForm, part: jax.Array) -> WeightForm:
    """The form of a part: of one expert, where the weight is a stack of them."""
    return form if part.ndim == len(form.shape) else dataclasses.replace(form, stack=())


encode_layer = jax.jit(WeightForm.encode, static_argnums=0)


def whole_lines(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A copy with zeros behind the first axis up to `shape`, which begins where a cache line does.

    On a CPU jax goes on using such memory instead of copying it. It must not be the file's own,
    which would change with the file.
    """
    size = math.prod(shape) * tensor.itemsize
    memory = np.empty(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    copy = memory[start : start + size].view(tensor.dtype).reshape(shape)
    copy[: len(tensor)] = tensor
    copy[len(tensor) :] = 0
    return copy


@functools.partial(jax.jit, donate_argnums=0)
def put_layer(leaf: jax.Array, part: jax.Array, index: tuple[int | jax.Array, ...]) -> jax.Array:
    """`leaf`, which is given up, with `part` for one of its layers, or an expert of a layer."""
    first, *rest = index
    if rest:
        part = put_layer(jax.lax.dynamic_index_in_dim(leaf, first, 0, False), part, tuple(rest))
    elif jax.typeof(leaf).sharding.spec[0] is not None:  # experts are divided over the mesh
        number = jax.lax.broadcasted_iota(
            jnp.int32, leaf.shape, 0, out_sharding=jax.typeof(leaf).sharding
        )
        return jnp.where(number == first, part.astype(leaf.dtype), leaf)
    return jax.lax.dynamic_update_index_in_dim(leaf, part.astype(leaf.dtype), first, 0)
