"""Scalar memory: 32-bit words by address, and how arrays are laid out in it."""

from __future__ import annotations

from typing import Any

import numpy as np

ALLOCATION = 1 << 18  # words between the addresses of allocations
LANES = 128
OFFSET, SHIFT = 16, 4  # bits of the addresses of operands


def operand_pointer(index: int) -> int:
    """An address of an operand from which its index can be told: odd above 16 bits of offset."""
    return (2 * index + 1) << OFFSET


def operand_index(pointer: Any) -> int | None:
    """The index of the operand that an address is in."""
    if not isinstance(pointer, int) or pointer < 1 << OFFSET:
        return None
    return (pointer >> _bits(pointer)) // 2


def operand_offset(pointer: int) -> int:
    """Units from the start of its operand to an address."""
    return pointer & ((1 << _bits(pointer)) - 1)


def _bits(pointer: int) -> int:
    """Bits below the operand's number; code of some chips shifts addresses."""
    return OFFSET + (SHIFT if (pointer >> OFFSET) % (1 << SHIFT) == 0 else 0)


class ScalarMemory:
    """Words by address; a word that nobody has written is unknown."""

    def __init__(self, unknown: Any) -> None:
        self._words: dict[int, Any] = {}
        self._bases: dict[str, int] = {}
        self._unknown = unknown

    def base(self, allocation: str) -> int:
        """Address of an allocation."""
        return self._bases.setdefault(allocation, (len(self._bases) + 1) * ALLOCATION)

    def load(self, address: Any) -> Any:
        """The word at an address."""
        return self._words.get(address, self._unknown) if isinstance(address, int) else address

    def store(self, address: Any, value: Any) -> None:
        """Keeps a word."""
        if isinstance(address, int):
            self._words[address] = value

    def fill(self, address: Any, values: np.ndarray) -> None:
        """Keeps words that follow each other."""
        if isinstance(address, int):
            self._words.update(zip(range(address, address + len(values)), values.tolist()))


def words(array: np.ndarray) -> np.ndarray:
    """An array as the compiler lays it out in scalar memory: int32 words, one after another.

    Rows are padded to 128 columns. Of types of fewer than 32 bits that many rows as fit share the
    words of one row, the first in the lowest bits; of an array of one axis, pieces of 128 do.
    """
    array = np.asarray(array)
    if array.dtype == bool:
        array = array.astype(np.int32)
    size = array.dtype.itemsize
    packed = max(4 // size, 1)
    array = np.atleast_1d(array)
    if array.ndim == 1:
        padded = np.pad(array, (0, -len(array) % (LANES * packed)))
        pieces = padded.reshape(-1, packed, LANES)
    else:
        rows, columns = array.shape[-2:]
        pad = [(0, 0)] * (array.ndim - 2) + [(0, -rows % packed), (0, -columns % LANES)]
        padded = np.pad(array, pad)
        *_, rows, columns = padded.shape
        tiles = padded.reshape(-1, rows // packed, packed, columns // LANES, LANES)
        pieces = tiles.swapaxes(2, 3).reshape(-1, packed, LANES)
    unsigned = pieces.view(f"uint{8 * size}").astype(np.uint64)
    shifts = (8 * size * np.arange(packed, dtype=np.uint64))[:, None]
    joined = (unsigned << shifts).sum(axis=1, dtype=np.uint64) if packed > 1 else unsigned
    return joined.astype(np.uint32).view(np.int32).reshape(-1)
