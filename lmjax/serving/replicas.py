"""Several engines of one model, each on devices of its own, behind one queue."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
from jax.sharding import NamedSharding

from lmjax.serving.engine import Engine
from lmjax.serving.request import Answer, TokenRequest
from lmjax.serving.routing import EngineLoad, chosen_engine
from lmjax.serving.settings import EngineSettings
from lmjax.serving.shared_queue import SharedQueue
from lmjax.serving.weights import ServedWeights


class Replicas:
    """Engines behind one queue; has the methods of `Engine` that servers call.

    Which engine answers a request does not change the answer. Each keeps the beginnings that it has
    read for itself: a request goes to the engine that knows the most of its prompt, as long as that
    has at most half of its slots more requests than the idlest one (`chosen_engine`).

    Attributes:
      engines: one for each mesh.
    """

    def __init__(
        self,
        weights: Mapping[str, ServedWeights],
        settings: EngineSettings,
        draft: ServedWeights | None,
        meshes: Sequence[jax.sharding.Mesh],
    ):
        """Copies the weights to all meshes. See `Engine`, whose settings are of each.

        Args:
          weights: of the first mesh, which must be set.
          settings: see `Engine`.
          draft: see `Engine`.
          meshes: of equal sizes.
        """
        queue, self.engines = SharedQueue(settings.queue), []
        self._meshes, self._ahead = list(meshes), settings.slots // 2
        for number, mesh in enumerate(self._meshes):
            own, small = weights, draft
            if number:
                own, small = moved(weights, mesh), draft and moved({"": draft}, mesh)[""]
            with jax.set_mesh(mesh):
                self.engines.append(Engine(own, settings, small, queue))

    @property
    def models(self) -> list[str]:
        """See `Engine.models`."""
        return self.engines[0].models

    @property
    def counts(self) -> Counter[str]:
        """Counts of all engines."""
        return sum((engine.counts for engine in self.engines), Counter())

    def set_weights(self, name: str, weights: ServedWeights) -> None:
        """See `Engine.set_weights`; they lie on the first mesh."""
        for number, (engine, mesh) in enumerate(zip(self.engines, self._meshes)):
            engine.set_weights(name, moved({name: weights}, mesh)[name] if number else weights)

    def submit(self, request: TokenRequest, answer: Answer) -> int:
        """See `Engine.submit`."""
        known = [engine.known_tokens(request) for engine in self.engines]
        loads = [engine.load() for engine in self.engines]
        number = chosen_engine(known, loads, self._ahead)
        return self.engines[number].submit(request, answer)

    def cancel(self, number: int) -> None:
        """See `Engine.cancel`."""
        for engine in self.engines:
            engine.cancel(number)

    def load(self) -> EngineLoad:
        """The state of all engines together."""
        loads = (dataclasses.astuple(engine.load()) for engine in self.engines)
        return EngineLoad(*map(sum, zip(*loads)))

    def call(self, function: Callable[[], Any]) -> Future:
        """See `Engine.call`: in the thread of the first engine, which has the model's mesh."""
        return self.engines[0].call(function)

    def wake(self) -> None:
        """See `Engine.wake`."""
        for engine in self.engines:
            engine.wake()

    def run(self, stop: threading.Event) -> None:
        """Runs all engines, the first in this thread, until the event is set or one fails.

        Raises:
          Exception: of an engine.
        """
        failures: list[Exception] = []

        def run(engine: Engine, mesh: jax.sharding.Mesh) -> None:
            try:
                with jax.set_mesh(mesh):
                    engine.run(stop)
            except Exception as error:
                failures.append(error)
            finally:
                stop.set()
                self.wake()

        pairs = list(zip(self.engines, self._meshes))
        threads = [threading.Thread(target=run, args=pair, name="replica") for pair in pairs[1:]]
        for thread in threads:
            thread.start()
        run(*pairs[0])
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


AnyEngine = Engine | Replicas


def moved(
    weights: Mapping[str, ServedWeights], mesh: jax.sharding.Mesh
) -> dict[str, ServedWeights]:
    """Weights on the devices of another mesh, cut alike; what they share is copied once."""
    copies: dict[int, jax.Array] = {}

    def copy(array: jax.Array) -> jax.Array:
        if id(array) not in copies:
            spec = jax.typeof(array).sharding.spec
            copies[id(array)] = jax.device_put(array, NamedSharding(mesh, spec))
        return copies[id(array)]

    return {
        name: ServedWeights(one.forward, jax.tree.map(copy, one.params), one.reads_prefix)
        for name, one in weights.items()
    }
