"""Loss scaling: gradients of computation in float16 are kept from vanishing (arXiv:1710.03740).

float16 has no numbers below 6e-8, where many gradients lie. The loss is multiplied by a scale
before it is differentiated, and the gradients are divided by it, in float32, before anything else
is done with them. Scales are powers of two: where nothing over- or underflows no bit changes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, PyTree

from lmjax.config import UserError, config
from lmjax.models.batch import Array


@config
class LossScale:
    """A dynamic scale: halved at an overflow, whose step is skipped, doubled after good steps.

    Micikevicius et al. 2018, section 3.2. It is of the mean loss of a token.
    """

    initial: float = 2.0**15  # scale of the first step
    double_after: int = 2000  # steps without an overflow after which it is doubled
    least: float = 1.0  # an overflow at this scale is no longer skipped: training stops
    most: float = 2.0**24  # that it is doubled to

    def validate(self) -> None:
        """Raises UserError for scales that are no powers of two, or not in their order."""
        for name in ("initial", "least", "most"):
            value = getattr(self, name)
            if value <= 0 or math.frexp(value)[0] != 0.5:
                raise UserError(f"loss_scale.{name}={value}: must be a power of two")
        if not self.least <= self.initial <= self.most:
            raise UserError(
                f"loss_scale.initial={self.initial}: must be from least={self.least} to "
                f"most={self.most}"
            )
        if self.double_after < 1:
            raise UserError(f"loss_scale.double_after={self.double_after}: must be 1 or more")

    def init(self) -> Scale:
        """State before the first step."""
        zero = jnp.zeros((), jnp.int32)
        return Scale(jnp.asarray(self.initial, jnp.float32), zero, zero)

    def update(self, scale: Scale, sound: Bool[Array, ""]) -> Scale:
        """State after a step.

        Args:
          scale: that the step had.
          sound: whether its gradients are finite.
        """
        good = jnp.where(sound, scale.good + 1, 0)
        double = good >= self.double_after
        up = jnp.where(double, jnp.minimum(2 * scale.value, self.most), scale.value)
        down = jnp.maximum(scale.value / 2, self.least)
        return Scale(
            value=jnp.where(sound, up, down),
            good=jnp.where(double, 0, good),
            skipped=scale.skipped + jnp.where(sound, 0, 1),
        )

    def gives_up(self, scale: Scale, sound: Bool[Array, ""]) -> Bool[Array, ""]:
        """Returns whether a step overflows at the least scale: it is no question of the scale."""
        return ~sound & (scale.value <= self.least)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scale:
    """State of a dynamic loss scale.

    Attributes:
      value: of the next step, a float32 number.
      good: steps since the last overflow or doubling, an int32 number.
      skipped: steps of the run that were skipped, likewise.
    """

    value: Any  # also what jax's own trees hold in its place
    good: Any
    skipped: Any


def factor_of(scale: Scale, tokens: int) -> Float[Array, ""]:
    """Factor of a sum over so many tokens whose mean has the scale; a power of two."""
    return scale.value * 2.0 ** -math.ceil(math.log2(tokens))


def where(sound: Bool[Array, ""], new: PyTree, old: PyTree) -> Any:
    """The new arrays where a step was sound, else those of before."""
    return jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, old)
