"""Models with weights in few bits as folders of transformers': GPTQ, AWQ, compressed-tensors."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import numpy as np

from lmjax.config import UserError
from lmjax.files import local_path
from lmjax.interop.families import family_of
from lmjax.interop.huggingface import Dtype, by_path, on_host, whole
from lmjax.interop.packed_formats import (
    KEY,
    AWQFormat,
    CompressedFormat,
    GPTQFormat,
    PackedFormat,
)
from lmjax.interop.packed_integers import PackedWeight
from lmjax.interop.packed_reader import of_matrices
from lmjax.interop.tensor_files import (
    LARGEST_FILE,
    Report,
    report_nothing,
    write_json,
    write_tensors,
)
from lmjax.interop.tensor_names import Index, entries_of, theirs
from lmjax.launch import is_first
from lmjax.models import TransformerConfig, merge_adapters, quantized_weights, with_quantization
from lmjax.models.names import Matrix, Name
from lmjax.models.number_codes import IntegerCode
from lmjax.models.quantized import WeightForm

PackedKind = Literal["gptq", "awq", "compressed-tensors"]


def write_packed(
    folder: str | os.PathLike,
    config: TransformerConfig,
    params: dict,
    dtype: Dtype = "float32",
    largest_file: int = LARGEST_FILE,
    report: Report = report_nothing,
    extra: Mapping[str, Any] = MappingProxyType({}),
    kind: PackedKind = "compressed-tensors",
) -> None:
    """Writes config.json and safetensors, dense layers packed; tables are floats there.

    Args:
      folder: is made where it is not there.
      config: of the model, whose `quantization` has integers.
      params: its parameters.
      dtype: of the tensors that are not packed.
      largest_file: see `huggingface.write`.
      report: see `huggingface.write`.
      extra: see `huggingface.write`.
      kind: the format.

    Raises:
      UserError: the format cannot have such weights, or no family of transformers' the model.
    """
    folder, form = local_path(folder, "folder"), packed_format(config, kind)
    forms = {".".join(path): weight for path, weight in quantized_weights(config).items()}
    stored = by_path(params)
    floats, plain = with_quantization(*merge_adapters(params, config), None)
    family, settings = family_of(plain)
    paths, ignored = by_path(floats), []
    tensors: dict[str, np.ndarray] = {}
    for name, index in entries_of(family, plain, paths):
        title = theirs(name, index, plain)
        if set(name.ours) <= forms.keys() and "table" not in name.ours[0]:
            packed = _packed(name, index, forms, stored, plain, title)
            layer = title.removesuffix(".weight")
            tensors |= {f"{layer}.{part}": a for part, a in form.write(packed).items()}
        else:
            if isinstance(name.transform, Matrix) or title == family.tied[0]:
                ignored.append(title.removesuffix(".weight"))
            leaves = [whole(paths[path], index, dtype) for path in name.ours]
            tensors[title] = name.transform.write(leaves, plain)
    if not is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {title: jax.ShapeDtypeStruct(a.shape, a.dtype) for title, a in tensors.items()}
    write_tensors(folder, shapes, iter(tensors.values()), largest_file, report)
    if plain.tied_head:
        ignored.append(family.tied[0].removesuffix(".weight"))
    more = {KEY: form.settings(ignored), "torch_dtype": dtype, **extra}
    write_json(folder / "config.json", settings | more)


def packed_format(config: TransformerConfig, kind: PackedKind) -> PackedFormat:
    """The format of a model's weights. UserError where this kind cannot have them."""
    code = None if config.quantization is None else config.quantization.weights
    if not isinstance(code, IntegerCode) or config.quantization.activations is not None:
        raise UserError(f"to={kind}: it is for weights=int8 or int4, and activations=none")
    if kind == "awq":
        if code.bits != 4:
            raise UserError("to=awq: it has weights of 4 bits; set weights=int4")
        return AWQFormat(code.bits, code.block, False)
    if kind == "gptq":
        # A zero of 0 less one is no number of so few bits: the second version keeps it as it is.
        return GPTQFormat(code.bits, code.block, code.symmetric, less_one=code.symmetric)
    return CompressedFormat(code.bits, code.block, code.symmetric)


def _packed(
    name: Name,
    index: Index,
    forms: Mapping[str, WeightForm],
    stored: Mapping[str, jax.Array],
    config: TransformerConfig,
    title: str,
) -> PackedWeight:
    """One of their weights, of what is kept of ours."""
    transform = of_matrices(name.transform, title)
    found: list[tuple[np.ndarray, ...]] = []
    for path in name.ours:
        form = forms[path]
        code, size = form.code, form.size
        if size % code.of(size):
            raise UserError(
                f"{title} has {size} inputs, no multiple of group={code.block}, as these formats"
                " need it: give another group"
            )
        kept = {part: a for part, a in stored.items() if part.startswith(f"{path}.")}
        kept = {part.removeprefix(f"{path}."): _one(a, index) for part, a in kept.items()}
        kept = _opened(form, kept)
        n = np.asarray(kept["codes"])[:size] - code.lowest
        scale = np.asarray(kept["scales"])
        middle = np.full(scale.shape, -code.lowest)
        zero = np.asarray(kept["zeros"]) if "zeros" in kept else middle
        outputs = tuple(size for _, size in form.outputs)
        found.append(tuple(a.reshape(-1, *outputs) for a in (n, zero, scale)))
    n, zero, scale = (transform.write(parts, config).T for parts in zip(*found, strict=True))
    return PackedWeight(forms[name.ours[0]].code.bits, n.astype(np.uint8), zero.astype(int), scale)


@functools.partial(jax.jit, static_argnums=0)
def _opened(form: WeightForm, kept: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays that are kept of a matrix [in, out], with a number for each of its codes."""
    kept = form.turned(kept)
    return kept | {"codes": form.code.raw(kept["codes"], 0)}


def _one(a: jax.Array, index: Index) -> np.ndarray:
    """The part of an array for one layer, or one expert of it."""
    if on_host(a):
        return np.asarray(a)[index]
    for number in index:
        a = a[number]
    return np.asarray(jax.reshard(a, jax.P(*(None,) * a.ndim)))
