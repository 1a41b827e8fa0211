"""Functions on each device of a mesh, and the types of arrays there."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def varying_axes(tree: Any) -> frozenset[str]:
    """The manual mesh axes over which some array of a pytree may differ between devices."""
    axes = (jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree))
    return frozenset().union(*axes)


def vary_alike(tree: Any, like: Any = None) -> Any:
    """The arrays of a pytree, typed as varying over the same manual axes: those of all, or `like`.

    The carry of a loop must enter with the type that it leaves with, and a gradient must have the
    type of its input. Where an input does not vary over an axis it is cast here, and the transpose
    of the cast sums its gradient over that axis. Outside of `jax.shard_map` nothing changes.
    """
    return vary_over(tree, varying_axes(tree if like is None else like))


def on_each_device(function: Callable, out_specs: Any, *, check_vma: bool = True) -> Callable:
    """`jax.shard_map` over all axes of the mesh, less those that are manual around it.

    The inputs are taken as they are on the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes)
    run = functools.partial(jax.shard_map, axis_names=set(free), check_vma=check_vma)
    if mesh.manual_axes:
        return _with_gradient(function, out_specs, run, free, check_vma)
    return run(function, out_specs=out_specs)


def _with_gradient(
    function: Callable, out_specs: Any, run: Callable, free: tuple[str, ...], check_vma: bool
) -> Callable:
    """The same inside of another `jax.shard_map`, whose axes JAX would confuse with its own.

    What backward needs of the forward pass would be divided over the outer axes once more, which
    jax 0.10 refuses. Here it leaves the inner devices along one more axis.
    """

    def with_gradient(*inputs):
        types = _InnerTypes(free, varying_axes(inputs), check_vma)
        if not check_vma:
            inputs = vary_over(inputs, types.outer)
        leaves, tree = jax.tree.flatten(inputs)
        kept = {}  # structure of what backward needs, and the free axes over which it varies
        real = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
        specs = [jax.typeof(leaf).sharding.spec for leaf, is_real in zip(leaves, real) if is_real]

        def call(numbers, others):
            numbers, others = iter(numbers), iter(others)
            merged = [next(numbers if is_real else others) for is_real in real]
            return function(*jax.tree.unflatten(tree, merged))

        def body(numbers, others):
            numbers, others = types.untyped((numbers, others))
            out, pull = jax.vjp(lambda numbers: call(numbers, others), numbers)
            arrays, kept["structure"] = jax.tree.flatten(pull)
            varying = (varying_axes(a) for a in arrays)
            kept["specs"] = [PartitionSpec(tuple(a for a in free if a in own)) for own in varying]
            return out, [a[None] for a in arrays]

        def trial(numbers, others):
            return vary_over(body(numbers, others), free)

        def pulled(arrays, cotangents):
            pull = jax.tree.unflatten(kept["structure"], [a[0] for a in arrays])
            return types.summed(pull(types.shared(cotangents, out_specs))[0], specs)

        def forward(numbers, others):
            jax.eval_shape(run(trial, out_specs=PartitionSpec(free)), numbers, others)
            return types.typed(run(body, out_specs=(out_specs, kept["specs"]))(numbers, others))

        def backward(arrays, cotangents):
            return types.typed(run(pulled, out_specs=specs)(arrays, cotangents)), None

        @jax.custom_vjp
        def differentiable(numbers, others):
            return types.typed(run(call, out_specs=out_specs)(numbers, others))

        differentiable.defvjp(forward, backward)
        numbers = [leaf for leaf, is_real in zip(leaves, real) if is_real]
        return differentiable(numbers, [leaf for leaf, is_real in zip(leaves, real) if not is_real])

    return with_gradient


@dataclasses.dataclass(frozen=True)
class _InnerTypes:
    """Types of arrays on both sides of a map inside of another, where jax does not check them.

    Operations of an unchecked map give types without the outer axes, and nothing says which
    gradients are to be summed. Of a checked one the types of arrays say it all.

    Attributes:
      free: axes of the inner map.
      outer: axes of the outer one over which the inputs vary.
      checked: whether jax checks the inner map.
    """

    free: tuple[str, ...]
    outer: frozenset[str]
    checked: bool

    def typed(self, outputs):
        """Outputs of the inner map, outside of it."""
        return outputs if self.checked else vary_over(outputs, self.outer)

    def untyped(self, arrays):
        """Inputs of the inner map, inside of it."""
        if self.checked:
            return arrays
        return jax.tree.map(lambda a: jax.lax.squeeze(jax.lax.expand_dims(a, [0]), [0]), arrays)

    def shared(self, cotangents, out_specs):
        """Each device's share of cotangents of outputs, inside."""
        if self.checked:
            return cotangents
        sizes = jax.sharding.get_abstract_mesh().shape
        copies = jax.tree.map(lambda s: math.prod(sizes[a] for a in self.missing(s)), out_specs)
        return jax.tree.map(lambda a, number: a / number, cotangents, copies)

    def summed(self, gradients, specs):
        """Gradients of inputs, summed over the devices that hold the same ones, inside."""
        if self.checked:
            return gradients
        return [jax.lax.psum(d, self.missing(spec)) for d, spec in zip(gradients, specs)]

    def missing(self, spec: PartitionSpec) -> tuple[str, ...]:
        """Free axes, of more than one device, over which arrays of a spec do not vary."""
        named, sizes = jax.tree.leaves(tuple(spec)), jax.sharding.get_abstract_mesh().shape
        return tuple(axis for axis in self.free if axis not in named and sizes[axis] > 1)


def vary_over(tree: Any, axes: Iterable[str]) -> Any:
    """Arrays typed as varying over these manual axes, whatever they varied over before."""

    def cast(leaf):
        missing = tuple(sorted(set(axes) - varying_axes(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)
