"""The weights that a server has under a name: of the model itself, or with adapters."""

from __future__ import annotations

import dataclasses
import itertools

from lmjax.generation.generator import Generator
from lmjax.serving.forward import PagedForward

_numbers = itertools.count()


@dataclasses.dataclass(frozen=True, eq=False)
class ServedWeights:
    """Weights, and the compiled functions that take them.

    Attributes:
      forward: of their config.
      params: as `Generator.weights`.
      reads_prefix: see `TextGenerator`; the same for all weights of a server.
      salt: of the keys of their pages: those of other weights are never taken for them.
    """

    forward: PagedForward
    params: dict
    reads_prefix: bool = False
    salt: bytes = dataclasses.field(default_factory=lambda: b"%d" % next(_numbers))

    @classmethod
    def of(cls, generator: Generator, reads_prefix: bool = False) -> ServedWeights:
        """The weights of a generator."""
        decoder = generator.decoder
        forward = PagedForward(decoder.config, decoder.layout)
        return cls(forward, generator.weights, reads_prefix)
