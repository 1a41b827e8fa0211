"""Layers that take turns: dense ones, and mixtures of experts as every second one.

So are GLaM (Du et al. 2022, arXiv:2112.06905), GShard and most Switch Transformers. Two
neighbouring layers are one entry of the stack of blocks.
"""

from __future__ import annotations

from flax import nnx

from lmjax.config import UserError
from lmjax.models.feed_forward import FeedForwardConfig


class BlockPair(nnx.Module):
    """Two neighbouring blocks, which differ in their feed-forward layers."""

    def __init__(self, first: nnx.Module, second: nnx.Module):
        self.first, self.second = first, second

    def at(self, member: int) -> nnx.Module:
        """The first block at 0, the second one at 1."""
        return (self.first, self.second)[member]


def check_alternate(other: FeedForwardConfig, layers: int, name: str = "num_layers") -> None:
    """Raises UserError for an alternate feed-forward layer that a model cannot have."""
    if other.reads_rows:
        raise UserError(
            "alternate_feed_forward: it is the dense layer between mixtures of experts, which"
            " model.feed_forward is"
        )
    if layers % 2:
        raise UserError(
            f"{name}={layers} with alternate_feed_forward: two kinds of layers take turns,"
            " so their number must be even"
        )
