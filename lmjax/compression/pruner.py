"""Zeros among the weights of a model's dense layers, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Int

from lmjax.compression.calibration import BlockStack, Path, batches_of, stacks_of, walk
from lmjax.compression.input_moments import InputMoments
from lmjax.compression.methods import Tell, on_host, with_part
from lmjax.compression.sparsity import Sparsity, magnitude, sparsegpt, wanda
from lmjax.config import UserError
from lmjax.models import TransformerConfig, abstract
from lmjax.models.linear import LinearLayer
from lmjax.models.lora import fits
from lmjax.models.quantization import weighted_layers
from lmjax.parallel import training_layout

PruningMethod = Literal["magnitude", "wanda", "sparsegpt"]


@dataclasses.dataclass(frozen=True)
class Pruner:
    """Makes weights of a model zero.

    Attributes:
      method: which weights, and what becomes of the others.
      sparsity: of each layer.
      rows: token ids of texts, without padding; None where nothing is calibrated.
      matrices: dense layers of the blocks by last names or dotted paths; * is all of them.
      damping: see `sparsegpt`.
      tell: is told what happens.
    """

    method: PruningMethod
    sparsity: Sparsity
    rows: Int[np.ndarray, "rows length"] | None = None
    matrices: tuple[str, ...] = ("*",)
    damping: float = 0.01
    tell: Tell = print

    def __call__(self, config: TransformerConfig, params: dict) -> dict:
        """The parameters with zeros. Experts and routers stay as they are.

        Layers behind a pruned one are calibrated on what it gives.

        Args:
          config: of the model, whose weights are float32, without adapters.
          params: its parameters, blocks stacked; they are not given up.

        Raises:
          UserError: the method lacks rows, a pattern is for no layer, or inputs are no whole
            groups.
        """
        if self.method != "magnitude" and self.rows is None:
            raise UserError(f"method={self.method} needs texts: give calibration=FILE, a text file")
        for stack in stacks_of(config):
            chosen = self.chosen(dense_layers(config, stack))
            stacked, done = stack.read(params), []
            run = self._by_texts if self.rows is not None else self._by_weights
            run(config, params, stack, lambda *given, c=chosen, d=done: self._change(*given, c, d))
            specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, stacked)
            params = with_part(params, (*stack.prefix, "blocks"), _stack(done, specs))
        return params

    def chosen(self, layers: dict[Path, LinearLayer]) -> dict[Path, LinearLayer]:
        """Those of the layers that get zeros. UserError: a pattern is for none."""
        names = {path: "blocks." + ".".join(path) for path in layers}
        for pattern in self.matrices:
            if not any(fits(name, pattern) for name in names.values()):
                known = ", ".join(".".join(path) for path in layers)
                raise UserError(f"matrices: {pattern!r} is for no dense layer; there are {known}")
        return {
            path: layer
            for path, layer in layers.items()
            if any(fits(names[path], pattern) for pattern in self.matrices)
        }

    def pruned(self, weight: np.ndarray, moments: InputMoments | None) -> np.ndarray:
        """A matrix [inputs, outputs] with zeros."""
        if self.method == "magnitude":
            return magnitude(weight, self.sparsity)
        if self.method == "wanda":
            return wanda(weight, moments.second, self.sparsity)
        return sparsegpt(weight, moments.second, self.sparsity, self.damping)

    def _by_texts(
        self, config: TransformerConfig, params: dict, stack: BlockStack, change: Callable
    ) -> None:
        stacked, batches = stack.read(params), list(batches_of(config, self.rows))
        walk(config, params, stack, batches, lambda *given: change(stacked, *given))

    def _by_weights(
        self, config: TransformerConfig, params: dict, stack: BlockStack, change: Callable
    ) -> None:
        stacked = stack.read(params)
        for entry in range(len(jax.tree.leaves(stacked)[0])):
            change(stacked, entry, {})

    def _change(
        self,
        stacked: dict,
        entry: int,
        moments: dict[Path, InputMoments],
        chosen: dict[Path, LinearLayer],
        done: list[dict],
    ) -> Any:
        """Prunes an entry of the stack; see `Change`."""
        flat = traverse_util.flatten_dict(jax.tree.map(lambda a: a[entry], stacked))
        for path, layer in chosen.items():
            weight = flat[(*path, "weight")]
            inputs = int(np.prod(weight.shape[: len(layer.inputs)]))
            matrix = on_host(weight).astype(np.float64).reshape(inputs, -1)
            try:
                value = self.pruned(matrix, moments.get(path))
            except UserError as error:
                raise UserError(f"{'.'.join(path)}: {error}") from None
            value = jnp.asarray(value.reshape(weight.shape), jnp.float32)
            flat[(*path, "weight")] = jax.reshard(value, jax.typeof(weight).sharding.spec)
        self.tell(f"layer {entry + 1} of {len(jax.tree.leaves(stacked)[0])} is pruned")
        done.append(traverse_util.unflatten_dict(flat))
        return done[-1]


def dense_layers(config: TransformerConfig, stack: BlockStack) -> dict[Path, LinearLayer]:
    """The dense layers of an entry of a stack, by path."""
    graph, shapes = abstract(config, training_layout())
    part = nnx.merge(graph, shapes)
    for name in stack.prefix:
        part = getattr(part, name)
    found = weighted_layers(part.blocks)
    return {
        tuple(path.split(".")): layer
        for path, layer in found.items()
        if isinstance(layer, LinearLayer)
    }


def _stack(entries: list[Any], specs: Any) -> Any:
    """Parameters of all entries as a stack, cut over the mesh."""

    @jax.jit
    def stack(entries):
        whole = jax.tree.map(lambda *parts: jnp.stack(parts), *entries)
        return jax.tree.map(jax.reshard, whole, specs)

    return stack(entries)
