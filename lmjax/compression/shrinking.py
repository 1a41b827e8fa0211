"""A smaller ordinary model: layers, heads and feed-forward columns that matter least are left out.

What matters is measured on texts, without gradients. A layer by how much it turns the residual
stream: 1 - the mean cosine between what it reads and what it gives (ShortGPT, Men et al. 2024,
arXiv:2403.03853). A head, and a column of a feed-forward layer, by the mean squared length of what
it adds: E |x_h W_h|^2 = tr(W_h^T E[x_h x_h^T] W_h), x_h its part of the input of the output
projection, or of `down`, and W_h the rows of that weight.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding
from jaxtyping import Float, Int

from lmjax.compression.calibration import Path, batches_of, stacks_of, walk
from lmjax.compression.input_moments import InputMoments
from lmjax.compression.methods import Tell, matrix_of, on_host
from lmjax.config import UserError, replace
from lmjax.models import EncoderDecoderConfig, TransformerConfig, abstract
from lmjax.models.attention import AttentionConfig
from lmjax.models.feed_forward import FeedForwardConfig, GatedFeedForwardConfig
from lmjax.models.positions import AttentionPositions
from lmjax.models.rotary import BlockRotary, Rotary
from lmjax.models.stretches import pattern
from lmjax.parallel import training_layout

# Axis of heads or columns in the parameters of a layer, without that of the stack.
HEADS = {("query", "weight"): 1, ("query", "bias"): 0, ("output", "weight"): 0}
KV_HEADS = {
    (name, kind): n for name in ("key", "value") for kind, n in (("weight", 1), ("bias", 0))
}
COLUMNS = {(name, kind): n for name in ("up", "gate") for kind, n in (("weight", 1), ("bias", 0))}
COLUMNS |= {("down", "weight"): 0}


@dataclasses.dataclass(frozen=True)
class Shrinker:
    """Makes a model smaller.

    Attributes:
      layers: that stay; None: all.
      heads: of queries that stay in each layer; None: all. Those that share keys go together.
      width: columns of each feed-forward layer that stay; None: all.
      rows: token ids of texts, without padding.
      tell: is told what happens.
    """

    layers: int | None
    heads: int | None
    width: int | None
    rows: Int[np.ndarray, "rows length"] | None
    tell: Tell = print

    def __call__(self, config: TransformerConfig, params: dict) -> tuple[dict, TransformerConfig]:
        """The parameters and the config of the small model.

        Layers are left out first; heads and columns are then measured in what is left.

        Args:
          config: of the model, whose weights are float32, without adapters.
          params: its parameters, blocks stacked; they are not given up.

        Raises:
          UserError: there are no texts, or the model has no such number of parts, or cannot be cut.
        """
        self.check(config)
        if self.rows is None:
            raise UserError(
                "layers, heads and width are measured on texts: give calibration=FILE, a text file"
            )
        if self.layers is not None:
            params, config = self.with_fewer_layers(config, params)
        if self.heads is not None or self.width is not None:
            params, config = self.with_narrow_layers(config, params)
        return params, config

    def check(self, config: TransformerConfig) -> None:
        """Raises UserError for a model that cannot be cut so."""
        if isinstance(config, EncoderDecoderConfig):
            raise UserError(
                "layers, heads, width: a model with an encoder and a decoder is not cut"
            )
        if self.layers is not None:
            _check_number("layers", self.layers, config.num_layers, config.group)
        attention, layer = config.attention, config.feed_forward
        if self.heads is not None:
            pairs = config.alternate_feed_forward is not None
            if pairs or type(attention) is not AttentionConfig or not _alike(attention.positions):
                kind = "layers of two kinds" if pairs else type(attention.positions).__name__
                raise UserError(
                    f"heads={self.heads}: the model has {kind}, of which no heads can be left out"
                )
            _check_number("heads", self.heads, attention.num_heads, self.together(attention))
        if self.width is not None:
            plain = type(layer) in (FeedForwardConfig, GatedFeedForwardConfig)
            if not plain or config.alternate_feed_forward is not None:
                raise UserError(f"width={self.width}: the model has experts, which are not cut")
            _check_number("width", self.width, layer.size, 1)

    @staticmethod
    def together(attention: AttentionConfig) -> int:
        """Query heads that go together: a group of keys of its own, or one where all share them."""
        return 1 if attention.kv_heads == 1 else attention.num_heads // attention.kv_heads

    def with_fewer_layers(
        self, config: TransformerConfig, params: dict
    ) -> tuple[dict, TransformerConfig]:
        """The model without the layers that turn the residual stream least."""
        influence, group = layer_influence(config, params, self.rows), config.group
        stay = np.sort(np.argsort(-influence, kind="stable")[: self.layers // group])
        layers = [entry * group + member for entry in stay for member in range(group)]
        gone = sorted(set(range(config.num_layers)) - set(layers))
        self.tell(f"layers {', '.join(str(n + 1) for n in gone) or 'none'} are left out")
        windows = pattern([config.windows[n] for n in layers], group)
        small = replace(
            config,
            num_layers=self.layers,
            attention=replace(config.attention, windows=windows),
        )
        blocks = jax.tree.map(lambda a: on_host(a)[stay], params["blocks"])
        return laid_out(params | {"blocks": blocks}, small), small

    def with_narrow_layers(
        self, config: TransformerConfig, params: dict
    ) -> tuple[dict, TransformerConfig]:
        """The model with fewer heads, or columns, in each layer."""
        (stack,), done = stacks_of(config), []
        stacked = stack.read(params)
        attention, wide = config.attention, config.feed_forward
        together = self.together(attention)

        def change(entry: int, moments: dict[Path, InputMoments]) -> None:
            block = jax.tree.map(lambda a: on_host(a[entry]), stacked)
            flat = traverse_util.flatten_dict(block)
            if self.heads is not None:
                path = ("attention", "output")
                each = added(matrix_of(block, path), moments[path].second, attention.head_dim)
                groups = each.reshape(-1, together).sum(axis=1)
                stay = _largest(groups, self.heads // together)
                heads = (stay[:, None] * together + np.arange(together)).reshape(-1)
                _cut(flat, "attention", HEADS, heads)
                if attention.kv_heads > 1:
                    _cut(flat, "attention", KV_HEADS, stay)
            if self.width is not None:
                path = ("feed_forward", "down")
                each = added(matrix_of(block, path), moments[path].second, 1)
                _cut(flat, "feed_forward", COLUMNS, _largest(each, self.width))
            done.append(traverse_util.unflatten_dict(flat))

        walk(config, params, stack, list(batches_of(config, self.rows)), change)
        small = config
        if self.heads is not None:
            own = attention.num_kv_heads
            if own is not None and own > 1:
                own = self.heads // together
            fewer = replace(attention, num_heads=self.heads, num_kv_heads=own)
            small = replace(small, attention=fewer)
            self.tell(f"{self.heads} of {attention.num_heads} heads of each layer stay")
        if self.width is not None:
            small = replace(small, feed_forward=replace(wide, size=self.width))
            self.tell(f"{self.width} of {wide.size} columns of each feed-forward layer stay")
        blocks = jax.tree.map(lambda *parts: np.stack(parts), *done)
        return laid_out(params | {"blocks": blocks}, small), small


def layer_influence(
    config: TransformerConfig, params: dict, rows: Int[np.ndarray, "rows length"]
) -> Float[np.ndarray, "entries"]:
    """1 - mean cosine of the residual stream before and after each entry of the stack."""
    (stack,) = stacks_of(config)
    entries = config.num_layers // config.group
    total, count = np.zeros(entries), np.zeros(entries)

    @jax.jit
    def cosines(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        lengths = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
        return jnp.sum(jnp.sum(x * y, axis=-1) / jnp.maximum(lengths, 1e-30))

    def see(entry: int, x: jax.Array, y: jax.Array) -> None:
        total[entry] += float(cosines(x, y))
        count[entry] += x.shape[0] * x.shape[1]

    walk(config, params, stack, list(batches_of(config, rows)), lambda *_: None, see=see)
    return 1 - total / count


def added(
    weight: Float[np.ndarray, "in out"], second: Float[np.ndarray, "in in"], size: int
) -> Float[np.ndarray, "parts"]:
    """Mean squared length of what each `size` neighbouring inputs add to the output of a layer.

    Args:
      weight: of the layer.
      second: mean of x x^T over its inputs.
      size: inputs of a part.
    """
    parts = weight.reshape(-1, size, weight.shape[1])
    blocks = second.reshape(len(parts), size, len(parts), size)
    own = np.einsum("pipj->pij", blocks)
    return np.einsum("pio,pij,pjo->p", parts, own, parts)


def laid_out(params: dict, config: TransformerConfig) -> dict:
    """Parameters of a model, some of them on the host, where its layout wants them."""
    mesh, (_, shapes) = jax.sharding.get_mesh(), abstract(config, training_layout())
    return jax.tree.map(
        lambda shape, a: jax.device_put(a, NamedSharding(mesh, shape.sharding.spec)), shapes, params
    )


def _largest(scores: Float[np.ndarray, "parts"], count: int) -> Int[np.ndarray, "count"]:
    """Numbers of the parts with the largest scores, in their order."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _cut(flat: dict[Path, Any], owner: str, axes: dict, stay: Int[np.ndarray, "count"]) -> None:
    """Leaves parts of parameters out along the axes named."""
    for path, axis in axes.items():
        if (owner, *path) in flat:
            flat[(owner, *path)] = np.take(flat[(owner, *path)], stay, axis=axis)


def _alike(positions: AttentionPositions | None) -> bool:
    """Returns whether positions are the same for all heads."""
    return positions is None or isinstance(positions, (Rotary, BlockRotary))


def _check_number(name: str, number: int, known: int, step: int) -> None:
    """Raises UserError for a number of parts that cannot stay."""
    if not 0 < number <= known:
        raise UserError(f"{name}={number}: the model has {known}, of which 1 to {known} can stay")
    if number % step:
        raise UserError(f"{name}={number}: they go by {step}, which belong together")
