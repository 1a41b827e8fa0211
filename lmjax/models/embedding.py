"""Tables of embeddings: of tokens, of positions, and the head's rows."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float, Int

from lmjax.models.initializers import Kind
from lmjax.models.linear import Builder


class Embedding(nnx.Module):
    """A float32 table with one row an id, sharded over its width at rest."""

    def __init__(self, rows: str | None, length: int, width: int, kind: Kind, builder: Builder):
        """Args: logical axis and number of the rows, their width, how they are drawn."""
        self.rows, self.layout = rows, builder.layout
        self.table = builder.parameter(((rows, length), ("embed", width)), kind, fan_in=width)

    def __call__(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
        return self.lookup(ids)

    def lookup(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
        """The row of each id, in float32, so that gradients of frequent ids add up exactly."""
        table = self.gathered("float32")
        spec = self.layout.spec("batch", "seq", None, shape=(*ids.shape, table.shape[1]))
        return table.at[ids].get(out_sharding=spec)

    def gathered(self, dtype: str) -> Float[Array, "rows embed"]:
        """The table with whole rows, still sharded over them where `rows` is."""
        return self.layout.reshard(self.table[...].astype(dtype), self.rows, None)
