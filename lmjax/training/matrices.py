"""Parameters as the matrices they stand for, whatever axes and shards they are stored in.

What a leaf is, its name says (`MATRICES`, `VECTORS`). Below `blocks` every leaf is a stack of
layers. A matrix is [inputs, outputs], heads and head_dim being one axis as in the product.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, PyTree

# The last ones of both are XLNet's.
MATRICES = ("weight", "table", "types")
VECTORS = (
    *("bias", "scale", "head_bias"),
    *("content_bias", "position_bias", "type_bias", "unknown"),
)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of x, (x x^T) x and (x x^T)^2 x
Path = tuple[Any, ...]


def decayed(params: PyTree) -> PyTree[bool]:
    """True for the leaves that weight decay acts on: the matrices."""
    return jax.tree.map_with_path(lambda path, leaf: is_matrix(path), params)


def is_matrix(path: Path) -> bool:
    """Returns whether the leaf at this path is a matrix and no vector.

    Raises:
      ValueError: its name does not say.
    """
    name = _names(path)[-1]
    if name not in MATRICES + VECTORS:
        raise ValueError(
            f"parameter {'/'.join(_names(path))}: optimizers tell matrices from vectors by name;"
            f" end it in {', '.join(MATRICES)} (matrices) or {', '.join(VECTORS)} (vectors)"
        )
    return name in MATRICES


def in_blocks(path: Path) -> bool:
    """Returns whether the leaf belongs to the stacked layers."""
    return "blocks" in _names(path)


def of_experts(path: Path) -> bool:
    """Returns whether the leaf is a stack of experts in each layer."""
    return "experts" in _names(path)


def as_matrices(path: Path, leaf: Array) -> Array:
    """The leaf as [layers, inputs, outputs], a vector as [layers, size]; outside blocks layers = 1.

    Experts are so many more layers, all layers of the first expert before those of the second: the
    axis that may be sharded is the outer one. Axes are only merged, so a sharded leaf stays where
    it is.
    """
    if not in_blocks(path):
        leaf = leaf[None]
    if of_experts(path):
        return _experts_first(leaf)
    if not is_matrix(path):
        return leaf.reshape(leaf.shape[0], -1)
    names = [name for name in _names(path) if name not in ("adapter", "a")]
    if names[-2:] == ["output", "weight"]:  # heads and head_dim are its inputs, and its adapter's
        return leaf.reshape(leaf.shape[0], -1, leaf.shape[-1])
    return leaf.reshape(*leaf.shape[:2], -1)


def layerwise(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on every matrix and vector of every layer as if it were the only parameter.

    The state of a leaf is `inner`'s for it, stacked over the layers.
    """

    def init(params: PyTree) -> PyTree:
        def one(path: Path, leaf: Array) -> PyTree:
            # Counts do not come from the leaf, and so have no place of their own yet.
            return jax.tree.map(_replicated, jax.vmap(inner.init)(as_matrices(path, leaf)))

        return jax.tree.map_with_path(one, params)

    def update(updates: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        gradients, structure = jax.tree.flatten_with_path(updates)
        states, leaves = structure.flatten_up_to(state), structure.flatten_up_to(params)
        changes, new_states = [], []
        for (path, gradient), old, leaf in zip(gradients, states, leaves):
            change, new = jax.vmap(inner.update)(
                as_matrices(path, gradient), old, as_matrices(path, leaf)
            )
            changes.append(_from_matrices(path, gradient, change))
            new_states.append(new)
        return structure.unflatten(changes), structure.unflatten(new_states)

    return optax.GradientTransformation(init, update)


def on_matrices(function: Callable[[Array], Array]) -> optax.GradientTransformation:
    """Applies `function` to every leaf of the updates as [layers, inputs, outputs]."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        def one(path: Path, leaf: Array) -> Array:
            return _from_matrices(path, leaf, function(as_matrices(path, leaf)))

        return jax.tree.map_with_path(one, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def orthogonalize(
    matrices: Float[Array, "layers inputs outputs"], iterations: int = 5
) -> Float[Array, "layers inputs outputs"]:
    """U V^T of each matrix U S V^T, roughly: most singular values end between 0.7 and 1.2.

    By the quintic Newton-Schulz iteration of Muon, in float32. It multiplies whole matrices, so a
    sharded stack is dealt out: each device of the mesh works on some of the layers, alone, and the
    result goes back to where the input lay. Nothing is exchanged between the iterations.
    """
    newton_schulz = optax.contrib.scale_by_muon(
        # One triple an iteration, though all alike, makes it a scan: a fifth of the compile time.
        ns_coeffs=(NEWTON_SCHULZ,) * iterations,
        ns_steps=iterations,
        beta=0.0,  # whatever momentum there is has been applied
        nesterov=False,
        weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(-2, -1),
    )
    journey = _journey(matrices)
    dealt, padding = _deal(matrices.astype(jnp.float32), journey)
    result, _ = newton_schulz.update(dealt, newton_schulz.init(dealt))
    for station in reversed(journey[:-1]):
        result = jax.reshard(result, station)
    result = result[:, : result.shape[1] - padding]
    return _shaped_like(matrices, result).astype(matrices.dtype)


def _journey(matrices: Array) -> list[PartitionSpec]:
    """Specs of [groups, layers, inputs, outputs] from where `matrices` lie to whole ones a device.

    Groups are the shards of the layer axis, where that is sharded. From one station to the next
    the shards of one dimension move: XLA does that by an all-to-all, and more at once by gathering
    everything everywhere. Without a mesh there is nowhere to go.
    """
    sharding = jax.typeof(matrices).sharding
    mesh = sharding.mesh
    if mesh.empty:
        return []
    layers, inputs, outputs = (_axes(entry) for entry in (*sharding.spec, None, None)[:3])
    idle = tuple(
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types)
        if kind == AxisType.Explicit and axis not in layers + inputs + outputs
    )
    stations = (
        (layers, (), inputs, outputs),
        (layers, inputs, (), outputs),
        (layers, inputs + outputs, (), ()),
        (layers, inputs + outputs + idle, (), ()),
    )
    return [PartitionSpec(*(axes or None for axes in station)) for station in stations]


def _deal(
    matrices: Float[Array, "layers inputs outputs"], journey: list[PartitionSpec]
) -> tuple[Float[Array, "groups dealt inputs outputs"], int]:
    """The stack dealt out over the devices, and how many layers of zeros that took a group.

    Zeros are added until every device has as many layers; the iteration keeps them zero.
    """
    if not journey:
        return matrices[None], 0
    sizes = jax.typeof(matrices).sharding.mesh.shape
    groups, devices = (math.prod(sizes[axis] for axis in _axes(entry)) for entry in journey[-1][:2])
    layers = matrices.shape[0] // groups
    padding = -layers % devices
    dealt = matrices.reshape(groups, layers, *matrices.shape[1:], out_sharding=journey[0])
    dealt = jnp.pad(dealt, ((0, 0), (0, padding), (0, 0), (0, 0)))
    for station in journey[1:]:
        dealt = jax.reshard(dealt, station)
    return dealt, padding


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _replicated(array: Array) -> Array:
    """The array whole on every device of the mesh, unless it lies somewhere already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not jax.typeof(array).sharding.mesh.empty:
        return array
    return jax.reshard(array, PartitionSpec(*(None,) * array.ndim))


def _experts_first(leaf: Array) -> Array:
    """A leaf [layers, experts, ...] as [experts x layers, ...]; its layers are on all devices."""
    swapped, spec = _swapped(leaf)
    if spec is None:
        return swapped.reshape(-1, *leaf.shape[2:])
    experts, _, *rest = spec
    swapped = jax.reshard(swapped, PartitionSpec(experts, None, *rest))
    return swapped.reshape(-1, *leaf.shape[2:], out_sharding=PartitionSpec(experts, *rest))


def _from_matrices(path: Path, leaf: Array, matrices: Array) -> Array:
    """The opposite of `as_matrices`: with the shape and sharding of `leaf`."""
    if not of_experts(path):
        return _shaped_like(leaf, matrices)
    like, spec = _swapped(leaf)
    if spec is None:
        return jnp.swapaxes(matrices.reshape(like.shape), 0, 1)
    experts, _, *rest = spec
    whole = matrices.reshape(like.shape, out_sharding=PartitionSpec(experts, None, *rest))
    return jnp.swapaxes(jax.reshard(whole, spec), 0, 1)


def _swapped(leaf: Array) -> tuple[Array, PartitionSpec | None]:
    """A leaf with its first two axes exchanged, and how it is divided; None: there is no mesh."""
    swapped = jnp.swapaxes(leaf, 0, 1)
    sharding = jax.typeof(swapped).sharding
    return swapped, None if sharding.mesh.empty else sharding.spec


def _shaped_like(leaf: Array, matrices: Array) -> Array:
    """`matrices` (any split or merge of axes of `leaf`) with the shape and sharding of `leaf`."""
    sharding = jax.typeof(leaf).sharding
    if sharding.mesh.empty:
        return matrices.reshape(leaf.shape)
    return matrices.reshape(leaf.shape, out_sharding=sharding.spec)


def _names(path: Path) -> list[str]:
    """The keys on the way to a leaf, as text."""
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")
