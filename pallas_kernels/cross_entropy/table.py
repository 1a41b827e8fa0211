"""The table of implementations, each of which says what it cannot serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from pallas_kernels.cross_entropy import chunked, hopper, tpu
from pallas_kernels.table import CannotServe


class VocabularyTerms(NamedTuple):
    """One way to reduce the logits of a head's rows, or of one shard of them.

    Attributes:
        serve: takes the arguments of `chunked.vocabulary_terms`, gives its results.
        refusal: takes hidden, head and whether the largest logit is asked for; gives the reason why
            it cannot serve, or None.
        kernel: whether it is a program for one device that jax cannot divide.
    """

    serve: Callable[..., tuple[jax.Array, ...]]
    refusal: Callable[..., str | None]
    kernel: bool = True


# Later ones are preferred.
IMPLEMENTATIONS = {
    "chunked": VocabularyTerms(chunked.vocabulary_terms, lambda *_: None, kernel=False),
    "hopper": VocabularyTerms(hopper.vocabulary_terms, hopper.refusal),
    "tpu": VocabularyTerms(tpu.vocabulary_terms, tpu.refusal),
}


def choose(
    name: str | None, hidden: jax.Array, head: jax.Array, chunk: int | None, largest: bool
) -> VocabularyTerms:
    """The implementation of a name, or the preferred one of those that can serve.

    Raises:
        CannotServe: the named one cannot serve; with the reason.
    """
    if name is not None:
        if (reason := _refusal(name, hidden, head, chunk, largest)) is not None:
            raise CannotServe(
                f"cross_entropy: implementation {name!r} cannot serve this call: {reason}"
            )
        return IMPLEMENTATIONS[name]
    asked = hidden, head, chunk, largest
    able = (name for name in reversed(IMPLEMENTATIONS) if _refusal(name, *asked) is None)
    return IMPLEMENTATIONS[next(able)]


def _refusal(name: str, hidden, head, chunk, largest) -> str | None:
    implementation = IMPLEMENTATIONS[name]
    if implementation.kernel:
        if chunk is not None:
            return f"chunk={chunk}, it holds no logits"
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.size > 1 and jax.sharding.AxisType.Auto in mesh.axis_types:
            return "a mesh with automatic axes: a kernel cannot be divided by the compiler"
    return implementation.refusal(hidden, head, largest)
