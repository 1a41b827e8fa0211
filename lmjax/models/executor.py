"""Executors run the blocks of a stack: one compiled body, scanned over stacked parameters.

A model hands its blocks to its `executor`. Another one than the scan, such as a pipeline whose
stages hold a part of the layers each, takes its place for every family: all that it needs comes as
arguments, nothing by closure.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from lmjax.models.auxiliary import Auxiliary
from lmjax.models.lora import give_keys
from lmjax.models.paged_cache import AnyCache, AnyLayerCache
from lmjax.models.stretches import Stretch, stretches
from lmjax.parallel import STAGE
from pallas_kernels.attention import Mask

# See `TransformerConfig.remat`.
Remat = Literal["none", "dots", "attention", "full", "offload"]
BLOCK_INPUT = "block_input"  # name of the activations that a block reads
_policies = jax.checkpoint_policies
_attention = _policies.save_only_these_names("attention")  # as kernels name what they return
REMAT_POLICIES = {
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _attention
    ),
    "attention": _attention,
    "full": _policies.nothing_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Neighbouring blocks of one structure, as pure functions of arrays.

    Attributes:
      graph: the structure of one block.
      params: the blocks' parameters, stacked along a first axis over layers.
      keys: for dropout, one a layer; None drops nothing.
      windows: of each layer's attention; None: a layer without one.
      remat: what backward recomputes.
      unroll: layers per step of a scan; 0: a plain Python loop.
      dropout: of each layer, where it is not the block's own.
      auxiliary: takes the layers' auxiliary losses and measures; None: there are none.
      group: layers of an entry of the stack: several, where they are of different structures.
    """

    graph: nnx.GraphDef
    params: Any
    keys: Key[Array, "layers"] | None
    windows: tuple[int | None, ...]
    remat: Remat = "none"
    unroll: int = 1
    dropout: Float[Array, "layers"] | None = None
    auxiliary: Auxiliary | None = None
    group: int = 1

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """The layers, cut into what is scanned."""
        return stretches(self.windows, scanned=self.unroll != 0, group=self.group)

    @property
    def by_stage(self) -> bool:
        """Returns whether the layers are divided over the stages of a pipeline."""
        leaves = jax.tree.leaves(self.params)
        return any(STAGE in jax.typeof(a).sharding.spec[:1] for a in leaves)

    def layer(self, stacked: Any, number: int, period: int) -> tuple[Any, ...]:
        """All that a layer of a period has: parameters of its group, auxiliary, key and dropout.

        Args:
          stacked: those of all layers of the period, as `Stretch.cut` cuts them.
          number: of the layer in the period.
          period: number of its layers.
        """
        *own, keys, rates = stacked
        if period > self.group:
            own = jax.tree.map(lambda a: a[number // self.group], own)
        if period > 1:
            keys, rates = jax.tree.map(lambda a: a[number], (keys, rates))
        return *own, keys, rates

    def part(self, first: int, last: int) -> Blocks:
        """The blocks from number `first` on, before number `last`; whole groups."""
        entries = slice(first // self.group, last // self.group)
        params, auxiliary = jax.tree.map(lambda a: a[entries], (self.params, self.auxiliary))
        keys, rates = jax.tree.map(lambda a: a[first:last], (self.keys, self.dropout))
        return dataclasses.replace(
            self,
            params=params,
            keys=keys,
            windows=self.windows[first:last],
            dropout=rates,
            auxiliary=auxiliary,
        )

    def cut(self, first: int) -> tuple[Blocks, Blocks]:
        """The blocks before number `first`, through whose parameters no gradient goes, the rest."""
        frozen, trained = self.part(0, first), self.part(first, len(self.windows))
        params = jax.lax.stop_gradient(frozen.params)
        return dataclasses.replace(frozen, params=params, auxiliary=None), trained

    def apply(
        self,
        params: Any,
        x: Float[Array, "batch seq embed"],
        mask: Mask,
        tables: Any,
        cache: AnyLayerCache | None,
        key: PRNGKeyArray | None,
        rate: Float[Array, ""] | None = None,
        auxiliary: Auxiliary | None = None,
        member: int = 0,
    ) -> tuple[Float[Array, "batch seq embed"], AnyLayerCache | None]:
        """One block with these parameters; `mask` has its window, `rate` is its dropout.

        `auxiliary` is the layer's own, `member` its number in its group, which has these
        parameters.
        """
        return self.block(params, key, rate, auxiliary, member)(x, mask, tables, cache, key)

    def block(
        self,
        params: Any,
        key: PRNGKeyArray | None,
        rate: Float[Array, ""] | None = None,
        auxiliary: Auxiliary | None = None,
        member: int = 0,
    ) -> nnx.Module:
        """One block with these parameters; see `apply`."""
        block = nnx.merge(self.graph, params)
        if self.group > 1:
            block = block.at(member)
        give_keys(block, key)
        if rate is not None:
            block.layer_dropout = rate
        block.auxiliary = auxiliary
        return block


# (blocks, x, mask, tables, cache) -> (x, cache), as `scan_blocks`.
Executor = Callable[
    [Blocks, jax.Array, Mask, Any, AnyCache | None], tuple[jax.Array, AnyCache | None]
]


def scan_blocks(
    blocks: Blocks,
    x: Float[Array, "batch seq embed"],
    mask: Mask,
    tables: Any,
    cache: AnyCache | None,
) -> tuple[Float[Array, "batch seq embed"], AnyCache | None]:
    """Scans over the layers, one period of a pattern of windows at a time.

    What is left of a pattern that ends in its middle runs after its whole periods.

    Args:
      blocks: the blocks, in order.
      x: what the first of them reads.
      mask: what tokens see, less the windows; its arrays have a row for each of the batch.
      tables: what all blocks need of positions (`lmjax.models.attention.Tables`).
      cache: what came before, already told of the new tokens; None: nothing.

    Returns:
      The last block's output, and the cache with the new keys and values in it.
    """
    caches = None if cache is None else cache.layers()
    # Of layers that other stages hold, the numbers, by which they are fetched.
    group = blocks.group
    entries = jnp.arange(len(blocks.windows) // group) if blocks.by_stage else blocks.params
    first, pattern_index, extended = 0, 0, []
    for stretch in blocks.stretches:
        cut, drawn = functools.partial(stretch.cut, first=first), (blocks.keys, blocks.dropout)
        own = jax.tree.map(functools.partial(cut, group=group), (entries, blocks.auxiliary))
        layers = *own, *jax.tree.map(cut, drawn)
        period = len(stretch.windows)
        masks = [dataclasses.replace(mask, window=window) for window in stretch.windows]
        own = [None] * period
        if cache is not None:
            own = [
                dataclasses.replace(layer, window=mask.window, ordered=mask.causal_by_position)
                for layer, mask in zip(caches[pattern_index : pattern_index + period], masks)
            ]
            masks = [
                cache.mask(mask, pattern_index + i, x.shape[1]) for i, mask in enumerate(masks)
            ]
        x, own = _scan_stretch(blocks, layers, x, masks, tables, own)
        first, pattern_index = first + stretch.layers, pattern_index + period
        extended += own
    return x, None if cache is None else cache.extended(extended)


def _scan_stretch(
    blocks: Blocks, layers: Any, x: jax.Array, masks: list, tables: Any, caches: list
):
    """Runs `layers`: parameters, auxiliary losses, keys, dropout, as `Stretch.cut` cuts them."""
    unroll, periods = blocks.unroll, jax.tree.leaves(layers)[0].shape[0]

    def run(carry, inputs):
        x, caches = carry
        x = checkpoint_name(x, BLOCK_INPUT)
        stacked, index = inputs
        caches = [c if c is None else dataclasses.replace(c, period=index) for c in caches]
        for i, mask in enumerate(masks):
            params, auxiliary, *drawn = blocks.layer(stacked, i, len(masks))
            if blocks.by_stage:
                params = fetch_layer(blocks.params, params)
            member = i % blocks.group
            own = *drawn, auxiliary, member
            x, caches[i] = blocks.apply(params, x, mask, tables, caches[i], *own)
        return (x, caches), None

    if blocks.remat != "none" and caches[0] is None:
        run = jax.checkpoint(run, policy=REMAT_POLICIES[blocks.remat])
    carry, inputs = (x, caches), (layers, jnp.arange(periods))
    if unroll:
        return jax.lax.scan(run, carry, inputs, unroll=min(unroll, periods))[0]
    return run(carry, jax.tree.map(lambda a: a[0], inputs))[0]


def fetch_layer(params: Any, number: Int[Array, ""]) -> Any:
    """One layer's parameters, whole on each stage, of a stack whose layers are divided over stages.

    A pipeline moves activations to the layers; outside of it, as in evaluation, a layer at a time
    comes to all stages.
    """

    def fetch(params, number):
        def one(a):
            owner, index = number // a.shape[0], number % a.shape[0]
            mine = jax.lax.dynamic_index_in_dim(a, index, keepdims=False)
            return jax.lax.psum(jnp.where(owner == jax.lax.axis_index(STAGE), mine, 0), STAGE)

        return jax.tree.map(one, params)

    specs = PartitionSpec(STAGE), PartitionSpec()
    run = jax.shard_map(fetch, in_specs=specs, out_specs=PartitionSpec(), axis_names={STAGE})
    return run(params, number)


@jax.jit
def entry_of(blocks: Any, number: int | Int[Array, ""]) -> Any:
    """One entry of parameters that are stacked; one program cuts out any of them."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), blocks)
