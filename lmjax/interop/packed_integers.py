"""Integers of few bits in words of 32, as public formats of quantised models have them.

A weight is (n - zero) scale, with n and zero from 0 to 2^bits - 1, and a zero and a scale for each
group of inputs and each output. The formats differ in what is packed along which axis:

    GPTQ                qweight [in / k, out], qzeros [groups, out / k] less one, scales
                        [groups, out], g_idx [in]: the group of each input
    AWQ                 qweight [in, out / k], qzeros [groups, out / k], scales [groups, out]; the k
                        numbers of a word in the order 0, 2, 4, 6, 1, 3, 5, 7
    compressed-tensors  weight_packed [out, in / k], weight_scale [out, groups],
                        weight_zero_point [out / k, groups]; or `weight` in int8 or float8
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class PackedGrid(NamedTuple):
    """Zeros and scales of the groups of a weight, and the group of each input; None: neighbours."""

    zero: Integer[np.ndarray, "groups out"]
    scale: Float[np.ndarray, "groups out"]
    group: Integer[np.ndarray, "in"] | None = None


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight of integers on the host.

    Attributes:
      bits: of each.
      n: the integers, from 0 on.
      zero: of each group.
      scale: of each group.
      group: that each input belongs to; None: neighbours, as many in each.
    """

    bits: int
    n: Integer[np.ndarray, "in out"]
    zero: Integer[np.ndarray, "groups out"]
    scale: Float[np.ndarray, "groups out"]
    group: Integer[np.ndarray, "in"] | None = None

    @property
    def grid(self) -> PackedGrid:
        """Its zeros and scales."""
        return PackedGrid(self.zero, self.scale, self.group)

    @property
    def groups(self) -> Integer[np.ndarray, "in"]:
        """The group of each input."""
        if self.group is not None:
            return self.group
        return np.arange(len(self.n)) // -(-len(self.n) // len(self.scale))

    def weight(self) -> Float[np.ndarray, "out in"]:
        """The weight in float32, as a dense layer of PyTorch's has it."""
        groups = self.groups
        n = self.n.astype(np.float32) - self.zero[groups].astype(np.float32)
        return np.ascontiguousarray((n * self.scale.astype(np.float32)[groups]).T)


def pack(
    n: Integer[np.ndarray, "..."], bits: int, axis: int, order: tuple[int, ...] | None = None
) -> Integer[np.ndarray, "..."]:
    """Numbers along an axis in words, the first in the lowest bits; zeros fill up the last word.

    Args:
      n: from 0 to 2^bits - 1.
      bits: of each.
      axis: that neighbours in a word lie along.
      order: which of a word's numbers stands at each place; None: in their own order.
    """
    each = 32 // bits
    lines = np.moveaxis(n, axis, -1)
    lines = np.pad(lines, [(0, 0)] * (n.ndim - 1) + [(0, -lines.shape[-1] % each)])
    words = lines.reshape(*lines.shape[:-1], -1, each).astype(np.uint32)
    packed = np.zeros(words.shape[:-1], np.uint32)
    for at, number in enumerate(order or range(each)):
        packed |= words[..., number] << np.uint32(bits * at)
    return np.ascontiguousarray(np.moveaxis(packed.view(np.int32), -1, axis))


def unpack(
    packed: Integer[np.ndarray, "..."],
    bits: int,
    axis: int,
    size: int,
    order: tuple[int, ...] | None = None,
) -> Integer[np.ndarray, "..."]:
    """The numbers of `pack`, `size` of them along the axis."""
    each, words = 32 // bits, np.moveaxis(np.ascontiguousarray(packed), axis, -1)
    words = np.ascontiguousarray(words).view(np.uint32)
    numbers = np.zeros((*words.shape, each), np.uint8)
    for at, number in enumerate(order or range(each)):
        numbers[..., number] = (words >> np.uint32(bits * at)) & np.uint32(2**bits - 1)
    lines = numbers.reshape(*words.shape[:-1], -1)[..., :size]
    return np.moveaxis(lines, -1, axis)
