"""Everything that training changes, in one value."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Int, PRNGKeyArray

from lmjax.models import TransformerConfig, abstract, draw_parameters
from lmjax.models.batch import Array
from lmjax.parallel import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters and what comes with them.

    Attributes:
      params: nested dict of float32 arrays.
      optimizer: the optax state, sharded as the parameters are.
      average: moving average of the parameters; None where none is kept.
      step: number of updates done.
      key: base of all randomness; step t uses fold_in(key, t).
    """

    params: Any
    optimizer: Any
    average: Any
    step: Int[Array, ""]
    key: PRNGKeyArray | jax.ShapeDtypeStruct


def make_state(
    config: TransformerConfig,
    layout: Layout,
    transform: optax.GradientTransformation,
    seed: int,
    average: bool = False,
    params: dict | None = None,
) -> TrainState:
    """The state before the first step; every array is born on its own devices.

    Training begins with `params`, which are given up, or with parameters that are drawn.
    """
    draw = jax.jit(
        lambda params: _draw_state(config, layout, transform, seed, average, params),
        donate_argnums=0,
        # It runs once, and what takes time is to compile it.
        compiler_options={"xla_backend_optimization_level": 1},
    )
    return draw(params)


def abstract_state(
    config: TransformerConfig,
    layout: Layout,
    transform: optax.GradientTransformation,
    seed: int,
    average: bool = False,
) -> tuple[nnx.GraphDef, TrainState]:
    """The model's structure, and the state as shapes with shardings: what a restore aims at."""
    graph, params = abstract(config, layout)
    make = functools.partial(_draw_state, config, layout, transform, seed, average)
    return graph, jax.eval_shape(make, params)


def _draw_state(config, layout, transform, seed, average, params=None) -> TrainState:
    draw_key, key = jax.random.split(jax.random.key(seed))
    if params is None:
        params = draw_parameters(config, layout, draw_key)
    return TrainState(
        params=params,
        optimizer=transform.init(params),
        average=jax.tree.map(jnp.copy, params) if average else None,
        step=jnp.zeros((), jnp.int32),
        key=key,
    )
