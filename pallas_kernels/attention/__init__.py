"""Scaled dot-product attention: one function, one mask, a table of implementations."""

from pallas_kernels.attention import chunked, cudnn, hopper, reference, tpu
from pallas_kernels.attention.api import attention, merge
from pallas_kernels.attention.bias import Bias, BucketBias, DistanceBias, LinearBias
from pallas_kernels.attention.dropout import Dropout
from pallas_kernels.attention.mask import Branches, Mask, Tile
from pallas_kernels.attention.table import CannotServe, Implementation, implementations, register
from pallas_kernels.attention.tiles import tiles, visited

# The last one that can serve is preferred.
for _module in (reference, chunked, cudnn, hopper, tpu):
    register(_module.IMPLEMENTATION)

__all__ = [
    "Bias",
    "Branches",
    "BucketBias",
    "CannotServe",
    "DistanceBias",
    "Dropout",
    "Implementation",
    "LinearBias",
    "Mask",
    "Tile",
    "attention",
    "implementations",
    "merge",
    "register",
    "tiles",
    "visited",
]
