"""Batches from the host's memory onto the mesh."""

import jax
from jax.sharding import NamedSharding

from lmjax.models import Batch, check_tokens
from lmjax.parallel import Layout

AXES = {1: ("batch",), 2: ("batch", "seq"), 3: ("batch", None, "seq")}  # by number of dimensions


def to_devices(batch: Batch, layout: Layout, vocab_size: int) -> Batch:
    """The batch on the mesh that is set, cut as the layout says.

    Args:
      batch: numpy arrays; of several processes, each one's share of the rows, in their order.
      layout: gives the sharding of rows and sequence.
      vocab_size: number of tokens that the model has.

    Raises:
      UserError: rows or sequence do not divide the mesh axes that they are cut over, or an id is
        none of the model's.
    """
    check_tokens(batch, vocab_size)
    processes = jax.process_count()

    def place(array):
        shape = (array.shape[0] * processes, *array.shape[1:])
        spec = layout.spec(*AXES[array.ndim], shape=shape)
        return jax.make_array_from_process_local_data(spec, array, shape)

    return jax.tree.map(place, batch)


def abstract_batch(batch: Batch, layout: Layout) -> Batch:
    """The shapes and shardings that `to_devices` would give, on the abstract mesh that is set.

    Args:
      batch: numpy arrays of the whole batch.
      layout: as in `to_devices`.

    Raises:
      UserError: rows or sequence do not divide the mesh axes that they are cut over.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def describe(array):
        spec = layout.spec(*AXES[array.ndim], shape=array.shape)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(describe, batch)
