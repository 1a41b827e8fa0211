"""Formats of public models with quantised weights, read and written: GPTQ, AWQ, compressed-tensors.

They are data in `quantization_config` of config.json and in the tensors beside each dense layer.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from lmjax.config import UserError
from lmjax.interop.packed_integers import AWQ_ORDER, PackedGrid, PackedWeight, pack, unpack

Tensors = dict[str, np.ndarray]
KEY = "quantization_config"


@dataclasses.dataclass(frozen=True)
class PackedFormat(abc.ABC):
    """Base of the formats.

    Attributes:
      bits: of a weight.
      block: inputs that share a scale; None: all.
      symmetric: whether zeros are in the middle.
    """

    name: ClassVar[str]  # quant_method
    marks: ClassVar[tuple[str, ...]]  # the tensors that show that a layer is quantised
    parts: ClassVar[tuple[str, ...]]  # all that a layer may have in place of `weight`
    large: ClassVar[tuple[str, ...]] = ("qweight",)  # those with a number for each weight

    bits: int = 4
    block: int | None = 128
    symmetric: bool = True

    @staticmethod
    @abc.abstractmethod
    def of(settings: Mapping[str, Any]) -> PackedFormat:
        """The format that a quantization_config stands for. UserError where it is not known."""

    @abc.abstractmethod
    def settings(self, ignored: list[str]) -> dict[str, Any]:
        """The quantization_config, with the names of dense layers that stay float."""

    @abc.abstractmethod
    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """Outputs and inputs of a layer whose tensors have these shapes."""

    @abc.abstractmethod
    def grid(self, tensors: Tensors) -> PackedGrid:
        """Scales and zeros of a layer's tensors, of which those of `large` are not needed."""

    @abc.abstractmethod
    def integers(self, tensors: Tensors) -> PackedWeight | None:
        """The integers of a layer's tensors; None: they are floats of 8 bits."""

    def read(self, tensors: Tensors) -> np.ndarray:
        """The weight [out, in] in float32 of a layer's tensors."""
        return self.integers(tensors).weight()

    @abc.abstractmethod
    def write(self, weight: PackedWeight) -> Tensors:
        """The tensors of a layer."""


@dataclasses.dataclass(frozen=True)
class GPTQFormat(PackedFormat):
    """That of AutoGPTQ and GPTQModel.

    Attributes:
      less_one: whether zeros are kept less one, as before their second version.
    """

    name: ClassVar[str] = "gptq"
    marks: ClassVar[tuple[str, ...]] = ("qweight",)
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    less_one: bool = True

    @staticmethod
    def of(settings: Mapping[str, Any]) -> GPTQFormat:
        """See `PackedFormat.of`."""
        bits, block = bits_of(settings, (2, 4, 8)), group_of(settings.get("group_size", 128))
        version = settings.get("checkpoint_format", "gptq")
        if version not in ("gptq", "gptq_v2"):
            raise UserError(f"checkpoint_format={version!r} is not supported, only gptq, gptq_v2")
        return GPTQFormat(bits, block, bool(settings.get("sym", True)), version == "gptq")

    def settings(self, ignored: list[str]) -> dict[str, Any]:
        """See `PackedFormat.settings`."""
        return {
            "quant_method": self.name,
            "bits": self.bits,
            "group_size": -1 if self.block is None else self.block,
            "sym": self.symmetric,
            "desc_act": False,
            "checkpoint_format": "gptq" if self.less_one else "gptq_v2",
        }

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """See `PackedFormat.shape`."""
        words, outputs = shapes["qweight"]
        return outputs, shapes["g_idx"][0] if "g_idx" in shapes else words * 32 // self.bits

    def grid(self, tensors: Tensors) -> PackedGrid:
        """See `PackedFormat.grid`."""
        scale, groups = tensors["scales"], tensors.get("g_idx")
        zero = unpack(tensors["qzeros"], self.bits, 1, scale.shape[1])
        if self.less_one:  # -1 is kept as the largest number
            zero = (zero + 1) & (2**self.bits - 1)
        return PackedGrid(zero, scale, None if groups is None else np.asarray(groups, np.int64))

    def integers(self, tensors: Tensors) -> PackedWeight:
        """See `PackedFormat.integers`."""
        _, inputs = self.shape({name: a.shape for name, a in tensors.items()})
        n = unpack(tensors["qweight"], self.bits, 0, inputs)
        return PackedWeight(self.bits, n, *self.grid(tensors))

    def write(self, weight: PackedWeight) -> Tensors:
        """See `PackedFormat.write`."""
        zero = (weight.zero - self.less_one) & (2**self.bits - 1)
        return {
            "qweight": pack(weight.n, self.bits, 0),
            "qzeros": pack(zero, self.bits, 1),
            "scales": weight.scale.astype(np.float16),
            "g_idx": weight.groups.astype(np.int32),
        }


@dataclasses.dataclass(frozen=True)
class AWQFormat(PackedFormat):
    """That of AutoAWQ, of version gemm."""

    name: ClassVar[str] = "awq"
    marks: ClassVar[tuple[str, ...]] = ("qweight",)
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    @staticmethod
    def of(settings: Mapping[str, Any]) -> AWQFormat:
        """See `PackedFormat.of`."""
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise UserError(f"version={version!r} of AWQ is not supported, only gemm")
        return AWQFormat(bits_of(settings, (4,)), group_of(settings.get("group_size", 128)), False)

    def settings(self, ignored: list[str]) -> dict[str, Any]:
        """See `PackedFormat.settings`."""
        return {
            "quant_method": self.name,
            "bits": self.bits,
            "group_size": -1 if self.block is None else self.block,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ignored or None,
        }

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """See `PackedFormat.shape`."""
        inputs, words = shapes["qweight"]
        return words * 32 // self.bits, inputs

    def grid(self, tensors: Tensors) -> PackedGrid:
        """See `PackedFormat.grid`."""
        scale = tensors["scales"]
        zero = unpack(tensors["qzeros"], self.bits, 1, scale.shape[1], AWQ_ORDER)
        return PackedGrid(zero, scale)

    def integers(self, tensors: Tensors) -> PackedWeight:
        """See `PackedFormat.integers`."""
        outputs = tensors["scales"].shape[1]
        n = unpack(tensors["qweight"], self.bits, 1, outputs, AWQ_ORDER)
        return PackedWeight(self.bits, n, *self.grid(tensors))

    def write(self, weight: PackedWeight) -> Tensors:
        """See `PackedFormat.write`. UserError where outputs do not fill their words."""
        if weight.n.shape[1] % 8:
            raise UserError(
                f"to=awq: a layer has {weight.n.shape[1]} outputs, no multiple of 8; to=gptq and"
                " to=compressed-tensors can have it"
            )
        return {
            "qweight": pack(weight.n, self.bits, 1, AWQ_ORDER),
            "qzeros": pack(weight.zero, self.bits, 1, AWQ_ORDER),
            "scales": weight.scale.astype(np.float16),
        }


@dataclasses.dataclass(frozen=True)
class CompressedFormat(PackedFormat):
    """That of compressed-tensors, which llm-compressor and vLLM have.

    Attributes:
      format: pack-quantized, int-quantized or float-quantized.
    """

    name: ClassVar[str] = "compressed-tensors"
    marks: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")
    parts: ClassVar[tuple[str, ...]] = (
        *("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape"),
        *("weight_g_idx", "input_scale", "input_zero_point"),
    )
    large: ClassVar[tuple[str, ...]] = ("weight_packed", "weight")

    format: str = "pack-quantized"

    @staticmethod
    def of(settings: Mapping[str, Any]) -> CompressedFormat:
        """See `PackedFormat.of`."""
        kind, groups = settings.get("format"), settings.get("config_groups")
        known = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")
        if kind not in known:
            raise UserError(f"format={kind!r} is not supported, only {', '.join(known)}")
        if not isinstance(groups, dict) or len(groups) != 1:
            raise UserError("config_groups: one group of layers is supported, and no more")
        weights = next(iter(groups.values())).get("weights") or {}
        strategy = weights.get("strategy")
        if strategy not in ("group", "channel", "tensor"):
            raise UserError(
                f"strategy={strategy!r} is not supported, only group, channel and tensor"
            )
        bits = bits_of({"bits": weights.get("num_bits")}, (4, 8))
        block = group_of(weights.get("group_size")) if strategy == "group" else None
        return CompressedFormat(bits, block, bool(weights.get("symmetric", True)), kind)

    def settings(self, ignored: list[str]) -> dict[str, Any]:
        """See `PackedFormat.settings`."""
        weights = {
            "num_bits": self.bits,
            "type": "float" if self.format == "float-quantized" else "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.block is None else "group",
            "group_size": self.block,
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        return {
            "quant_method": self.name,
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ignored,
        }

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """See `PackedFormat.shape`."""
        if "weight_packed" not in shapes:
            return shapes["weight"]
        outputs, words = shapes["weight_packed"]
        # What fills up the last word is told by `weight_shape` alone; see `PackedFiles.shape`.
        return outputs, words * 32 // self.bits

    def grid(self, tensors: Tensors) -> PackedGrid:
        """See `PackedFormat.grid`; a scale of the whole weight stands for all outputs."""
        scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
        scale = scale.reshape(-1, scale.shape[-1] if scale.ndim else 1).T
        middle = 2 ** (self.bits - 1)
        if zero is None:
            zero = np.full(scale.shape, middle)
        elif zero.dtype == np.int32:  # packed as the weight is
            zero = unpack(zero, self.bits, 0, scale.shape[1]).T
        else:
            zero = np.asarray(zero, np.int64).reshape(-1, len(scale)).T + middle
        groups = tensors.get("weight_g_idx")
        if groups is not None:
            groups = None if np.min(groups) < 0 else np.asarray(groups, np.int64)
        return PackedGrid(zero, scale, groups)

    def integers(self, tensors: Tensors) -> PackedWeight | None:
        """See `PackedFormat.integers`."""
        if "weight_packed" in tensors:
            n = unpack(tensors["weight_packed"], self.bits, 1, int(tensors["weight_shape"][1])).T
        elif tensors["weight"].dtype == np.int8:
            n = (tensors["weight"].astype(np.int16) + 2 ** (self.bits - 1)).astype(np.uint8).T
        else:
            return None
        zero, scale, groups = self.grid(tensors)
        wide = len(scale), n.shape[1]
        zero, scale = np.broadcast_to(zero, wide), np.broadcast_to(scale, wide)
        return PackedWeight(self.bits, n, zero, scale, groups)

    def read(self, tensors: Tensors) -> np.ndarray:
        """See `PackedFormat.read`."""
        found = self.integers(tensors)
        if found is not None:
            return found.weight()
        values = np.asarray(tensors["weight"]).astype(np.float32)
        scale = self.grid(tensors).scale.T.astype(np.float32)
        groups = np.arange(values.shape[1]) // -(-values.shape[1] // scale.shape[1])
        return values * scale[:, groups]

    def write(self, weight: PackedWeight) -> Tensors:
        """See `PackedFormat.write`; packed, whatever the bits."""
        n, scale = weight.n.T, weight.scale.T.astype(np.float16)
        found = {
            "weight_packed": pack(n, self.bits, 1),
            "weight_scale": np.ascontiguousarray(scale),
            "weight_shape": np.array(n.shape, np.int64),
        }
        if not self.symmetric:
            found["weight_zero_point"] = pack(weight.zero.T, self.bits, 0)
        return found


FORMATS = {kind.name: kind for kind in (GPTQFormat, AWQFormat, CompressedFormat)}


def format_of(settings: Any) -> PackedFormat | None:
    """The format that a config.json names; None: weights are floats.

    Raises:
      UserError: one that is not known.
    """
    given = settings.get(KEY) if isinstance(settings, Mapping) else None
    if given is None:
        return None
    kind = FORMATS.get(given.get("quant_method")) if isinstance(given, Mapping) else None
    if kind is None:
        raise UserError(
            f"{KEY}={json.dumps(given)} is not supported: quant_method must be one of"
            f" {', '.join(FORMATS)}"
        )
    try:
        return kind.of(given)
    except UserError as error:
        raise UserError(f"{KEY}={json.dumps(given)} is not supported: {error}") from None


def bits_of(settings: Mapping[str, Any], allowed: tuple[int, ...]) -> int:
    """The bits of a weight. UserError for others than allowed."""
    bits = settings.get("bits")
    if bits not in allowed:
        shown = ", ".join(map(str, allowed))
        raise UserError(f"bits={json.dumps(bits)} is not supported, only {shown}")
    return bits


def group_of(size: Any) -> int | None:
    """Inputs that share a scale, of a group_size; None: all, which is -1 there."""
    if size in (-1, None):
        return None
    if type(size) is not int or size < 1:
        raise UserError(f"group_size={json.dumps(size)}: should be a number from 1 on, or -1")
    return size
