"""Scaled dot-product attention: one function, one mask, a table of implementations."""

from pallas_kernels.attention import chunked, cudnn, reference, table
from pallas_kernels.attention.api import attention, merge
from pallas_kernels.attention.mask import Mask, Tile
from pallas_kernels.attention.table import implementations

for _module in (reference, chunked, cudnn):  # the last one that can serve is preferred
    table.register(_module.IMPLEMENTATION)

__all__ = ["Mask", "Tile", "attention", "implementations", "merge"]
