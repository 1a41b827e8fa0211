"""The learner: a model with its loss and its optimizer, and the step that trains it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt32

from lmjax.models import TransformerConfig, abstract, draw_parameters
from lmjax.models.auxiliary import Auxiliary
from lmjax.models.executor import Executor, scan_blocks
from lmjax.objectives import Example, Objective, Sums
from lmjax.objectives.example import batches, count_real_tokens, count_rows, count_tokens
from lmjax.parallel import STAGE, Layout, axis_size
from lmjax.training.compiler_options import step_options
from lmjax.training.gradients import (
    Zero,
    accumulated,
    count_parts,
    divided,
    summed,
)
from lmjax.training.loss_scale import LossScale, factor_of, where
from lmjax.training.offload import Place, at_rest, at_work, shapes_at_rest
from lmjax.training.optimizers import Optimizer, clip_by_global_norm
from lmjax.training.pipelining import Pipeline, pipeline_gradients, pipeline_sums
from lmjax.training.rounding import Stored, exact, stored
from lmjax.training.schedules import Rate
from lmjax.training.state import TrainState
from lmjax.training.trainable import parameter_paths
from lmjax.training.trained_part import TrainedPart, join_trained
from lmjax.training.zeros import with_zeros

Metrics = dict[str, Float[Array, ""]]
ROUNDING = 1 << 30  # in the key of a step: what rounds parameters
# Of programs that run once, of which compilation takes most of the time.
QUICK = {"xla_backend_optimization_level": 1}
AUXILIARY = "auxiliary"  # beside the parameters that are differentiated: takes auxiliary losses


def _draw(model: TransformerConfig, layout: Layout, seed: UInt32[Array, ""]) -> dict:
    """Parameters that training begins with."""
    draw_key, _ = jax.random.split(jax.random.key(seed))
    return draw_parameters(model, layout, draw_key)


_drawn = jax.jit(_draw, static_argnums=(0, 1), compiler_options=QUICK)


@dataclasses.dataclass(frozen=True)
class Learner:
    """Everything that turns examples into updates of a model's parameters.

    A mesh must be set. Needs no devices: `abstract` and tracing `step` work on an abstract mesh.

    Attributes:
      model: config of the model that is trained.
      objective: what is minimised.
      optimizer: turns clipped gradients into updates.
      rate: learning rate by 0-based step.
      layout: how parameters and examples are sharded over the mesh.
      clip: largest global gradient norm; None leaves gradients as they are.
      microbatch: most rows that are computed at once; None: all rows of an example.
      microbatch_tokens: most tokens of them, of all batches of an example, where rows may be longer
        than those that `microbatch` counts (packed replies); None: rows alone count.
      zero: ZeRO stage; see `accumulated`.
      pipeline: order in which the stages of the mesh work, where it has several.
      average_decay: decay of the moving average of the parameters; None keeps none.
      weights: how the parameters are stored from step to step; see `lmjax.training.rounding`.
      optimizer_memory: where the optimizer's state lies between steps.
      loss_scale: of a dynamic loss scaling; None: the loss is differentiated as it is.
      embedding_gradient: by step, the factor of the gradient of the token embeddings as they enter
        the model; that of a tied head stays whole. None: 1.
      trained: the part of the parameters that is trained. The others have no optimizer state.
      keep_zeros: weights of dense layers that are 0 stay so (`lmjax.training.zeros`).
      frozen: structure of each model that the objective reads beside the trained one, by name.
      begun: names of those of them that are this model as its training began. Of their parameters
        only those that are trained are given (`TrainedPart.of`); the rest are those of the state.
    """

    model: TransformerConfig
    objective: Objective
    optimizer: Optimizer
    rate: Rate
    layout: Layout
    clip: float | None = 1.0
    microbatch: int | None = None
    microbatch_tokens: int | None = None
    zero: Zero = 3
    pipeline: Pipeline = dataclasses.field(default_factory=Pipeline)
    average_decay: float | None = None
    weights: Stored = "float32"
    optimizer_memory: Place = "device"
    loss_scale: LossScale | None = None
    embedding_gradient: Rate | None = None
    trained: TrainedPart = dataclasses.field(default_factory=TrainedPart)
    keep_zeros: bool = False
    frozen: Mapping[str, nnx.GraphDef] = dataclasses.field(default_factory=dict)
    begun: frozenset[str] = frozenset()

    @functools.cached_property
    def graph(self) -> nnx.GraphDef:
        """Structure of the model."""
        return abstract(self.model, self.layout)[0]

    @functools.cached_property
    def transform(self) -> optax.GradientTransformation:
        """The optimizer with its learning rates.

        Raises:
          UserError: the optimizer does not fit the parameters or the mesh.
        """
        _, shapes = abstract(self.model, self.layout)
        return self.optimizer.build(self.rate, self.trained.shapes(shapes))

    def init(self, seed: int, params: dict | None = None) -> TrainState:
        """State before the first step; every array is made on its own devices.

        Args:
          seed: of the parameters, and of the randomness of all steps.
          params: what training begins with, given up; None: parameters drawn at random.
        """
        if params is None and self.weights == "float32":
            # By a program that learners of one model share; weights that are rounded shall never
            # be there in float32 as a whole.
            # A key has the last 32 bits of its seed.
            params = _drawn(self.model, self.layout, np.uint32(seed % (1 << 32)))
        return self._compiled_init(seed, params)

    def abstract(self) -> TrainState:
        """State as shapes with shardings, as a checkpoint is restored to."""
        _, params = abstract(self.model, self.layout)
        state = jax.eval_shape(functools.partial(self._init, 0), params)
        optimizer = shapes_at_rest(state.optimizer, self.optimizer_memory)
        return dataclasses.replace(state, optimizer=optimizer)

    def step(
        self, state: TrainState, example: Example, frozen: Mapping[str, dict] | None = None
    ) -> tuple[TrainState, Metrics]:
        """Updates the state by one example; metrics stay on the devices.

        Args:
          state: before the step.
          example: on the devices.
          frozen: parameters of each model of `self.frozen`; see `begun`.
        """
        key = jax.random.fold_in(state.key, state.step)
        before = dataclasses.replace(
            state, optimizer=at_work(state.optimizer, self.optimizer_memory)
        )
        state = dataclasses.replace(before, params=exact(before.params))
        gradients, sums = self.gradients(state, example, key, frozen)
        # One normaliser for the whole batch: any accumulation and any mesh give the same number.
        # A batch without targets gives gradients of zero, not NaN.
        weight = jnp.where(sums.weight > 0, sums.weight, 1)
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        trained, rest = self.trained.split(state.params)
        if self.keep_zeros:
            gradients = with_zeros(gradients, trained)
        with jax.named_scope("optimizer"):
            gradients, norm = clip_by_global_norm(gradients, self.clip)
            updates, optimizer = self.transform.update(gradients, state.optimizer, trained)
            updated = optax.apply_updates(trained, updates)
            if self.keep_zeros:
                updated = with_zeros(updated, trained)
            params = join_trained(updated, rest)
        average = state.average
        if self.average_decay is not None:
            average = optax.incremental_update(params, average, 1 - self.average_decay)
        params = stored(params, self.weights, jax.random.fold_in(key, ROUNDING))
        new = TrainState(params, optimizer, average, state.step + 1, state.key)
        rate, scaling = state.step, {}
        if self.loss_scale is not None:
            rate = state.step - state.scale.skipped  # the optimizer counts the steps that it does
            new, norm, scaling = self._sound(before, new, norm)
        new = dataclasses.replace(new, optimizer=at_rest(new.optimizer, self.optimizer_memory))
        counts = self.objective.counts
        metrics = {
            "loss": sums.loss / weight,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(self.rate(rate), jnp.float32),
            **scaling,
            # Rows of comparisons have few targets: the speed is that of the tokens that are read.
            **({} if counts == "tokens" else {"tokens": count_real_tokens(example)}),
            counts: sums.weight,
            **{name: value / weight for name, value in sums.extra.items()},
        }
        return new, metrics

    def _sound(
        self, state: TrainState, new: TrainState, norm: Float[Array, ""]
    ) -> tuple[TrainState, Float[Array, ""], Metrics]:
        """The state after a step that is skipped where its gradient overflows.

        Also the norm, 0 for a step that is skipped, and metrics of the scale.
        """
        sound = jnp.isfinite(norm)
        changed = "params", "optimizer", "average"
        kept = {name: where(sound, getattr(new, name), getattr(state, name)) for name in changed}
        scale = self.loss_scale.update(state.scale, sound)
        shown = jnp.where(sound | self.loss_scale.gives_up(state.scale, sound), norm, 0.0)
        metrics = {"loss_scale": state.scale.value, "skipped_steps": scale.skipped}
        return dataclasses.replace(new, scale=scale, **kept), shown, metrics

    def gradients(
        self,
        state: TrainState,
        example: Example,
        key: jax.Array,
        frozen: Mapping[str, dict] | None = None,
    ) -> tuple[dict, Sums]:
        """Gradients of the summed loss by the trained parameters, and the batch's sums."""
        (trained, rest), graph = self.trained.split(state.params), self.graph
        factor = None if self.embedding_gradient is None else self.embedding_gradient(state.step)
        scale = None if state.scale is None else factor_of(state.scale, count_tokens(example))
        if (auxiliary := self._auxiliary(example)) is not None:
            trained = {**trained, AUXILIARY: auxiliary}

        def loss(
            trained: dict, example: Example, key: jax.Array, frozen: Any, executor=scan_blocks
        ) -> Sums:
            own = {name: leaf for name, leaf in trained.items() if name != AUXILIARY}
            model = nnx.merge(graph, join_trained(own, rest))
            model.embedding_gradient, model.executor = factor, executor
            model.frozen_blocks = self.trained.first * self.model.group
            if auxiliary is not None:
                model.give_auxiliary(trained[AUXILIARY])
            return _times(self._loss(model, example, key, self._frozen_models(frozen, rest)), scale)

        def loss_by(params: dict, example: Example, key: jax.Array, executor: Executor) -> Sums:
            return loss(params, example, key, None, executor)

        most = self.microbatch, self.microbatch_tokens
        microbatches = count_parts(example, *most, self.layout)
        example = self.objective.normalise(example)
        if axis_size(STAGE) > 1:
            made = self.pipeline.made(microbatches)
            found, sums = pipeline_gradients(loss_by, trained, example, key, made, self.zero)
        else:
            if microbatches > 1:
                example = self._with_batch_sums(state.params, example, frozen, microbatches)
            found, sums = accumulated(loss, trained, example, key, frozen, microbatches, self.zero)
        if scale is not None:
            found, sums = jax.tree.map(lambda g: g / scale, found), _times(sums, 1 / scale)
        if auxiliary is not None:
            sums = _with_measures(sums, self.model.feed_forward.measures(found.pop(AUXILIARY).tap))
        return found, sums

    def evaluate(
        self, params: dict, example: Example, frozen: Mapping[str, dict] | None = None
    ) -> Sums:
        """Sums of the loss without dropout."""
        example, graph = self.objective.normalise(example), self.graph
        params = exact(params)
        rest = self.trained.split(params)[1]

        def loss(params: dict, example: Example, key: None, executor: Executor) -> Sums:
            model = nnx.merge(graph, params)
            model.executor = executor
            return self._loss(model, example, key, self._frozen_models(frozen, rest))

        if axis_size(STAGE) > 1 and not self.frozen:
            rows = count_rows(example) // axis_size(*self.layout.axes("batch"))
            return pipeline_sums(loss, params, example, math.gcd(rows, 4 * axis_size(STAGE)))
        return loss(params, example, None, scan_blocks)

    @functools.cached_property
    def compiled_step(self) -> Callable[..., tuple[TrainState, Metrics]]:
        """`step`, compiled; it takes over (donates) the state that it is given."""
        return jax.jit(self.step, donate_argnums=0, compiler_options=step_options())

    def compile_step(self, example: Example, frozen: Mapping[str, dict] | None = None) -> None:
        """Compiles `compiled_step` for states of this learner and examples of these shapes.

        Its first call then finds the program. May run in a thread, with the mesh set there too.

        Args:
          example: arrays or shapes, with specs of the mesh that is set.
          frozen: likewise; see `step`.
        """
        mesh = jax.sharding.get_mesh()

        def on_mesh(a: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            spec = a.sharding.spec if a.sharding else PartitionSpec()  # numbers lie everywhere
            kind = getattr(a.sharding, "memory_kind", None)
            sharding = NamedSharding(mesh, spec, memory_kind=kind)
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

        given = (self.abstract(), example) if frozen is None else (self.abstract(), example, frozen)
        self.compiled_step.lower(*jax.tree.map(on_mesh, given)).compile()

    @functools.cached_property
    def compiled_evaluate(self) -> Callable[..., Sums]:
        """`evaluate`, compiled."""
        return jax.jit(self.evaluate)

    @property
    def trains_all(self) -> bool:
        """Returns whether every parameter is trained."""
        if self.trained.trains is None:
            return True
        return self.trained.is_all(parameter_paths(self.model, self.layout))

    @property
    def keeps_rest(self) -> bool:
        """Returns whether some parameters stay, bit for bit, those that training began with.

        None do where all are averaged, or rounded as they are stored.
        """
        return not self.trains_all and self.average_decay is None and self.weights == "float32"

    def evaluated(self, state: TrainState) -> dict:
        """Parameters that are evaluated: the average where one is kept."""
        return state.params if self.average_decay is None else state.average

    def _auxiliary(self, example: Example) -> Auxiliary | None:
        """Takes auxiliary losses of all layers, the decoder's first; None: the model has none.

        Where every second layer is sparse, of these.

        They are means over the tokens that a layer reads: the gradient, which is divided by the
        weight of all targets, has the sums times that weight over the number of those tokens.
        """
        config = self.model
        if not (width := config.feed_forward.auxiliary_sums):
            return None
        encoders = [batch.encoder for batch in batches(example) if batch.encoder is not None]
        read = [count_real_tokens(example)] * (config.num_layers // config.group)
        if layers := config.depth - config.num_layers:
            read += [count_real_tokens(Example(encoders, None))] * (layers // config.group)
        tokens, weight = jnp.stack(read), self.objective.weight(example)
        factor = weight / jnp.where(tokens > 0, tokens, 1)
        return Auxiliary(factor, jnp.zeros((len(read), width), jnp.float32))

    def _loss(self, model: nnx.Module, example: Example, key: jax.Array | None, frozen) -> Sums:
        with jax.named_scope(type(self.objective).__name__):
            return self.objective.loss(model, example, key, frozen)

    def _frozen_models(
        self, frozen: Mapping[str, dict] | None, rest: dict
    ) -> dict[str, nnx.Module] | None:
        """The models that the objective reads beside the trained one, of which `rest` is not."""
        models = {}
        for name, graph in self.frozen.items():
            own = frozen[name]
            models[name] = nnx.merge(graph, join_trained(own, rest) if name in self.begun else own)
        return models or None

    def _with_batch_sums(
        self, params: dict, example: Example, frozen: Mapping[str, dict] | None, microbatches: int
    ) -> Example:
        """The example with what the loss of a microbatch needs to know of the others."""
        rest = self.trained.split(params)[1]

        def sums(part: Example) -> Any:
            models = self._frozen_models(frozen, rest)
            return self.objective.batch_sums(nnx.merge(self.graph, params), part, models)

        found = summed(sums, divided(example, microbatches))
        return example if found is None else self.objective.with_batch_sums(example, found)

    @functools.cached_property
    def _compiled_init(self) -> Callable[..., TrainState]:
        return jax.jit(self._init, static_argnums=0, donate_argnums=1, compiler_options=QUICK)

    def _init(self, seed: int, params: dict | None) -> TrainState:
        draw_key, key = jax.random.split(jax.random.key(seed))
        if params is None:
            params = draw_parameters(self.model, self.layout, draw_key)
        return TrainState(
            params=stored(params, self.weights, jax.random.fold_in(key, ROUNDING)),
            optimizer=at_rest(self.transform.init(self.trained.of(params)), self.optimizer_memory),
            average=None if self.average_decay is None else jax.tree.map(jnp.copy, params),
            step=jnp.zeros((), jnp.int32),
            key=key,
            scale=None if self.loss_scale is None else self.loss_scale.init(),
        )


def _times(sums: Sums, factor: Float[Array, ""] | None) -> Sums:
    """Sums with the loss, which is differentiated, times a factor; None: 1."""
    return sums if factor is None else dataclasses.replace(sums, loss=sums.loss * factor)


def _with_measures(sums: Sums, measures: Metrics) -> Sums:
    """Sums with metrics of the whole batch, and with its auxiliary losses in the loss."""
    loss = sums.loss + measures["auxiliary_loss"] * sums.weight
    extra = {name: value * sums.weight for name, value in measures.items()}
    return dataclasses.replace(sums, loss=loss, extra={**sums.extra, **extra})
