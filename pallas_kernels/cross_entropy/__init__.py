"""Cross-entropy of a linear head, without ever holding all the logits."""

from pallas_kernels.cross_entropy.api import cross_entropy, implementations

__all__ = ["cross_entropy", "implementations"]
