"""Tables of embeddings: of tokens, of positions, and the head's rows."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float, Int

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
