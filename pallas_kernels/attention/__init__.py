"""Scaled dot-product attention: one function, one mask, several implementations."""

from pallas_kernels.attention.api import attention, implementations
from pallas_kernels.attention.mask import Mask, Tile

__all__ = ["Mask", "Tile", "attention", "implementations"]
