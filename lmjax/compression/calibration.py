"""Inputs of a model's dense layers on some texts, layer by layer.

The layers run one after another, each on what those before it gave. Between two of them the caller
may put other weights in, so that what comes after is calibrated on what is really computed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from lmjax.compression.expert_inputs import ExpertsRecorder
from lmjax.compression.input_moments import InputMoments
from lmjax.models import Batch, EncoderDecoderConfig, TransformerConfig, abstract, plain_batch
from lmjax.models.executor import Blocks, entry_of
from lmjax.models.experts import Experts
from lmjax.models.linear import LinearLayer
from lmjax.models.quantization import weighted_layers
from lmjax.parallel import training_layout

BATCH = 8  # rows that are run at once


Path = tuple[str, ...]  # of a layer in a block, as ("attention", "query")
# number of the entry of the stack, its inputs by layer -> the entry's parameters that take over
Change = Callable[[int, dict[Path, InputMoments]], Any]
# number of the entry, what one batch has before it and after it
See = Callable[[int, jax.Array, jax.Array], None]


class _Recorder:
    """Stands in a block in place of a dense layer, and takes note of its inputs."""

    def __init__(self, layer: LinearLayer, path: Path, found: dict, seen: dict):
        self.layer, self.path, self.found, self.seen = layer, path, found, seen

    def __call__(self, x: jax.Array) -> jax.Array:
        axes = len(self.layer.inputs)
        # Queries, keys and values read one array: its sums are taken once.
        if (key := (id(x), axes)) not in self.seen:
            self.seen[key] = x, InputMoments.of(x, axes)
        self.found[self.path] = self.seen[key][1]
        return self.layer(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class _Captured(Exception):
    """Signal with all that the blocks of a stack were about to read."""

    def __init__(self, blocks: Blocks, x: jax.Array, mask: Any, tables: Any):
        self.blocks, self.inputs = blocks, (x, mask, tables)


@dataclasses.dataclass(frozen=True)
class BlockStack:
    """One stack of blocks on the way through a model.

    Attributes:
      prefix: of its parameters' paths: (), or ("encoder",).
    """

    prefix: Path

    def read(self, params: dict) -> dict:
        """The parameters of its blocks, stacked."""
        for name in self.prefix:
            params = params[name]
        return params["blocks"]


def stacks_of(config: TransformerConfig) -> tuple[BlockStack, ...]:
    """The stacks of a model in the order in which they run."""
    return (BlockStack(("encoder",)),) * isinstance(config, EncoderDecoderConfig) + (
        BlockStack(()),
    )


def batches_of(config: TransformerConfig, rows: Int[np.ndarray, "rows length"]) -> Iterator[Batch]:
    """Batches of whole rows; an encoder reads the same rows as its decoder."""
    for first in range(0, len(rows), BATCH):
        batch = plain_batch(rows[first : first + BATCH])
        if isinstance(config, EncoderDecoderConfig):
            batch = dataclasses.replace(batch, encoder=batch)
        yield batch


def walk(
    config: TransformerConfig,
    params: dict,
    stack: BlockStack,
    batches: Sequence[Batch],
    change: Change,
    after: bool = True,
    see: See | None = None,
    experts: bool = False,
) -> None:
    """Runs a stack on batches layer by layer, and tells the inputs of its dense layers.

    Args:
      config: of the model; its weights are float32.
      params: of the whole model.
      stack: which of its stacks.
      batches: rows of one length without padding.
      change: is told the moments of each entry of the stack; gives its new parameters, or None.
      after: whether what comes behind an entry sees the new parameters.
      see: is shown the residual stream before and after each entry, batch by batch.
      experts: whether the layers of experts are told too, which takes all experts of all tokens.
    """
    layout = training_layout()
    model = nnx.merge(abstract(config, layout)[0], params)

    def capture(blocks, x, mask, tables, cache):
        raise _Captured(blocks, x, mask, tables)

    part = model
    for name in stack.prefix:
        part = getattr(part, name)
    part.executor = capture
    states, blocks = [], None
    for batch in batches:
        on_devices = jax.tree.map(lambda a: layout.reshard(jnp.asarray(a), "batch", "seq"), batch)
        try:
            model(on_devices)
        except _Captured as captured:
            blocks = captured.blocks
            states.append(captured.inputs)
    windows, group = blocks.windows, blocks.group
    for entry in range(len(windows) // group):
        own = entry_of(blocks.params, entry)
        kind = windows[entry * group : (entry + 1) * group]
        run = functools.partial(_run, blocks.graph, group, kind, experts)
        total, outputs = None, []
        for x, mask, tables in states:
            y, found = run(own, x, mask, tables)
            outputs.append(y)
            if see is not None:
                see(entry, x, y)
            total = found if total is None else _sum(total, found)
        changed = change(entry, total)
        if changed is not None and after:
            outputs = [run(changed, *state)[0] for state in states]
        states = [(y, *state[1:]) for y, state in zip(outputs, states, strict=True)]


@jax.jit
def _sum(one: dict, other: dict) -> dict:
    return {path: one[path].plus(other[path]) for path in one}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
    graph: nnx.GraphDef,
    group: int,
    windows: tuple[int | None, ...],
    experts: bool,
    params: Any,
    x: jax.Array,
    mask: Any,
    tables: Any,
) -> tuple[jax.Array, dict]:
    """The output of an entry, and moments by layer.

    Args:
      graph: structure of the entry.
      group: its number of layers; see `Blocks`.
      windows: of these layers.
      experts: see `walk`.
      params: of the entry.
      x: what it reads, with its mask and tables.
    """
    found: dict[Path, InputMoments] = {}
    entry = nnx.merge(graph, params)
    _record(entry, found, {}, experts)
    for member, window in enumerate(windows):
        block = entry if group == 1 else entry.at(member)
        masked = dataclasses.replace(mask, window=window)
        x, _ = block(x, masked, tables, None, None)
    return x, found


def _record(entry: nnx.Module, found: dict, seen: dict, experts: bool) -> None:
    """Puts recorders in place of an entry's dense layers, and perhaps of its mixtures."""
    mixtures = [
        (tuple(map(str, path)), layer)
        for path, layer in nnx.iter_modules(entry)
        if experts and isinstance(layer, Experts)
    ]
    for dotted, layer in weighted_layers(entry).items():
        if isinstance(layer, LinearLayer):
            path = tuple(dotted.split("."))
            _put(entry, path, _Recorder(layer, path, found, seen))
    for path, layer in mixtures:
        _put(entry, path, ExpertsRecorder(layer, path, found))


def _put(entry: nnx.Module, path: Path, recorder: Any) -> None:
    """Puts a recorder at the path of a module of an entry."""
    *owners, last = path
    for name in owners:
        entry = getattr(entry, name)
    object.__setattr__(entry, last, recorder)
