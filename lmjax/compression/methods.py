"""Ways from a model of float weights to one of few bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Int

from lmjax.compression.calibration import batches_of, stacks_of, walk
from lmjax.compression.folding import fold, folds_of, is_cross
from lmjax.compression.gptq import gptq
from lmjax.compression.input_moments import InputMoments
from lmjax.compression.scaling_search import awq_scale, smoothing_scale
from lmjax.config import UserError, replace
from lmjax.models import Quantization, StaticInt8, TransformerConfig, with_quantization
from lmjax.models.integer_products import MOST
from lmjax.models.number_codes import IntegerCode
from lmjax.models.parameters import INPUT_SCALE, quantized_weights
from lmjax.models.quantized import WeightForm
from lmjax.models.weight_codes import Stored
from lmjax.parallel import training_layout

Method = Literal["nearest", "gptq", "awq", "smoothquant"]
Path = tuple[str, ...]
Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """Makes the weights of a model small.

    Attributes:
      quantization: how the weights are kept.
      method: how they are chosen.
      rows: token ids of texts, without padding; None where nothing is calibrated.
      damping: see `gptq`.
      by_activation: see `gptq`.
      alpha: see `smoothing_scale`.
      tell: is told what happens.
    """

    quantization: Quantization
    method: Method = "nearest"
    rows: Int[np.ndarray, "rows length"] | None = None
    damping: float = 0.01
    by_activation: bool = True
    alpha: float = 0.5
    tell: Tell = print

    def __call__(self, config: TransformerConfig, params: dict) -> tuple[dict, TransformerConfig]:
        """The parameters and the config of the small model.

        Args:
          config: of the model, whose weights are float32, without adapters.
          params: its parameters, blocks stacked; they are not given up.

        Raises:
          UserError: the method is not for such weights, or lacks rows.
        """
        static = isinstance(self.quantization.activations, StaticInt8)
        if (self.method != "nearest" or static) and self.rows is None:
            what = "activations=static" if self.method == "nearest" else f"method={self.method}"
            raise UserError(f"{what} needs texts: give calibration=FILE, a text file")
        chosen: dict[Path, list] = {}
        if self.method in ("awq", "smoothquant"):
            params = self.scaled(config, params)
        elif self.method == "gptq":
            if not isinstance(self.quantization.weights, IntegerCode):
                raise UserError("method=gptq: it is for integers; set weights=int8 or int4")
            chosen = self.rounded(config, params)
        small, after = with_quantization(params, config, self.quantization)
        if chosen:
            small = put_chosen(small, after, chosen)
        return (self.measured(after, small) if static else small), after

    def scaled(self, config: TransformerConfig, params: dict) -> dict:
        """The same model with scales moved from inputs into what makes them; see `fold`."""
        for stack in stacks_of(config):
            entries: list[dict] = []
            members = members_of(config)

            def change(entry: int, moments: dict[Path, InputMoments], *given) -> None:
                stacked, members, entries, cross = given
                block = jax.tree.map(lambda a: a[entry], stacked)
                for prefix, member in members:
                    part = dict(inner(block, prefix))
                    for one in folds_of(member, cross):
                        found = moments[(*prefix, *one.readers[0])]
                        weights = [matrix_of(part, reader) for reader in one.readers]
                        part = fold(part, one, self._scale(weights, found), member)
                    block = part if not prefix else block | {prefix[0]: part}
                self.tell(f"layer {entry + 1} is scaled")
                entries.append(block)

            given = stack.read(params), members, entries, is_cross(config, stack.prefix)
            if not any(folds_of(member, given[-1]) for _, member in members):
                raise UserError(
                    f"method={self.method}: no layer of the model reads what a scale can be moved"
                    " into; gptq and nearest need none"
                )
            walk(config, params, stack, self._batches(config), lambda *a, g=given: change(*a, *g))
            blocks = jax.tree.map(lambda *parts: jnp.stack(parts), *entries)
            blocks = jax.tree.map(
                lambda a, like: jax.reshard(a, jax.typeof(like).sharding.spec),
                blocks,
                stack.read(params),
            )
            params = with_part(params, (*stack.prefix, "blocks"), blocks)
        return params

    def _scale(self, weights: list[np.ndarray], moments: InputMoments) -> np.ndarray:
        if self.method == "awq":
            return awq_scale(weights, moments, self.quantization.weights)
        return smoothing_scale(weights, moments, self.alpha)

    def rounded(self, config: TransformerConfig, params: dict) -> dict[Path, list]:
        """Arrays that GPTQ keeps of dense layers' weights, by path, for each entry of the stack."""
        chosen: dict[Path, list] = {}
        for stack in stacks_of(config):
            stacked = stack.read(params)
            done: list[dict] = []

            def change(entry: int, moments: dict[Path, InputMoments], *given) -> dict:
                stack, stacked, done = given
                flat = traverse_util.flatten_dict(jax.tree.map(lambda a: a[entry], stacked))
                for path, found in moments.items():
                    if not self.quantization.keeps(".".join(path)):
                        continue
                    weight = flat[(*path, "weight")]
                    stored, value = self._by_gptq(weight, found)
                    spec = jax.typeof(weight).sharding.spec
                    flat[(*path, "weight")] = jax.reshard(value, spec)
                    name = (*stack.prefix, "blocks", *path, "weight")
                    chosen.setdefault(name, []).append(jax.device_get(stored))
                self.tell(f"layer {entry + 1} of {len(jax.tree.leaves(stacked)[0])} is rounded")
                done.append(traverse_util.unflatten_dict(flat))
                return done[-1]

            given = stack, stacked, done
            how = config, params, stack, self._batches(config)
            walk(*how, lambda *a, g=given: change(*a, *g), experts=True)
            # A decoder is calibrated on what the rounded encoder gives.
            if stack.prefix:
                blocks = jax.tree.map(lambda *parts: jnp.stack(parts), *done)
                params = with_part(params, (*stack.prefix, "blocks"), blocks)
        return chosen

    def _by_gptq(self, weight: jax.Array, moments: InputMoments) -> tuple[Stored, Any]:
        """Arrays that GPTQ keeps of a weight, or of each of a stack of experts; and their value."""
        code, size = self.quantization.weights, moments.magnitudes.shape[-1]
        matrices = on_host(weight).reshape(-1, size, weight.size // moments.magnitudes.size)
        seconds = moments.second.reshape(-1, size, size)
        how = code, self.damping, self.by_activation
        each = [gptq(one, second, *how) for one, second in zip(matrices, seconds, strict=True)]
        value = jnp.stack([code.decode(stored, 0, size) for stored in each]).reshape(weight.shape)
        stored = jax.tree.map(lambda *parts: jnp.stack(parts), *each)
        if moments.magnitudes.ndim == 1:
            stored = {name: array[0] for name, array in stored.items()}
        return stored, value

    def measured(self, config: TransformerConfig, params: dict) -> dict:
        """The parameters with scales of inputs by the largest that calibration finds."""
        plain, without = with_quantization(params, config, None)
        flat = traverse_util.flatten_dict(params)
        for stack in stacks_of(config):
            found: dict[Path, list] = {}

            def note(entry: int, moments: dict[Path, InputMoments], found=found) -> None:
                for path, own in moments.items():
                    largest = float(np.max(np.asarray(own.largest)))
                    found.setdefault((*path, INPUT_SCALE), []).append(largest / MOST)

            walk(without, plain, stack, self._batches(without), note)
            for path, scales in found.items():
                name = (*stack.prefix, "blocks", *path)
                if name in flat:
                    flat[name] = jnp.asarray(scales, jnp.float32)
        return traverse_util.unflatten_dict(flat)

    def _batches(self, config: TransformerConfig) -> list:
        return list(batches_of(config, self.rows))


def members_of(config: TransformerConfig) -> tuple[tuple[Path, TransformerConfig], ...]:
    """The blocks in an entry of the stack: path there, and config."""
    other = config.alternate_feed_forward
    if other is None:
        return (((), config),)
    same = replace(config, alternate_feed_forward=None)
    return (("first",), replace(same, feed_forward=other)), (("second",), same)


def inner(tree: dict, path: Path) -> Any:
    """A part of nested dictionaries."""
    for name in path:
        tree = tree[name]
    return tree


def matrix_of(block: dict, layer: Path) -> np.ndarray:
    """The weight of a dense layer of a block [inputs, outputs], on the host."""
    weight = on_host(inner(block, layer)["weight"]).astype(np.float64)
    inputs = weight.ndim - 1 if layer[-1] == "output" else 1
    return weight.reshape(int(np.prod(weight.shape[:inputs])), -1)


def put_chosen(params: dict, config: TransformerConfig, chosen: dict[Path, list]) -> dict:
    """The parameters with what was chosen of some weights in place of the nearest."""
    flat = traverse_util.flatten_dict(params)
    forms = quantized_weights(config)
    for path, layers in chosen.items():
        form = dataclasses.replace(forms[path], layout=training_layout())
        stored = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
        for name, array in _cut(stored, form).items():
            flat[(*path, name)] = array
    return traverse_util.unflatten_dict(flat)


@functools.partial(jax.jit, static_argnums=1)
def _cut(stored: Stored, form: WeightForm) -> Stored:
    """Arrays of [inputs, outputs] of a stack of weights as they are kept, cut over the mesh."""
    return jax.lax.map(lambda one: form.cut(form.turned(one)), stored)


def with_part(tree: dict, path: Path, value: Any) -> dict:
    """Nested dictionaries with another value at a path."""
    first, *rest = path
    return tree | {first: with_part(tree[first], tuple(rest), value) if rest else value}


def on_host(a: jax.Array | np.ndarray) -> np.ndarray:
    """An array of all devices, whole."""
    if isinstance(a, np.ndarray) or a.is_fully_addressable:
        return np.asarray(a)
    return np.asarray(jax.reshard(a, jax.sharding.PartitionSpec()))
