"""The dense layer that all others are made of, how layers are built, and dropout."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from lmjax.models.few_rows import are_few, few_row_product, product_by_outputs
from lmjax.models.initializers import Initializer, Kind
from lmjax.models.integer_products import ActivationCode, integer_product
from lmjax.models.products import Product, Products
from lmjax.models.quantized import Axes, QuantizedWeight, WeightForm
from lmjax.models.weight_codes import Stored
from lmjax.parallel import Layout
from lmjax.parallel.random import draw_rows

Draw = jax.nn.initializers.Initializer


@dataclasses.dataclass(frozen=True)
class Builder:
    """Arguments that every module of a model is built with, beside its own config."""

    hidden: int
    num_layers: int
    initializer: Initializer
    dtype: str
    layout: Layout
    rngs: nnx.Rngs
    products: Products = dataclasses.field(default_factory=Products)
    # Whether what sublayers give is divided as the residual stream is before it is added up.
    divides: bool = True

    def linear(
        self, inputs: Axes, outputs: Axes, *, bias: bool, kind: Kind | Draw = "weight"
    ) -> LinearLayer:
        """A dense layer; `kind` says how its weight is drawn, or draws it."""
        return LinearLayer(inputs, outputs, bias=bias, kind=kind, builder=self)

    def parameter(self, axes: Axes, kind: Kind | Draw, fan_in: int) -> nnx.Param:
        """A float32 matrix over named axes, born where the layout wants it."""
        names, shape = zip(*axes)
        draw = kind
        if isinstance(kind, str):
            draw = self.initializer.draw(kind, self.num_layers, fan_in)
        return nnx.Param(
            draw(self.rngs.params(), shape, jnp.float32),
            out_sharding=self.layout.spec(*names, shape=shape),
        )


class LinearLayer(nnx.Module):
    """y = x . weight + bias over named axes, e.g. (embed,) -> (heads, head_dim).

    The weight is [*inputs, *outputs], or [*outputs, *inputs] by `Layout.outputs_first`.
    The weight lies sharded over `fsdp` and is gathered where it is used, in the compute dtype: once
    in forward, and once more in backward. One that is kept in few bits is gathered in these.
    """

    def __init__(
        self, inputs: Axes, outputs: Axes, *, bias: bool, kind: Kind | Draw, builder: Builder
    ):
        self.inputs, self.outputs = inputs, outputs
        self.dtype, self.layout, self.products = builder.dtype, builder.layout, builder.products
        # Of a sublayer: what it gives is that of the stream.
        self.is_last = kind == "residual" and builder.divides
        fan_in = math.prod(size for _, size in inputs)
        self.weight: nnx.Param | QuantizedWeight = builder.parameter(self._axes, kind, fan_in)
        self.bias = nnx.data(None)
        self.adapter = nnx.data(None)  # of low rank, see `lmjax.models.lora`
        # See `lmjax.models.quantization`: how a float weight is rounded where it is used, and how
        # inputs are, with a scale of the layer's own.
        self.rounding: WeightForm | None = None
        self.activations: ActivationCode | None = None
        self.input_scale = nnx.data(None)
        if bias:
            names, shape = zip(*outputs)
            self.bias = nnx.Param(
                jnp.zeros(shape, jnp.float32), out_sharding=self.layout.spec(*names, shape=shape)
            )

    def __call__(self, x: Float[Array, "batch seq *inputs"]) -> Float[Array, "batch seq *outputs"]:
        def product(x, stored):
            if isinstance(self.weight, QuantizedWeight):
                return self._quantized_product(x, stored)
            return self._product(x, self._gathered(stored))

        weight = self.weight
        stored = weight.stored() if isinstance(weight, QuantizedWeight) else weight[...]
        if self._has_own_backward:
            product = Product(len(self.inputs), self._spec(x), self.products.fp8, self._gathered)
        # Backward casts and gathers it once more: no copies of all layers' weights are kept for it.
        out = self._as_stream(jax.checkpoint(product, prevent_cse=False)(x, stored))
        if self.bias is not None:
            names = self.layout.gathered(*(name for name, _ in self.outputs))
            out = out + self.layout.reshard(self.bias[...].astype(self.dtype), *names)
        if self.adapter is not None:
            out = (out + self._as_stream(self.adapter(x))).astype(self.dtype)
        return out

    def _as_stream(self, out: jax.Array) -> jax.Array:
        """A sum over devices of which each needs a part alone."""
        return self.layout.to_stream(out) if self.is_last else out

    def adapted_weight(self) -> Float[Array, "*inputs_and_outputs"]:
        """The weight in float32, with what an adapter adds to it, less its dropout."""
        weight = self.weight
        if isinstance(weight, QuantizedWeight):
            weight = weight.form.read(weight.stored(), whole=False)
        else:
            weight = self.float_weight()
        return weight if self.adapter is None else weight + self.adapter.delta()

    def float_weight(self) -> Float[Array, "*inputs_and_outputs"]:
        """The weight, which is kept in floats, inputs first."""
        weight, outputs = self.weight[...], len(self.outputs)
        if not self.layout.outputs_first:
            return weight
        return jnp.transpose(weight, (*range(outputs, weight.ndim), *range(outputs)))

    @property
    def _axes(self) -> Axes:
        """Axes of the weight."""
        first, last = self.inputs, self.outputs
        return last + first if self.layout.outputs_first else first + last

    def _gathered(self, stored: jax.Array | Stored) -> jax.Array:
        """The weight as it is multiplied with: in the compute dtype, whole along `embed`."""
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.form.read(stored).astype(self.dtype)
        names = self.layout.gathered(*(name for name, _ in self._axes))
        if self.rounding is None:
            return self.layout.reshard(stored.astype(self.dtype), *names)
        # Gradients go past the rounding (Bengio et al. 2013, arXiv:1308.3432).
        weight = self.layout.reshard(stored, *names)
        error = self.rounding.read(self.rounding.encode(weight)) - weight
        return (weight + jax.lax.stop_gradient(error)).astype(self.dtype)

    @property
    def _has_own_backward(self) -> bool:
        """Returns whether `products` change anything; layers in float32 are meant to be exact."""
        plain = self.products == Products() or isinstance(self.weight, QuantizedWeight)
        return not plain and self.dtype != "float32"

    def _spec(self, x: jax.Array) -> P:
        """The spec of what the layer gives for x."""
        names = self.layout.gathered(*(name for name, _ in self.outputs))
        shape = (*x.shape[:2], *(size for _, size in self.outputs))
        return self.layout.spec("batch", "seq", *names, shape=shape)

    def _quantized_product(self, x: jax.Array, stored: Stored) -> jax.Array:
        """The product with a weight of few bits, in the way that is fast."""
        form, spec, batch = self.weight.form, self._spec(x), jax.typeof(x).sharding.spec
        few = are_few(x.shape) and not any((*spec, *batch))
        if self.activations is None and not few:
            return self._product(x, self._gathered(stored))
        stored = form.gathered(stored)
        if self.activations is None:
            y = few_row_product(x.reshape(-1, form.size), form, stored)
        else:
            x = x.reshape(*x.shape[:2], form.size, out_sharding=P(*batch[:3]))
            scale = self.activations.scale(self.input_scale, x)
            y = integer_product(x, scale, form, stored, P(*spec[:3]))
        shape = (*x.shape[:2], *(size for _, size in self.outputs))
        return y.astype(self.dtype).reshape(shape, out_sharding=spec)

    def _product(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        batch, seq = x.shape[:2]
        sizes = tuple(size for _, size in self.outputs)
        spec = self._spec(x)
        if self.layout.outputs_first:
            matrix = weight.reshape(math.prod(sizes), -1)
            y = product_by_outputs(x.reshape(batch * seq, -1), matrix)
            return y.reshape(batch, seq, *sizes)
        if self.layout.axes("seq"):
            # Rows of a sequence cut over devices cannot be merged with the batch in place.
            contract = tuple(range(2, 2 + len(self.inputs)))
            dimensions = ((contract, tuple(range(len(self.inputs)))), ((), ()))
            return jax.lax.dot_general(x, weight, dimensions, out_sharding=spec)
        # Two plain matrices: XLA's CPU products are some 5 percent faster so.
        rows, inner, outer = spec[0], jax.typeof(weight).sharding.spec[0], spec[2]
        matrix = weight.reshape(-1, math.prod(sizes), out_sharding=P(inner, outer))
        x = x.reshape(batch * seq, matrix.shape[0], out_sharding=P(rows, inner))
        if batch * seq == 1 and jax.default_backend() == "cpu" and not (inner or outer):
            y = in_parts(x, matrix)
        else:
            y = jnp.matmul(x, matrix, out_sharding=P(rows, outer))
        return y.reshape(batch, seq, *sizes, out_sharding=spec)


def in_parts(x: Float[Array, "1 in"], weight: Float[Array, "in out"]) -> Float[Array, "1 out"]:
    """x . weight as the sum of the products of up to 16 parts of x.

    XLA's CPU product of one row stops short of the memory's bandwidth, by a third where `in` is
    large; of a batch of such products each thread reads one. Halves are added because `jnp.sum`
    would wake the threads once more.
    """
    parts = math.gcd(weight.shape[0], 16)
    y = jnp.einsum("pi,pio->po", x.reshape(parts, -1), weight.reshape(parts, -1, weight.shape[1]))
    while len(y) > 1:
        y = y[: len(y) // 2] + y[len(y) // 2 :]
    return y


def dropout(
    x: Float[Array, "batch seq *features"],
    rate: float | Float[Array, ""],
    key: PRNGKeyArray | None,
) -> Float[Array, "batch seq *features"]:
    """Zeroes a share `rate` of x and scales up the rest; x itself without a key.

    Each device draws its own part of one global mask, so that any mesh drops the same places.
    """
    if key is None or (not isinstance(rate, jax.Array) and rate == 0):
        return x
    draw = functools.partial(jax.random.bernoulli, key, 1 - rate)
    keep = draw_rows(draw, x.shape, jax.typeof(x).sharding.spec)
    return jnp.where(keep, (x / (1 - rate)).astype(x.dtype), jnp.zeros_like(x))
