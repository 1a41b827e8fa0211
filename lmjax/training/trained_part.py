"""The part of a model's parameters that is trained, and the rest, which stays as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import traverse_util

from lmjax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class TrainedPart:
    """Divides parameters into those that are trained and the rest.

    Parameters are nested dictionaries of arrays, blocks stacked over layers. Of a stack whose last
    layers alone are trained, both parts have an entry. `Trainable.part` makes it of a choice.

    Attributes:
      trains: path of a parameter, as "blocks.attention.query.weight" -> whether it is trained;
        None: all are.
      first: entries of a stack of blocks, the first ones, that are among the rest.
    """

    trains: Callable[[str], bool] | None = None
    first: int = 0

    def split(self, params: dict) -> tuple[dict, dict]:
        """The parameters that are trained, and the rest; traceable."""
        if self.trains is None:
            return params, {}
        flat = traverse_util.flatten_dict(params, sep=".")
        trained = {path: leaf for path, leaf in flat.items() if self.trains(path)}
        rest = {path: leaf for path, leaf in flat.items() if path not in trained}
        for path, leaf in trained.items():
            if self.first and path.startswith("blocks."):
                rest[path], trained[path] = leaf[: self.first], leaf[self.first :]
        return tuple(traverse_util.unflatten_dict(part, sep=".") for part in (trained, rest))

    def of(self, params: dict) -> dict:
        """The parameters that are trained; traceable."""
        return self.split(params)[0]

    def shapes(self, params: dict) -> dict:
        """`of` parameters as shapes with shardings."""
        return jax.eval_shape(self.of, params)

    def whole(self, trained: dict, params: dict) -> dict:
        """All parameters: those that are trained, and the rest of others; traceable.

        The rest are the very arrays of `params`; where a part of a stack is trained, the whole
        stack is a copy.

        Args:
          trained: `of` any parameters.
          params: those that have the rest.
        """
        return join_trained(trained, self.split(params)[1])

    def without_rest(self, state: TrainState) -> TrainState:
        """A state with the parameters that are trained alone; see `with_rest`."""
        return dataclasses.replace(state, params=self.of(state.params))

    def with_rest(self, state: TrainState, params: dict) -> TrainState:
        """The opposite of `without_rest`, by any parameters of the training."""
        return dataclasses.replace(state, params=self.whole(state.params, params))

    def is_all(self, paths: Iterable[str]) -> bool:
        """Returns whether parameters of these paths are all trained, and none in part."""
        return self.trains is None or (not self.first and all(map(self.trains, paths)))


def join_trained(trained: dict, rest: dict) -> dict:
    """Both parts of the parameters in one nested dictionary; of one in both, rest comes first."""
    if not rest:
        return trained
    new, old = (traverse_util.flatten_dict(part, sep=".") for part in (trained, rest))
    halves = {path: _concatenate(old[path], new[path]) for path in new.keys() & old.keys()}
    return traverse_util.unflatten_dict(old | new | halves, sep=".")


def _concatenate(rest: jax.Array, trained: jax.Array) -> jax.Array:
    """Both parts of a stack, cut over the mesh as the second, which may be gathered (ZeRO 1, 2)."""
    return jnp.concatenate([jax.reshard(rest, jax.typeof(trained).sharding.spec), trained])
