"""One training step, and one evaluation step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lmjax.config import UserError
from lmjax.models import Batch
from lmjax.objectives import Objective, Sums
from lmjax.parallel import axis_size, training_layout
from lmjax.training.optimizers import clip_by_global_norm
from lmjax.training.schedules import Rate
from lmjax.training.state import TrainState

Zero = Literal[1, 2, 3]
Metrics = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """(state, batch) -> (state, metrics), as one function to be jitted.

    Attributes:
      graph: structure of the model.
      objective: what is minimised.
      transform: turns clipped gradients into updates.
      schedule: learning rate of each step, for the metrics (the transform has it inside).
      clip: largest global gradient norm; None leaves gradients as they are.
      accumulation: parts that the batch's rows are cut into, one after another.
      full_rows: rows of the batch that is cut so; a smaller one is cut into as few parts as keeps
        them no larger (`count_parts`). None: every batch is cut into the same number.
      zero: when parameters sharded over `fsdp` are gathered. 3: each layer where it is used, in
        forward and again in backward; 1 and 2: all of them once a step. Under accumulation 2 keeps
        the summed gradient cut over `fsdp`, 1 keeps it whole (Rajbhandari et al. 2020).
      average_decay: decay of the moving average of the parameters; None keeps none.
      embedding_gradient: by step, what the gradient of the token embeddings is multiplied by, as
        they enter the model; that of a tied head stays whole. None: nothing.
    """

    graph: nnx.GraphDef
    objective: Objective
    transform: optax.GradientTransformation
    schedule: Callable
    clip: float | None = 1.0
    accumulation: int = 1
    full_rows: int | None = None
    zero: Zero = 3
    average_decay: float | None = None
    embedding_gradient: Rate | None = None

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update of the state by a batch; metrics stay on the device."""
        key = jax.random.fold_in(state.key, state.step)
        shrink = None if self.embedding_gradient is None else self.embedding_gradient(state.step)
        gradients, sums = self.gradients(state.params, batch, key, shrink)
        # One normaliser for the whole batch: any accumulation and any mesh give the same number.
        # A batch that happens to hold no target teaches nothing, and no NaN either.
        weight = jnp.where(sums.weight > 0, sums.weight, 1)
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        with jax.named_scope("optimizer"):
            gradients, norm = clip_by_global_norm(gradients, self.clip)
            updates, optimizer = self.transform.update(gradients, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        average = state.average
        if self.average_decay is not None:
            average = optax.incremental_update(params, average, 1 - self.average_decay)
        metrics = {
            "loss": sums.loss / weight,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(self.schedule(state.step), jnp.float32),
            "tokens": sums.weight,
            **{name: value / weight for name, value in sums.extra.items()},
        }
        return TrainState(params, optimizer, average, state.step + 1, state.key), metrics

    def gradients(
        self, params: dict, batch: Batch, key: jax.Array, shrink: Float[Array, ""] | None = None
    ) -> tuple[dict, Sums]:
        """Gradients of the summed loss, sharded as the parameters, and the batch's sums.

        That of the token embeddings is multiplied by `shrink`.
        """
        weights = jax.tree.map(without_fsdp, params) if self.zero < 3 else params
        rows, number = len(batch.tokens), self.accumulation
        if self.full_rows is not None:
            number = count_parts(rows, self.full_rows // number)
        if number == 1:
            gradients, sums = self._part(weights, batch, key, shrink)
            return _scatter(gradients, params), sums

        def part(batch, key):
            gradients, sums = self._part(weights, batch, key, shrink)
            return (_scatter(gradients, params) if self.zero == 2 else gradients), sums

        def add(total, inputs):
            return jax.tree.map(jnp.add, total, part(*inputs)), None

        def split(a: jax.Array) -> jax.Array:  # strided, so that no row changes its device
            return jnp.moveaxis(a.reshape(-1, number, *a.shape[1:]), 1, 0)

        parts = jax.tree.map(split, batch), jax.random.split(key, number)
        shapes = jax.eval_shape(part, *jax.tree.map(lambda a: a[0], parts))
        total = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype, out_sharding=a.sharding.spec), shapes
        )
        (gradients, sums), _ = jax.lax.scan(add, total, parts)
        return _scatter(gradients, params), sums

    def _part(
        self, weights: dict, batch: Batch, key: jax.Array, shrink: Float[Array, ""] | None
    ) -> tuple[dict, Sums]:
        def loss(weights):
            model = nnx.merge(self.graph, weights)
            model.embedding_gradient = shrink
            with jax.named_scope(type(self.objective).__name__):
                sums = self.objective.loss(model, batch, key)
            return sums.loss, sums

        gradients, sums = jax.grad(loss, has_aux=True)(weights)
        return gradients, sums


def count_parts(rows: int, most: int) -> int:
    """Into how few equal parts of at most `most` rows the devices can share a batch.

    Raises:
      UserError: the rows do not divide among the devices, or not into parts so small.
    """
    shards = axis_size(*training_layout().axes("batch"))
    for number in range(-(-rows // most), rows // shards + 1):
        if rows % (number * shards) == 0:
            return number
    raise UserError(
        f"a batch of {rows} rows does not divide into parts of at most {most} (the largest batch "
        f"over accumulation) on mesh.data x mesh.fsdp = {shards} devices"
    )


def make_train_step(**parts) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled `TrainStep`; it takes over (donates) the state that it is given."""
    return jax.jit(TrainStep(**parts), donate_argnums=0)


def make_evaluation_step(
    graph: nnx.GraphDef, objective: Objective
) -> Callable[[dict, Batch], Sums]:
    """(params, batch) -> sums without dropout, compiled."""
    return jax.jit(lambda params, batch: objective.loss(nnx.merge(graph, params), batch, None))


def without_fsdp(a: jax.Array) -> jax.Array:
    """The array gathered over `fsdp` and still cut over every other axis."""
    spec = jax.typeof(a).sharding.spec
    return jax.reshard(a, PartitionSpec(*(None if entry == "fsdp" else entry for entry in spec)))


def _scatter(gradients: dict, params: dict) -> dict:
    """Gradients cut as the parameters are."""
    return jax.tree.map(lambda g, p: jax.reshard(g, jax.typeof(p).sharding.spec), gradients, params)
