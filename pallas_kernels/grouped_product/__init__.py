"""Products of rows with the matrix of their group, for mixtures of experts."""

from pallas_kernels.grouped_product.api import grouped_product, implementations

__all__ = ["grouped_product", "implementations"]
