"""Layouts: which mesh axes each logical axis of a parameter or activation is sharded over.

A model names logical axes (`embed`, `heads`, `batch`, ...). A `Layout` is the table that maps them
to mesh axes, with a rule for sizes that do not divide. Training and generation use different
tables, so a layout is a value that modules are built with, never a global.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
from jax.sharding import PartitionSpec

from lmjax.config import UserError
from lmjax.parallel.mesh import axis_size

# Each device gathers all keys and values; or they go around the devices (ring attention); or each
# device has whole sequences of some heads meanwhile (Jacobs et al. 2023, arXiv:2309.14509).
Context = Literal["gather", "ring", "all_to_all"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Maps logical axes to mesh axes.

    Attributes:
      rules: (logical axis, mesh axes) pairs; logical axes not named are not sharded.
      replicated: logical axes that are kept whole when their size does not divide the mesh axes;
        any other axis that does not divide is the user's mistake.
      context: how attention sees the keys of a sequence that is divided; see `Context`.
      outputs_first: weights of dense layers are [outputs, inputs], not [inputs, outputs]; on one
        device, and in decoding alone.
    """

    rules: tuple[tuple[str, tuple[str, ...]], ...]
    replicated: tuple[str, ...] = ("kv_heads",)
    context: Context = "gather"
    outputs_first: bool = False

    def axes(self, logical: str | None, size: int | None = None) -> tuple[str, ...]:
        """The mesh axes of more than one device that `logical` is sharded over.

        Args:
          logical: name of the axis, None for one that is never sharded.
          size: its length; where given, divisibility is checked.
        """
        axes = tuple(axis for axis in dict(self.rules).get(logical, ()) if axis_size(axis) > 1)
        if size is not None and (shards := axis_size(*axes)) > 1 and size % shards:
            if logical in self.replicated:
                return ()
            raise UserError(
                f"{logical} of size {size} does not divide the mesh:"
                f" {' x '.join(f'{axis}={axis_size(axis)}' for axis in axes)} = {shards}"
            )
        return axes

    def spec(self, *logical: str | None, shape: tuple[int, ...] | None = None) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes.

        Mesh axes of size one are left out, so that on one device every spec is empty and a size-one
        axis never makes two types differ.
        """
        sizes = shape if shape is not None else (None,) * len(logical)
        entries = []
        for name, size in zip(logical, sizes):
            axes = self.axes(name, size)
            entries.append(axes if len(axes) > 1 else (axes[0] if axes else None))
        return PartitionSpec(*entries)

    def reshard(self, array: jax.Array, *logical: str | None) -> jax.Array:
        """Reshard `array` to the spec of these logical axes (a no-op where it lies so already)."""
        return jax.reshard(array, self.spec(*logical, shape=array.shape))

    def take(self, array: jax.Array, rows: jax.Array, axis: int = 0) -> jax.Array:
        """The rows with these numbers along `axis`, the batch's, wherever they lie on the mesh."""
        spec = list(jax.typeof(array).sharding.spec)
        spec[axis] = self.spec("batch", shape=rows.shape)[0]
        index = (slice(None),) * axis + (rows,)
        return array.at[index].get(out_sharding=PartitionSpec(*spec))

    @property
    def divides_stream(self) -> bool:
        """Returns whether the residual stream is divided further than what layers read."""
        return self.axes("stream") != self.axes("seq")

    def to_stream(self, x: jax.Array) -> jax.Array:
        """Activations [batch, seq, embed] as norms, dropout and additions have them."""
        return self.reshard(x, "batch", "stream", None) if self.divides_stream else x

    def from_stream(self, x: jax.Array) -> jax.Array:
        """Activations [batch, seq, embed] as attention and feed-forward layers read them."""
        return self.reshard(x, "batch", "seq", None) if self.divides_stream else x

    def by_heads(self) -> Layout:
        """The layout in which heads are divided over the axes of the sequence too."""
        rules, seq = dict(self.rules), dict(self.rules)["seq"]
        more = {name: (*rules[name], *seq) for name in ("heads", "kv_heads")}
        rules = rules | more | {"seq": ()}
        return dataclasses.replace(self, rules=tuple(rules.items()), context="gather")

    def gathered(self, *logical: str | None) -> tuple[str | None, ...]:
        """The same axes with the parameter-sharding axis `embed` whole: how a weight is used."""
        return tuple(None if name == "embed" else name for name in logical)


def training_layout(context: Context = "gather", sequence_parallel: bool = False) -> Layout:
    """ZeRO over `fsdp`, sequence over `context`, Megatron `tensor`, experts over `expert`.

    The batch is cut over `data`, `fsdp` and `expert`. At rest every matrix is cut over `fsdp` along
    `embed`; when it is gathered is the ZeRO setting of the training step, not of the layout.

    Args:
      context: how attention sees keys of other devices.
      sequence_parallel: between attention and feed-forward layers the sequence is cut over `tensor`
        too (Korthikanti et al. 2022, arXiv:2205.05198).
    """
    return Layout(
        rules=(
            ("batch", ("data", "fsdp", "expert")),
            ("seq", ("context",)),
            ("stream", ("context", "tensor") if sequence_parallel else ("context",)),
            ("embed", ("fsdp",)),
            ("heads", ("tensor",)),
            ("kv_heads", ("tensor",)),
            ("mlp", ("tensor",)),
            ("experts", ("expert",)),
            ("vocab", ("tensor",)),
            ("layers", ("stage",)),  # of stacked blocks
        ),
        context=context,
    )


def generation_layout() -> Layout:
    """As in training, but a batch that does not divide is replicated.

    Sequences stay whole, and every device has its part of all layers.
    """
    whole = "seq", "stream", "layers"
    rules = tuple(rule for rule in training_layout().rules if rule[0] not in whole)
    return Layout(rules=rules, replicated=("kv_heads", "batch"))


def serving_layout() -> Layout:
    """As in generation, but every device has all rows, which come and go and share pages."""
    layout = generation_layout()
    rules = tuple(rule for rule in layout.rules if rule[0] != "batch")
    return dataclasses.replace(layout, rules=rules)
