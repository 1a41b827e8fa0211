"""The arrays of a tree by their names, and where they lie."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import PyTree


def by_name(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their path, e.g. `params.blocks.attention.query.weight`."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def entry_of(name: str) -> str:
    """The entry of the tree's top level that an array belongs to."""
    return name.partition(".")[0]


def shape_with_sharding(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The leaf's shape with a sharding on real devices.

    Shapes that were traced know the mesh only as an abstract one; the mesh that is set is meant.
    """
    sharding, mesh = leaf.sharding, jax.sharding.get_mesh()
    if not isinstance(getattr(sharding, "mesh", None), Mesh):
        if mesh.empty:
            sharding = SingleDeviceSharding(jax.devices()[0])
        else:
            kind = getattr(sharding, "memory_kind", None)
            spec = getattr(sharding, "spec", PartitionSpec())
            sharding = NamedSharding(mesh, spec, memory_kind=kind)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def is_key(leaf: jax.Array) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
