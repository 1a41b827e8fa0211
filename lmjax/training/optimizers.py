"""Optimizers: AdamW, Adafactor, Lion and Muon, put together from optax's parts.

A config holds only what is the optimizer's own. The learning rate is a schedule beside it, clipping
is `clip_by_global_norm`, so that `optimizer=Lion` on the command line changes nothing else.

Parameters are a nested dict in which the last name on the way to a leaf says whether it is a matrix
or a vector (`lmjax.training.matrices`). Only matrices decay. An optimizer that looks at a whole
matrix (Adafactor, Muon) looks at each layer's alone, as [inputs, outputs].
"""

import abc
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from lmjax.config import UserError, config
from lmjax.training.matrices import (
    Path,
    decayed,
    in_blocks,
    is_matrix,
    layerwise,
    on_matrices,
    orthogonalize,
)
from lmjax.training.rounding import Stored, stored_in
from lmjax.training.schedules import Rate


@config
class Optimizer(abc.ABC):
    """Turns gradients into updates of the parameters."""

    @abc.abstractmethod
    def build(self, schedule: Rate, params: PyTree) -> optax.GradientTransformation:
        """The optimizer as an optax transformation whose updates are to be added.

        Its state lies sharded as the parameters do.

        Args:
          schedule: learning rate by 0-based step.
          params: the parameters, or their shapes.

        Raises:
          ValueError: a leaf whose name does not say whether it is a matrix.
        """


@config
class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv 1711.05101).

    Decay to the start pulls each matrix to its value before the first step, as L2-SP does (Li et
    al. 2018, arXiv:1802.01483), decoupled from Adam's moments: W - rate weight_decay (W - W_0). The
    state then holds W_0 too.
    """

    b1: float = 0.9  # decay of the mean of gradients
    b2: float = 0.95  # decay of the mean of squared gradients
    epsilon: float = 1e-8  # added to the root of the mean square
    weight_decay: float = 0.1  # of matrices, times the learning rate
    decay_to: Literal["zero", "start"] = "zero"  # where decay pulls them: 0, or their first value
    moments: Stored = "float32"  # how running means are stored; see lmjax.training.rounding

    def validate(self) -> None:
        """Raises UserError for numbers with which the method is undefined."""
        _check_shares(self, "b1", "b2")
        _check_positive(self, "epsilon")
        _check_decay(self)

    def build(self, schedule: Rate, params: PyTree) -> optax.GradientTransformation:
        """See `Optimizer.build`."""
        decay = optax.add_decayed_weights if self.decay_to == "zero" else add_decay_to_start
        return optax.chain(
            stored_in(optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.epsilon), self.moments),
            decay(self.weight_decay, mask=decayed(params)),
            optax.scale_by_learning_rate(schedule),
        )


@config
class Lion(Optimizer):
    """The sign of an interpolated momentum (arXiv 2302.06675); wants 3 to 10 times less rate."""

    b1: float = 0.9  # share of the momentum in the update's sign
    b2: float = 0.99  # decay of the momentum
    weight_decay: float = 0.3  # of matrices, times the learning rate
    moments: Stored = "float32"  # how running means are stored; see lmjax.training.rounding

    def validate(self) -> None:
        """Raises UserError for numbers with which the method is undefined."""
        _check_shares(self, "b1", "b2")
        _check_decay(self)

    def build(self, schedule: Rate, params: PyTree) -> optax.GradientTransformation:
        """See `Optimizer.build`."""
        return optax.chain(
            stored_in(optax.scale_by_lion(b1=self.b1, b2=self.b2), self.moments),
            optax.add_decayed_weights(self.weight_decay, mask=decayed(params)),
            optax.scale_by_learning_rate(schedule),
        )


@config
class Adafactor(Optimizer):
    """Second moments by rows and columns (arXiv 1804.04235): little memory beside the weights."""

    decay_rate: float = 0.8  # second moments decay by 1 - t^-decay_rate
    factored: bool = True  # keep means by row and column instead of every square
    smallest_factored: int = 128  # matrices with a shorter side than this are not factored
    clipping: float | None = 1.0  # limit of each update's root mean square; None: no limit
    scale_by_parameter: bool = True  # multiply updates by the parameter's root mean square
    momentum: float | None = None  # decay of a mean of updates; None: no momentum
    epsilon: float = 1e-30  # added to squared gradients
    weight_decay: float = 0.0  # of matrices, times the learning rate to the decay_exponent
    moments: Stored = "float32"  # how the mean of updates is stored; see lmjax.training.rounding
    decay_exponent: float = 1.0  # 2.0 with weight_decay=1.0 is PaLM's decay by the squared rate

    def validate(self) -> None:
        """Raises UserError for numbers with which the method is undefined."""
        _check_positive(self, "decay_rate", "smallest_factored", "epsilon")
        if self.clipping is not None:
            _check_positive(self, "clipping")
        if self.momentum is not None:
            _check_shares(self, "momentum")
        _check_decay(self)

    def build(self, schedule: Rate, params: PyTree) -> optax.GradientTransformation:
        """See `Optimizer.build`."""
        parts = [
            optax.scale_by_factored_rms(
                factored=self.factored,
                decay_rate=self.decay_rate,
                min_dim_size_to_factor=self.smallest_factored,
                epsilon=self.epsilon,
            )
        ]
        if self.clipping is not None:
            parts.append(optax.clip_by_block_rms(self.clipping))
        if self.scale_by_parameter:
            parts.append(optax.scale_by_param_block_rms())
        whole = [layerwise(optax.chain(*parts))]
        if self.momentum is not None:
            whole.append(stored_in(optax.ema(self.momentum, debias=False), self.moments))
        whole.append(optax.scale_by_learning_rate(schedule))
        if self.weight_decay:

            def decay(step: Int[Array, ""]) -> Float[Array, ""]:
                return -self.weight_decay * schedule(step) ** self.decay_exponent

            whole.append(optax.add_decayed_weights(decay, mask=decayed(params)))
        return optax.chain(*whole)


@config
class Muon(Optimizer):
    """Orthogonalised momentum for the matrices of the blocks, AdamW for all else.

    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon); with `match_rms`, arXiv
    2502.16982, whose updates are as large as AdamW's, so that one schedule serves both.
    """

    momentum: float = 0.95  # decay of the Nesterov momentum
    iterations: int = 5  # Newton-Schulz steps
    # root mean square of an update before the learning rate; None: sqrt(max(1, outputs / inputs))
    # times the orthogonal matrix
    match_rms: float | None = 0.2
    b1: float = 0.9  # AdamW: decay of the mean of gradients
    b2: float = 0.95  # AdamW: decay of the mean of squared gradients
    epsilon: float = 1e-8  # AdamW: added to the root of the mean square
    weight_decay: float = 0.1  # of matrices, times the learning rate
    moments: Stored = "float32"  # how running means are stored; see lmjax.training.rounding

    def validate(self) -> None:
        """Raises UserError for numbers with which the method is undefined."""
        _check_shares(self, "momentum", "b1", "b2")
        _check_positive(self, "iterations", "epsilon")
        if self.match_rms is not None:
            _check_positive(self, "match_rms")
        _check_decay(self)

    def build(self, schedule: Rate, params: PyTree) -> optax.GradientTransformation:
        """See `Optimizer.build`."""

        def label(path: Path, leaf: Any) -> str:
            return "muon" if in_blocks(path) and is_matrix(path) else "adamw"

        def orthogonal(matrices: Float[Array, "layers inputs outputs"]) -> Array:
            return orthogonalize(matrices, self.iterations) * self._scale(*matrices.shape[1:])

        trace = stored_in(optax.trace(self.momentum, nesterov=True), self.moments)
        muon = optax.chain(trace, on_matrices(orthogonal))
        adam = stored_in(
            optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.epsilon), self.moments, rounds=1
        )
        return optax.chain(
            optax.partition({"muon": muon, "adamw": adam}, jax.tree.map_with_path(label, params)),
            optax.add_decayed_weights(self.weight_decay, mask=decayed(params)),
            optax.scale_by_learning_rate(schedule),
        )

    def _scale(self, inputs: int, outputs: int) -> float:
        """Factor of an orthogonal [inputs, outputs] matrix."""
        if self.match_rms is None:
            return max(1.0, outputs / inputs) ** 0.5
        # An orthogonal matrix has root mean square 1 / sqrt(longer side).
        return self.match_rms * max(inputs, outputs) ** 0.5


class _StartState(NamedTuple):
    """Parameters before the first step, of those that decay."""

    start: PyTree


def add_decay_to_start(rate: float, mask: PyTree[bool]) -> optax.GradientTransformation:
    """Adds rate (W - W_0) to the updates, W_0 being the parameters that `init` is given.

    Args:
      rate: weight of the difference.
      mask: the parameters that it acts on.
    """

    def init(params: PyTree) -> _StartState:
        return _StartState(jax.tree.map(jnp.copy, params))

    def update(updates: PyTree, state: _StartState, params: PyTree) -> tuple[PyTree, _StartState]:
        def pulled(update: Array, leaf: Array, start: Array) -> Array:
            return update + rate * (leaf - start)

        return jax.tree.map(pulled, updates, params, state.start), state

    return optax.masked(optax.GradientTransformation(init, update), mask)


def clip_by_global_norm(
    gradients: PyTree[Float[Array, "..."]], limit: float | None
) -> tuple[PyTree[Float[Array, "..."]], Float[Array, ""]]:
    """Scales all gradients by min(1, limit / norm); limit None leaves them (arXiv 1211.5063).

    Returns:
      The gradients, and their global L2 norm before the clip, in float32.
    """
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(gradients)]
    norm = jnp.sqrt(sum(squares))
    if limit is None:
        return gradients, norm
    factor = limit / jnp.maximum(norm, limit)
    return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), gradients), norm


def _check_shares(optimizer: Optimizer, *names: str) -> None:
    """Raises UserError for decays of running means that are not below 1."""
    for name in names:
        if not 0 <= (value := getattr(optimizer, name)) < 1:
            raise UserError(
                f"{type(optimizer).__name__}.{name}={value}: the decay of a running mean is at"
                " least 0 and less than 1"
            )


def _check_positive(optimizer: Optimizer, *names: str) -> None:
    """Raises UserError for values that must be above 0."""
    for name in names:
        if (value := getattr(optimizer, name)) <= 0:
            raise UserError(f"{type(optimizer).__name__}.{name}={value}: must be above 0")


def _check_decay(optimizer: Optimizer) -> None:
    """Raises UserError for a negative weight decay."""
    if (value := optimizer.weight_decay) < 0:
        raise UserError(f"{type(optimizer).__name__}.weight_decay={value}: must be 0 or more")
