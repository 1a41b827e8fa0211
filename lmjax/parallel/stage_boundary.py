"""Arrays that enter and leave a `jax.shard_map` over some of a mesh's axes stay divided.

jax 0.10 lowers the boundary of such a function with the axes of its specs alone, as if arrays were
whole along all others: with Explicit axes every parameter and every gradient of a stage is gathered
there over `fsdp` and `tensor`, 65 GB a chip for a quarter of 65 billion parameters. That of jax
0.12 keeps them divided (findings/jax-shard-map-over-some-axes-gathers-along-the-others.sh).
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
from jax._src import shard_map as internals

LOWERING = "_shardy_shard_map_sharding"  # of the sharding of one array at the boundary
PARAMETERS = ["ctx", "mesh", "manual_axes", "spec", "aval_in"]


@functools.cache
def keep_shards() -> None:
    """Has jax lower the boundary by the types of the arrays, which name all axes.

    Where jax has another lowering than the one that is known here, it is left alone: results are
    the same, and arrays may be gathered.
    """
    if jax.__version_info__ >= (0, 11):
        return
    lowering = getattr(internals, LOWERING, None)
    if lowering is None or list(inspect.signature(lowering).parameters) != PARAMETERS:
        return

    def by_type(ctx: Any, mesh: Any, manual_axes: Any, spec: Any, aval_in: Any) -> Any:
        own = aval_in.sharding.spec
        return lowering(ctx, mesh, manual_axes, own if any(own) else spec, aval_in)

    setattr(internals, LOWERING, by_type)
