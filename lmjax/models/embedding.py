"""Tables of embeddings: of tokens, of positions, and the head's rows."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from lmjax.models.few_rows import are_few, few_row_product
from lmjax.models.initializers import Kind
from lmjax.models.linear import Builder
from lmjax.models.quantized import QuantizedWeight


class Embedding(nnx.Module):
    """A float32 table with one row an id, sharded over its width at rest.

    It may be kept in few bits: then blocks run along the rows (`lmjax.models.quantization`).
    """

    def __init__(self, rows: str | None, length: int, width: int, kind: Kind, builder: Builder):
        """Args: logical axis and number of the rows, their width, how they are drawn."""
        self.rows, self.width = ((rows, length),), (("embed", width),)
        self.adapter = nnx.data(None)  # of low rank, of a head; see `lmjax.models.lora`
        self.layout = builder.layout
        self.table: nnx.Param | QuantizedWeight = builder.parameter(
            self.rows + self.width, kind, fan_in=width
        )

    def __call__(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
        return self.lookup(ids)

    def lookup(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
        """The row of each id, in float32, so that gradients of frequent ids add up exactly."""
        (_, width) = self.width[0]
        spec = self.layout.spec("batch", "seq", None, shape=(*ids.shape, width))
        if not isinstance(self.table, QuantizedWeight):
            return self.gathered("float32").at[ids].get(out_sharding=spec)
        form = self.table.form
        rows = {
            name: array.at[ids].get(out_sharding=spec) if array.ndim else array
            for name, array in form.gathered(self.table.stored()).items()
        }
        return form.code.decode(rows, 2, width)

    def gathered(self, dtype: str) -> Float[Array, "rows embed"]:
        """The table with whole rows, still sharded over them where `rows` is."""
        if isinstance(self.table, QuantizedWeight):
            return self.table.form.read(self.table.stored()).astype(dtype)
        (name, _) = self.rows[0]
        return self.layout.reshard(self.table[...].astype(dtype), name, None)

    def scores(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq rows"] | None:
        """Products of a few vectors with all rows in float32, where there is a fast way; or None.

        There is for a table in few bits on a CPU, which is not made whole for them.
        """
        (_, count) = self.rows[0]
        if not isinstance(self.table, QuantizedWeight) or not are_few(x.shape):
            return None
        stored = self.table.form.gathered(self.table.stored())
        cut = (jax.typeof(a).sharding.spec for a in (x, *stored.values()))
        if any(entry is not None for spec in cut for entry in spec):
            return None
        found = few_row_product(x.reshape(-1, x.shape[-1]), self.table.form, stored)
        return found.reshape(*x.shape[:2], count)
