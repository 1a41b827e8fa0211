"""Scales that move from a layer's inputs into what makes them, and change no output.

y = x W = (x / s) (s W) for any s > 0. The division is folded into what gives x: the scale of a
norm, or the outputs of a dense layer. A norm whose output goes anywhere else, as into the residual
stream (post-norm), can have no such scale.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from flax import traverse_util
from jaxtyping import Float

from lmjax.models import EncoderDecoderConfig, TransformerConfig
from lmjax.models.feed_forward import FeedForwardConfig, GatedFeedForwardConfig
from lmjax.models.norms import RMSNormConfig
from lmjax.models.residual import Parallel, PreNorm, SandwichNorm

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Fold:
    """A vector that some layers read, and what makes it.

    Attributes:
      source: path in a block of the norm, or of the dense layer, that gives it.
      readers: paths of the dense layers that read it, all that do.
      norm: whether `source` is a norm.
    """

    source: Path
    readers: tuple[Path, ...]
    norm: bool


def folds_of(config: TransformerConfig, cross: bool = False) -> tuple[Fold, ...]:
    """The folds of a block.

    Args:
      config: of the model.
      cross: of the decoder's blocks of an encoder and a decoder.
    """
    attention = tuple(("attention", name) for name in ("query", "key", "value"))
    folds, layer, heads = [], config.feed_forward, config.attention
    dense = type(layer) in (FeedForwardConfig, GatedFeedForwardConfig)
    gated = type(layer) is GatedFeedForwardConfig
    fed = tuple(("feed_forward", name) for name in ("gate", "up")[not gated :]) if dense else ()
    arrangement = config.arrangement
    if type(arrangement) is Parallel and arrangement.shared_norm:
        if dense:
            folds.append(Fold(("norm",), attention + fed, norm=True))
    elif type(arrangement) in (PreNorm, SandwichNorm, Parallel):
        folds.append(Fold(("attention_norm",), attention, norm=True))
        if dense:
            folds.append(Fold(("feed_forward_norm",), fed, norm=True))
    if cross:
        folds.append(Fold(("cross_attention_norm",), (("cross_attention", "query"),), norm=True))
    blocks = ("attention", "cross_attention") if cross else ("attention",)
    if heads.kv_heads == heads.num_heads:
        folds += [Fold((name, "value"), ((name, "output"),), norm=False) for name in blocks]
    if gated:
        folds.append(Fold(("feed_forward", "up"), (("feed_forward", "down"),), norm=False))
    return tuple(folds)


def fold(
    block: dict[str, Any], one: Fold, scale: Float[np.ndarray, "in"], config: TransformerConfig
) -> dict[str, Any]:
    """A block's parameters with the readers' inputs multiplied by a scale, the source divided.

    Args:
      block: of one layer, not stacked.
      one: which inputs.
      scale: positive, for each input.
      config: of the model.
    """
    flat = traverse_util.flatten_dict(block)
    for reader in one.readers:
        weight = flat[(*reader, "weight")]
        axes = weight.ndim - 1 if len(reader) and reader[-1] == "output" else 1
        flat[(*reader, "weight")] = weight * scale.reshape(
            *weight.shape[:axes], *(1,) * (weight.ndim - axes)
        )
    if one.norm:
        name = (*one.source, "scale")
        offset = isinstance(config.norm, RMSNormConfig) and config.norm.unit_offset
        flat[name] = (flat[name] + offset) / scale - offset
    else:
        weight = flat[(*one.source, "weight")]
        flat[(*one.source, "weight")] = weight / scale.reshape(weight.shape[1:])
    if (bias := flat.get((*one.source, "bias"))) is not None:
        flat[(*one.source, "bias")] = bias / scale.reshape(bias.shape)
    return traverse_util.unflatten_dict(flat)


def is_cross(config: TransformerConfig, prefix: Path) -> bool:
    """Returns whether the blocks of this stack look at an encoder."""
    return isinstance(config, EncoderDecoderConfig) and not prefix
