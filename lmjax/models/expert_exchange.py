"""Computation of experts on each device: tokens to their experts, products, and back.

Experts are divided over the mesh axis `expert`, and so are the rows of the batch. Within a
capacity, each device sends every expert its slots by an all-to-all and receives as many. Without
one, how many tokens an expert has is known only when the step runs, and an exchange of fixed size
would have room for the worst case, all tokens to one device; so all tokens of the axis are gathered
instead, 1 / chosen of those bytes, each device computes the rows of its own experts, and their sums
are scattered back. Hidden units are divided over `tensor`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from lmjax.models.feed_forward import FeedForwardConfig, activate
from lmjax.models.routing import Choices, Slots
from lmjax.parallel import Layout, axis_size
from pallas_kernels.grouped_product import grouped_product
from pallas_kernels.manual_axes import on_each_device, vary_alike, vary_over

Sums = Float[Array, "batch sums"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StoredMatrix:
    """Weight and bias of one dense layer in all experts, or in those of a device, in float32."""

    weight: Float[Array, "experts inputs outputs"]
    bias: Float[Array, "experts outputs"] | None


Matrices = dict[str, StoredMatrix]
# (name of a dense layer, its input) -> its output, for rows that are sorted in some way
Product = Callable[[str, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class ExpertExchange:
    """Experts of one layer on one device, inside a `jax.shard_map` over the mesh.

    Attributes:
      config: of the experts (`lmjax.models.experts.ExpertsConfig`).
      dtype: of the products.
      expert: mesh axes that the experts are divided over.
      rows_divided: whether the rows are divided over these too.
      seq: mesh axes of the sequence.
      seq_parts: devices along these.
      hidden: mesh axes of the experts' hidden units.
      gathered: mesh axes of `embed`, over which weights are gathered where they are used.
    """

    config: Any
    dtype: str
    expert: tuple[str, ...]
    rows_divided: bool
    seq: tuple[str, ...]
    seq_parts: int
    hidden: tuple[str, ...]
    gathered: tuple[str, ...]

    @staticmethod
    def on_mesh(
        config: FeedForwardConfig,
        layout: Layout,
        dtype: str,
        spec: PartitionSpec,
        matrices: Matrices,
    ) -> ExpertExchange:
        """Experts of this config on the mesh that is set; `spec` is that of the activations.

        Weights that are whole along `embed` already (ZeRO 1, 2) are gathered no more.
        """
        expert, rows = layout.axes("experts", config.experts), axes_of(spec[0])
        seq = axes_of(spec[1])
        return ExpertExchange(
            config=config,
            dtype=dtype,
            expert=expert,
            rows_divided=bool(expert) and set(expert) <= set(rows),
            seq=seq,
            seq_parts=axis_size(*seq),
            hidden=layout.axes("mlp", config.size),
            gathered=axes_of(jax.typeof(matrices["up"].weight).sharding.spec[1]),
        )

    def mapped(self, run: Callable, spec: PartitionSpec) -> Callable:
        """One of the two methods below as a function of arrays on the mesh."""
        return on_each_device(run, (spec, PartitionSpec(spec[0], None)))

    def whole(
        self,
        x: Float[Array, "batch seq embed"],
        logits: Float[Array, "batch row experts"],
        real: Bool[Array, "batch row"],
        matrices: Matrices,
    ) -> tuple[Float[Array, "batch seq embed"], Sums]:
        """Output of the experts that each token chose, none dropped, and the router's sums.

        Args:
          x: activations, whose sequences may be a part of the rows.
          logits: of the router for whole rows.
          real: which tokens are no padding, likewise.
          matrices: of the experts of this device.
        """
        choices, sums = self.config.router.choose(logits, real)
        choices = jax.tree.map(lambda a: self._own_columns(a, x.shape[1]), choices)
        # Typed so at once, its gradient is summed over `tensor` once, and not in every product.
        tokens = vary_over(x, self.hidden).reshape(-1, x.shape[2])
        choices = jax.tree.map(lambda a: a.reshape(-1, a.shape[2]), choices)
        if self.rows_divided:
            tokens, choices = jax.tree.map(self._gather, (tokens, choices))
        out = self._computed(tokens, choices, matrices)
        partial = self.hidden
        if self.rows_divided:
            out = jax.lax.psum_scatter(out, self.expert, scatter_dimension=0, tiled=True)
        else:
            partial += self.expert
        out = jax.lax.psum(out, partial) if partial else out
        return out.reshape(x.shape), sums

    def _computed(
        self, tokens: Float[Array, "tokens embed"], choices: Choices, matrices: Matrices
    ) -> Float[Array, "tokens embed"]:
        """Sums over the experts of this device that each token chose."""
        (count, chosen), experts = choices.experts.shape, len(matrices["up"].weight)
        group = choices.experts - self._first(experts)
        own = (group >= 0) & (group < experts) & (choices.experts < self.config.experts)
        group = jnp.where(own, group, experts).reshape(-1)
        order = jnp.argsort(group, stable=True)
        back = jnp.argsort(order)
        sizes = jnp.sum(jax.nn.one_hot(group, experts, dtype=jnp.int32), axis=0)
        of_row = jnp.minimum(group[order], experts - 1)

        def product(name: str, rows: jax.Array) -> jax.Array:
            def multiply(rows: jax.Array, weight: jax.Array) -> jax.Array:
                return grouped_product(*vary_alike((rows, weight, sizes)))

            out = self._product(name, rows, matrices, multiply)
            bias = self._bias(name, matrices)
            return out if bias is None else out + bias[of_row]

        repeated = jnp.broadcast_to(tokens[:, None], (count, chosen, tokens.shape[1]))
        rows = permuted(repeated.reshape(count * chosen, -1), order, back)
        rows = permuted(self._layers(product, rows), back, order)
        weights = jnp.where(own, choices.weights, 0)
        out = jnp.sum(rows.reshape(count, chosen, -1) * weights[..., None], axis=1)
        return out.astype(tokens.dtype)

    def within_capacity(
        self,
        x: Float[Array, "batch seq embed"],
        logits: Float[Array, "batch row experts"],
        real: Bool[Array, "batch row"],
        matrices: Matrices,
    ) -> tuple[Float[Array, "batch seq embed"], Sums]:
        """As `whole`, but experts compute the tokens within their capacity alone."""
        slots, sums = self.config.router.slots(logits, real)
        index, weights = self._padded(slots, logits.shape[1], len(matrices["up"].weight))
        index = index - self._first_column(x.shape[1])
        here = (index >= 0) & (index < x.shape[1])
        index = jnp.where(here, index, x.shape[1])
        rows = vary_over(x, self.hidden)  # see `whole`
        taken = jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(rows, index)
        if self.seq:  # each device computes a part of the slots
            taken = jax.lax.psum_scatter(taken, self.seq, scatter_dimension=2, tiled=True)
        if self.rows_divided:
            taken = jax.lax.all_to_all(taken, self.expert, 1, 0, tiled=True)
        batch, experts, count, width = taken.shape
        rows = jnp.swapaxes(taken, 0, 1).reshape(experts, batch * count, width)

        def product(name: str, rows: jax.Array) -> jax.Array:
            def multiply(rows: jax.Array, weight: jax.Array) -> jax.Array:
                return jnp.einsum("eri,eio->ero", rows, weight)

            out = self._product(name, rows, matrices, multiply)
            bias = self._bias(name, matrices)
            return out if bias is None else out + bias[:, None]

        out = self._layers(product, rows).reshape(experts, batch, count, width)
        out = jnp.swapaxes(out, 0, 1)
        if self.rows_divided:
            out = jax.lax.all_to_all(out, self.expert, 0, 1, tiled=True)
        if self.seq:
            out = jax.lax.all_gather(out, self.seq, axis=2, tiled=True)
        out = (out * weights[..., None]).astype(x.dtype)

        def combined(out: jax.Array, at: jax.Array) -> jax.Array:
            empty = jnp.zeros((x.shape[1], width), x.dtype)
            return empty.at[at].add(out, mode="drop")

        y = jax.vmap(combined)(out, index)
        partial = self.hidden if self.rows_divided else self.hidden + self.expert
        return (jax.lax.psum(y, partial) if partial else y), sums

    def _padded(self, slots: Slots, length: int, count: int) -> tuple[jax.Array, jax.Array]:
        """Slots that divide among the devices of a sequence; of few experts if rows are whole."""
        room = ((0, 0), (0, 0), (0, -slots.tokens.shape[2] % self.seq_parts))
        tokens = jnp.pad(slots.tokens, room, constant_values=length)
        weights = jnp.pad(slots.weights, room)
        if self.expert and not self.rows_divided:
            tokens, weights = (
                _cut(a, self._first(count), count, axis=1) for a in (tokens, weights)
            )
        return tokens, weights

    def _layers(self, product: Product, x: jax.Array) -> jax.Array:
        """Output of experts, of which each device of `tensor` has a part of a sum."""
        hidden, name = product("up", x), self.config.activation
        if self.config.gated:
            return product("down", activate(name, product("gate", x)) * hidden)
        return product("down", activate(name, hidden))

    def _product(
        self, name: str, rows: jax.Array, matrices: Matrices, multiply: Callable
    ) -> jax.Array:
        """A product with weights that are cast and gathered for it, and once more in backward."""
        axis = 2 if name == "down" else 1

        def product(rows: jax.Array, weight: jax.Array) -> jax.Array:
            weight = weight.astype(self.dtype)
            if self.gathered:
                weight = jax.lax.all_gather(weight, self.gathered, axis=axis, tiled=True)
            return multiply(rows, weight)

        return jax.checkpoint(product, prevent_cse=False)(rows, matrices[name].weight)

    def _bias(self, name: str, matrices: Matrices) -> Float[Array, "experts outputs"] | None:
        """The bias of a dense layer; of the last one, on the first device of `tensor` alone."""
        bias = matrices[name].bias
        if bias is None:
            return None
        bias = bias.astype(self.dtype)
        if name != "down":
            return bias
        if self.gathered:
            bias = jax.lax.all_gather(bias, self.gathered, axis=1, tiled=True)
        if self.hidden:
            bias = jnp.where(jax.lax.axis_index(self.hidden) == 0, bias, 0)
        return bias

    def _gather(self, a: jax.Array) -> jax.Array:
        """Rows of all devices of the axis of experts."""
        return jax.lax.all_gather(a, self.expert, axis=0, tiled=True)

    def _first(self, count: int) -> jax.Array | int:
        """Number of this device's first expert, if each has so many."""
        return jax.lax.axis_index(self.expert) * count if self.expert else 0

    def _first_column(self, length: int) -> jax.Array | int:
        """Index in the row of this device's first column."""
        return jax.lax.axis_index(self.seq) * length if self.seq else 0

    def _own_columns(self, a: jax.Array, length: int) -> jax.Array:
        """This device's columns of whole rows."""
        return _cut(a, self._first_column(length), length, axis=1) if self.seq else a


def _cut(a: jax.Array, first: jax.Array, length: int, axis: int) -> jax.Array:
    """A part of an array that begins elsewhere on each device."""
    a, first = vary_alike((a, first))
    return jax.lax.dynamic_slice_in_dim(a, first, length, axis)


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def permuted(
    rows: Float[Array, "rows width"], order: Int[Array, "rows"], back: Int[Array, "rows"]
) -> Float[Array, "rows width"]:
    """Rows in another order; `back` is the opposite one, by which the gradient goes."""
    return _permuted(*vary_alike((rows, order, back)))


@jax.custom_vjp
def _permuted(rows, order, back):
    return rows[order]


def _permuted_forward(rows, order, back):
    return rows[order], back


def _permuted_backward(back, gradient):
    return gradient[back], None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)
