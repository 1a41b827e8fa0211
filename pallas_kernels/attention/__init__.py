"""Scaled dot-product attention: one function, one mask, a table of implementations."""

# They register themselves: the last one that can serve is preferred.
import pallas_kernels.attention.chunked
import pallas_kernels.attention.reference

import pallas_kernels.attention.cudnn  # isort: skip
from pallas_kernels.attention.api import attention
from pallas_kernels.attention.mask import Mask, Tile
from pallas_kernels.attention.table import implementations

__all__ = ["Mask", "Tile", "attention", "implementations"]
