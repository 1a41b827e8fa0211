"""A smaller ordinary model: layers, heads, columns and experts that matter least are left out.

What matters is measured on texts, without gradients. A layer by how much it turns the residual
stream: 1 - the mean cosine between what it reads and what it gives (ShortGPT, Men et al. 2024,
arXiv:2403.03853). A head, and a column of a feed-forward layer, by the mean squared length of what
it adds: E |x_h W_h|^2 = tr(W_h^T E[x_h x_h^T] W_h), x_h its part of the input of the output
projection, or of `down`, and W_h the rows of that weight. An expert by the number of tokens that
are routed to it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding
from jaxtyping import Float, Int

from lmjax.compression.calibration import BlockStack, Path, batches_of, stacks_of, walk
from lmjax.compression.importance import added, layer_influence
from lmjax.compression.input_moments import InputMoments
from lmjax.compression.methods import Tell, inner, matrix_of, members_of, on_host, with_part
from lmjax.config import UserError, replace
from lmjax.models import (
    EncoderDecoderConfig,
    ExpertsConfig,
    TopKRouter,
    TransformerConfig,
    abstract,
)
from lmjax.models.attention import AttentionConfig
from lmjax.models.feed_forward import FeedForwardConfig, GatedFeedForwardConfig
from lmjax.models.positions import ALiBi, AttentionPositions, RelativeBuckets
from lmjax.models.rotary import BlockRotary, Rotary
from lmjax.models.stretches import pattern
from lmjax.parallel import training_layout

KINDS = ("weight", "bias")
# Axis of heads, columns or experts in the parameters of a layer, without that of the stack.
HEADS = {("query", "weight"): 1, ("query", "bias"): 0, ("output", "weight"): 0}
KV_HEADS = {(name, kind): n for name in ("key", "value") for kind, n in zip(KINDS, (1, 0))}
COLUMNS = {(name, kind): n for name in ("up", "gate") for kind, n in zip(KINDS, (1, 0))}
COLUMNS |= {("down", "weight"): 0}
EXPERTS = {("experts", name, kind): 0 for name in ("up", "gate", "down") for kind in KINDS}
EXPERTS |= {("router", "weight"): 1}
TABLE = ("attention_positions", "table")  # of `RelativeBuckets` [buckets, heads]


@dataclasses.dataclass(frozen=True)
class Shrinker:
    """Makes a model smaller.

    Attributes:
      layers: that stay, of the decoder where there is an encoder; None: all.
      heads: of queries that stay in each layer; None: all. Those that share keys go together.
      width: columns of each feed-forward layer, or of each expert, that stay; None: all.
      rows: token ids of texts, without padding.
      experts: that stay in each layer that has some; None: all.
      encoder_layers: layers of an encoder that stay; None: all.
      tell: is told what happens.
    """

    layers: int | None
    heads: int | None
    width: int | None
    rows: Int[np.ndarray, "rows length"] | None
    experts: int | None = None
    encoder_layers: int | None = None
    tell: Tell = print

    def __call__(self, config: TransformerConfig, params: dict) -> tuple[dict, TransformerConfig]:
        """The parameters and the config of the small model.

        Layers are left out first; all other parts are then measured in what is left.

        Args:
          config: of the model, whose weights are float32, without adapters.
          params: its parameters, blocks stacked; they are not given up.

        Raises:
          UserError: there are no texts, or the model has no such number of parts, or cannot be cut.
        """
        self.check(config)
        if self.rows is None:
            raise UserError(
                "layers, heads, width and experts are measured on texts: give calibration=FILE, a"
                " text file"
            )
        for stack in stacks_of(config):
            count = self.encoder_layers if stack.prefix else self.layers
            if count is not None:
                params, config = self.with_fewer_layers(config, params, stack, count)
        if any(number is not None for number in (self.heads, self.width, self.experts)):
            params, config = self.with_narrow_layers(config, params)
        return params, config

    def check(self, config: TransformerConfig) -> None:
        """Raises UserError for a model that cannot be cut so."""
        attention, layer = config.attention, config.feed_forward
        if self.layers is not None:
            _check_number("layers", self.layers, config.num_layers, config.group)
        if self.encoder_layers is not None:
            if not isinstance(config, EncoderDecoderConfig):
                raise UserError(f"encoder_layers={self.encoder_layers}: the model has no encoder")
            known = config.encoder_layers
            _check_number("encoder_layers", self.encoder_layers, known, config.group)
        if self.heads is not None:
            if type(attention) is not AttentionConfig or not _can_be_cut(config):
                raise UserError(
                    f"heads={self.heads}: the model has {type(attention.positions).__name__}, of"
                    " which no heads can be left out"
                )
            _check_number("heads", self.heads, attention.num_heads, self.together(attention))
        routed = type(layer) is ExpertsConfig and isinstance(layer.router, TopKRouter)
        if self.experts is not None:
            if not routed:
                raise UserError(
                    f"experts={self.experts}: the model has no experts that tokens choose"
                )
            _check_number("experts", self.experts, layer.experts, 1)
            layer.router.check(self.experts)
        if self.width is not None:
            if config.alternate_feed_forward is not None:
                raise UserError(f"width={self.width}: the model has layers of two kinds and widths")
            if not routed and type(layer) not in (FeedForwardConfig, GatedFeedForwardConfig):
                kind = type(getattr(layer, "router", layer)).__name__
                raise UserError(f"width={self.width}: with {kind} no columns can be left out")
            _check_number("width", self.width, layer.size, 1)

    @staticmethod
    def together(attention: AttentionConfig) -> int:
        """Query heads that go together: a group of keys of its own, or one where all share them."""
        return 1 if attention.kv_heads == 1 else attention.num_heads // attention.kv_heads

    def with_fewer_layers(
        self, config: TransformerConfig, params: dict, stack: BlockStack, count: int
    ) -> tuple[dict, TransformerConfig]:
        """The model without the layers of a stack that turn the residual stream least."""
        influence, group = layer_influence(config, params, self.rows, stack), config.group
        stay = np.sort(np.argsort(-influence, kind="stable")[: count // group])
        layers = [entry * group + member for entry in stay for member in range(group)]
        gone = sorted(set(range(len(influence) * group)) - set(layers))
        of = " of the encoder" if stack.prefix else ""
        self.tell(f"layers {', '.join(str(n + 1) for n in gone) or 'none'}{of} are left out")
        if stack.prefix:
            small = replace(config, encoder_layers=count)
        else:
            windows = pattern([config.windows[n] for n in layers], group)
            attention = replace(config.attention, windows=windows)
            small = replace(config, num_layers=count, attention=attention)
        blocks = jax.tree.map(lambda a: on_host(a)[stay], stack.read(params))
        return laid_out(with_part(params, (*stack.prefix, "blocks"), blocks), small), small

    def with_narrow_layers(
        self, config: TransformerConfig, params: dict
    ) -> tuple[dict, TransformerConfig]:
        """The model with fewer heads, columns or experts in each layer."""
        small, heads = params, None
        for stack in stacks_of(config):
            stay = self.common_groups(config, params, stack)
            blocks = self.narrow_blocks(config, params, stack, stay)
            small = with_part(small, (*stack.prefix, "blocks"), blocks)
            if stay is not None:
                heads = self.heads_of(config.attention, stay)
            if stay is not None and isinstance(config.attention.positions, RelativeBuckets):
                table = (*stack.prefix, *TABLE)
                small = with_part(small, table, on_host(inner(small, table))[:, heads])
        config = self.narrowed(config, heads)
        return laid_out(small, config), config

    def common_groups(
        self, config: TransformerConfig, params: dict, stack: BlockStack
    ) -> Int[np.ndarray, "groups"] | None:
        """Groups of heads that stay in every layer of a stack; None: in each layer others may.

        Where positions tell heads apart, all layers keep the same: those with the largest sum of
        their shares of what the heads of each layer add.
        """
        attention = config.attention
        if self.heads is None or _alike(attention.positions):
            return None
        stacked, shares = stack.read(params), []

        def note(entry: int, moments: dict[Path, InputMoments]) -> None:
            flat = traverse_util.flatten_dict(jax.tree.map(lambda a: on_host(a[entry]), stacked))
            for prefix, _ in members_of(config):
                each = self.group_scores(flat, (*prefix, "attention"), attention, moments)
                shares.append(each / max(each.sum(), 1e-30))

        walk(config, params, stack, list(batches_of(config, self.rows)), note)
        return _largest(sum(shares), self.heads // self.together(attention))

    def narrow_blocks(
        self,
        config: TransformerConfig,
        params: dict,
        stack: BlockStack,
        groups: Int[np.ndarray, "groups"] | None,
    ) -> dict:
        """The blocks of a stack, on the host, with fewer parts; `groups` as `common_groups`."""
        stacked, done = stack.read(params), []

        def change(entry: int, moments: dict[Path, InputMoments]) -> None:
            flat = traverse_util.flatten_dict(jax.tree.map(lambda a: on_host(a[entry]), stacked))
            for prefix, member in members_of(config):
                self.narrow(flat, prefix, member, moments, groups)
            done.append(traverse_util.unflatten_dict(flat))

        batches, routed = list(batches_of(config, self.rows)), (self.width, self.experts)
        walk(config, params, stack, batches, change, experts=routed != (None, None))
        return jax.tree.map(lambda *parts: np.stack(parts), *done)

    def narrow(
        self,
        flat: dict[Path, Any],
        prefix: Path,
        config: TransformerConfig,
        moments: dict[Path, InputMoments],
        groups: Int[np.ndarray, "groups"] | None,
    ) -> None:
        """Leaves out parts of a block.

        Args:
          flat: parameters of an entry of the stack, by path; they are changed.
          prefix: of the block's paths.
          config: of the model, for this block.
          moments: of the inputs of the entry's dense layers.
          groups: of `common_groups`.
        """
        if self.heads is not None:
            # Positions are none of a decoder's heads that look at an encoder's states.
            for name, stay in (("attention", groups), ("cross_attention", None)):
                if (*prefix, name, "output", "weight") in flat:
                    self.cut_heads(flat, (*prefix, name), config.attention, moments, stay)
        where = (*prefix, "feed_forward")
        routed = isinstance(config.feed_forward, ExpertsConfig)
        if routed and self.experts is not None:
            load = np.asarray(moments[(*where, "experts", "up")].count)
            stay = _largest(load, self.experts)
            self.tell(f"experts with {load[stay].sum() / load.sum():.1%} of the tokens stay")
            _cut(flat, where, EXPERTS, stay)
        else:
            stay = np.arange(config.feed_forward.experts) if routed else None
        if self.width is None:
            return
        if not routed:
            path = (*where, "down")
            matrix = matrix_of(traverse_util.unflatten_dict(flat), path)
            each = added(matrix, moments[path].second, 1)
            _cut(flat, where, COLUMNS, _largest(each, self.width))
            return
        seconds = moments[(*where, "experts", "down")].second[stay]
        downs = flat[(*where, "experts", "down", "weight")].astype(np.float64)
        each = zip(downs, seconds, strict=True)
        columns = [_largest(added(down, second, 1), self.width) for down, second in each]
        for path, axis in COLUMNS.items():
            if (name := (*where, "experts", *path)) in flat:
                own = zip(flat[name], columns, strict=True)
                flat[name] = np.stack([np.take(a, one, axis=axis) for a, one in own])

    def cut_heads(
        self,
        flat: dict[Path, Any],
        where: Path,
        attention: AttentionConfig,
        moments: dict[Path, InputMoments],
        stay: Int[np.ndarray, "groups"] | None,
    ) -> None:
        """Leaves out heads of one attention layer; see `narrow`. None: those that add least."""
        if stay is None:
            scores = self.group_scores(flat, where, attention, moments)
            stay = _largest(scores, self.heads // self.together(attention))
        _cut(flat, where, HEADS, self.heads_of(attention, stay))
        if attention.kv_heads > 1:
            _cut(flat, where, KV_HEADS, stay)

    def group_scores(
        self,
        flat: dict[Path, Any],
        where: Path,
        attention: AttentionConfig,
        moments: dict[Path, InputMoments],
    ) -> Float[np.ndarray, "groups"]:
        """Mean squared length of what each group of heads adds; see `narrow`."""
        path = (*where, "output")
        matrix = matrix_of(traverse_util.unflatten_dict(flat), path)
        each = added(matrix, moments[path].second, attention.head_dim)
        return each.reshape(-1, self.together(attention)).sum(axis=1)

    def heads_of(
        self, attention: AttentionConfig, groups: Int[np.ndarray, "groups"]
    ) -> Int[np.ndarray, "heads"]:
        """Numbers of the heads in groups that go together."""
        together = self.together(attention)
        return (groups[:, None] * together + np.arange(together)).reshape(-1)

    def narrowed(
        self, config: TransformerConfig, heads: Int[np.ndarray, "heads"] | None
    ) -> TransformerConfig:
        """The config of the model with fewer heads, columns or experts; tells what stays.

        `heads` are those that stay in every layer, where positions tell them apart.
        """
        attention, layer = config.attention, config.feed_forward
        if self.heads is not None:
            own = attention.num_kv_heads
            if own is not None and own > 1:
                own = self.heads // self.together(attention)
            positions = attention.positions
            if heads is not None:
                positions = positions.of_heads(heads.tolist(), attention.num_heads)
            numbers = {"num_heads": self.heads, "num_kv_heads": own}
            fewer = replace(attention, **numbers, positions=positions)
            config = replace(config, attention=fewer)
            self.tell(f"{self.heads} of {attention.num_heads} heads of each layer stay")
        if self.experts is not None:
            fewer = replace(config.feed_forward, experts=self.experts)
            config = replace(config, feed_forward=fewer)
            self.tell(f"{self.experts} of {layer.experts} experts of each layer stay")
        if self.width is not None:
            narrow = replace(config.feed_forward, size=self.width)
            config = replace(config, feed_forward=narrow)
            self.tell(f"{self.width} of {layer.size} columns of each feed-forward layer stay")
        return config


def laid_out(params: dict, config: TransformerConfig) -> dict:
    """Parameters of a model, some of them on the host, where its layout wants them."""
    mesh, (_, shapes) = jax.sharding.get_mesh(), abstract(config, training_layout())
    return jax.tree.map(
        lambda shape, a: jax.device_put(a, NamedSharding(mesh, shape.sharding.spec)), shapes, params
    )


def _largest(scores: Float[np.ndarray, "parts"], count: int) -> Int[np.ndarray, "count"]:
    """Numbers of the parts with the largest scores, in their order."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _cut(flat: dict[Path, Any], owner: Path, axes: dict, stay: Int[np.ndarray, "count"]) -> None:
    """Leaves parts of parameters out along the axes named."""
    for path, axis in axes.items():
        if (*owner, *path) in flat:
            flat[(*owner, *path)] = np.take(flat[(*owner, *path)], stay, axis=axis)


def _alike(positions: AttentionPositions | None) -> bool:
    """Returns whether positions are the same for all heads."""
    return positions is None or isinstance(positions, (Rotary, BlockRotary))


def _can_be_cut(config: TransformerConfig) -> bool:
    """Returns whether the positions of a model can be those of some of its heads."""
    positions = config.attention.positions
    if isinstance(config, EncoderDecoderConfig):  # both stacks have the slopes of one config
        return _alike(positions) or type(positions) is RelativeBuckets
    return _alike(positions) or type(positions) in (ALiBi, RelativeBuckets)


def _check_number(name: str, number: int, known: int, step: int) -> None:
    """Raises UserError for a number of parts that cannot stay."""
    if not 0 < number <= known:
        raise UserError(f"{name}={number}: the model has {known}, of which 1 to {known} can stay")
    if number % step:
        raise UserError(f"{name}={number}: they go by {step}, which belong together")
