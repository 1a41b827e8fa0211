"""Everything that training changes, in one value."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters and what comes with them.

    Attributes:
      params: nested dict of float32 arrays.
      optimizer: the optax state, sharded as the parameters are.
      average: moving average of the parameters; None where none is kept.
      step: number of updates done, an int32 number.
      key: base of all randomness; step t uses fold_in(key, t).
      scale: of the loss, a `lmjax.training.loss_scale.Scale`; None where it is not scaled.
    """

    params: Any
    optimizer: Any
    average: Any
    step: Any  # also what jax's own trees hold in its place
    key: Any
    scale: Any = dataclasses.field(default=None, kw_only=True)
