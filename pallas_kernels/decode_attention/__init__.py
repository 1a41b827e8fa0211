"""Attention of the newest tokens over a key-value cache: rows, rings, pages, int8."""

from pallas_kernels.decode_attention import chunked, cpu, reference, tpu
from pallas_kernels.decode_attention.api import (
    decode_attention,
    implementations,
    preferred,
    register,
)
from pallas_kernels.decode_attention.cache import CacheRows, KeyValueCache, PagedCache, quantize

for _module in (reference, chunked, cpu, tpu):  # the last one that can serve is preferred
    register(_module.IMPLEMENTATION)

__all__ = [
    "CacheRows",
    "KeyValueCache",
    "PagedCache",
    "decode_attention",
    "implementations",
    "preferred",
    "quantize",
    "register",
]
