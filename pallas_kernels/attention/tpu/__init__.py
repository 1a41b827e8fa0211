"""Flash attention on TPUs in Pallas Mosaic."""

from pallas_kernels.attention.tpu.call import IMPLEMENTATION

__all__ = ["IMPLEMENTATION"]
