"""Examples from the host's memory to the devices of the mesh."""

import math

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.models import Batch
from lmjax.models.batch import Array
from lmjax.objectives import Example, TextObjective
from lmjax.objectives.example import batches, check_example, count_rows
from lmjax.parallel import Layout, axis_size

SHARES = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)  # of the longest, the most
LENGTH_MULTIPLE = 16
AXES = {1: ("batch",), 2: ("batch", "seq"), 3: ("batch", None, "seq")}  # by number of dimensions


def spec_of(example: Example, array: Array, rows: int, layout: Layout) -> PartitionSpec:
    """The spec of one of an example's arrays, which has `rows` rows on all processes.

    An axis is cut as the sequence is where it has as many elements as a text of the example has
    tokens: labels of whole texts are not.
    """
    return layout.spec(*axes_of(example, array), shape=(rows, *array.shape[1:]))


def axes_of(example: Example, array: Array) -> list[str | None]:
    """Logical axes of one of an example's arrays; see `spec_of`."""
    lengths = {part.tokens.shape[-1] for batch in batches(example) for part in chain(batch)}
    sizes = zip(AXES[array.ndim], array.shape, strict=True)
    return [None if name == "seq" and size not in lengths else name for name, size in sizes]


def chain(batch: Batch) -> list[Batch]:
    """A batch, and the one of its encoder."""
    return [batch] if batch.encoder is None else [batch, batch.encoder]


def fitting_length(needed: int, longest: int, layout: Layout) -> int:
    """The smallest of a few lengths that holds a number of tokens; see `fitting_size`."""
    multiple = math.lcm(LENGTH_MULTIPLE, axis_size(*layout.axes("stream")))
    return fitting_size(needed, longest, multiple)


def fitting_rows(needed: int, most: int, layout: Layout) -> int:
    """The smallest of a few numbers of rows of each process that holds those of all of them.

    All processes call it together.
    """
    processes = jax.process_count()
    shards = axis_size(*layout.axes("batch"))
    multiple = max(1, shards // processes)
    return fitting_size(_most_of_all(needed), most, multiple)


def fitting_size(needed: int, most: int, multiple: int) -> int:
    """The smallest of a few multiples that is enough, or the most.

    They are few because a program is compiled for each: from an eighth of the most up to all.
    """
    sizes = (math.ceil(most * share / multiple) * multiple for share in SHARES)
    return next((size for size in sizes if needed <= size < most), most)


def _most_of_all(number: int) -> int:
    """The largest of the numbers of all processes."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.array(number))))


def shortened(example: Example, layout: Layout) -> Example:
    """The example without the columns at its end that are padding in all rows of all processes.

    For rows of one text each, which end where their texts do. As many columns are left as
    `fitting_length` says. An example with an encoder's texts stays as it is.

    Args:
      example: numpy arrays, one process's share of the rows.
      layout: see `to_devices`.
    """
    parts = [part for batch in batches(example) for part in chain(batch)]
    longest = parts[0].tokens.shape[-1]
    if any(part.tokens.shape[-1] != longest or part.encoder is not None for part in parts):
        return example
    filled = np.any([np.any(part.segments > 0, axis=0) for part in parts], axis=0)
    needed = int(np.max(np.flatnonzero(filled), initial=0)) + 1
    length = fitting_length(_most_of_all(needed), longest, layout)

    def cut(array: np.ndarray) -> np.ndarray:
        return array[..., :length] if "seq" in axes_of(example, array) else array

    return jax.tree.map(cut, example)


def compact(objective: TextObjective, example: Example, layout: Layout) -> Example:
    """The example in fewer rows, or without the padding at the end of all of them.

    Args:
      objective: that the example is of; rows are texts of one slot each.
      example: numpy arrays, one process's share of the rows.
      layout: see `to_devices`.
    """
    rows = count_rows(example)
    packed = objective.packed(example, lambda needed: fitting_rows(needed, rows, layout))
    return shortened(example, layout) if packed is example else packed


def to_devices(example: Example, layout: Layout, vocab_size: int) -> Example:
    """The example on the mesh that is set, sharded as the layout says.

    Args:
      example: numpy arrays; of several processes, each one's share of the rows, in their order.
      layout: gives the sharding of rows and sequence.
      vocab_size: number of tokens of the model.

    Raises:
      UserError: rows or sequence do not divide the mesh axes that they are sharded over, or an id
        is outside of the vocabulary.
    """
    check_example(example, vocab_size)
    processes = jax.process_count()

    def put(array):
        shape = (array.shape[0] * processes, *array.shape[1:])
        spec = spec_of(example, array, shape[0], layout)
        return jax.make_array_from_process_local_data(spec, array, shape)

    return jax.tree.map(put, example)


def own_rows(example: Example) -> Example:
    """This process's share of the rows of an example that all processes have, for `to_devices`."""
    count, index = jax.process_count(), jax.process_index()

    def share(array):
        rows = len(array) // count
        return array[index * rows : (index + 1) * rows]

    return jax.tree.map(share, example)


def abstract_example(example: Example, layout: Layout) -> Example:
    """Shapes and shardings of `to_devices`, on the abstract mesh that is set.

    Args:
      example: numpy arrays of the whole batch.
      layout: as in `to_devices`.

    Raises:
      UserError: rows or sequence do not divide the mesh axes that they are sharded over.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def describe(array):
        spec = spec_of(example, array, array.shape[0], layout)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(describe, example)
