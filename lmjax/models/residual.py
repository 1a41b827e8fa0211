"""Arrangements of a block: pre-norm, post-norm, parallel and others."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from lmjax.config import config

# The residual stream [batch, seq, embed]: an array, or a value of a graph that is exported, which
# can be added and multiplied too.
Stream = Any
Sublayer = Callable[[Stream], Stream]


@config
class Arrangement(abc.ABC):
    """Base of the arrangements: the order of norms, sublayers and additions in a block."""

    final_norm: ClassVar[bool] = False  # whether a norm follows the last block

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the norms that a block has."""
        return ("attention_norm", "feed_forward_norm")

    @abc.abstractmethod
    def apply(
        self,
        x: Stream,
        norms: Mapping[str, Sublayer],
        attention: Sublayer,
        feed_forward: Sublayer,
    ) -> Stream:
        """The output of one block.

        Args:
          x: the residual stream.
          norms: the layers named by `norms`, each a function of activations.
          attention: the attention sublayer, without norm and addition.
          feed_forward: the feed-forward sublayer, likewise.
        """


@config
class PreNorm(Arrangement):
    """x + f(norm(x)), and a norm after the last block (GPT-2, LLaMA)."""

    final_norm: ClassVar[bool] = True

    def apply(self, x, norms, attention, feed_forward) -> Stream:
        """See `Arrangement.apply`."""
        x = x + attention(norms["attention_norm"](x))
        return x + feed_forward(norms["feed_forward_norm"](x))


@config
class PostNorm(Arrangement):
    """norm(x + f(x)), as in the first Transformer and GPT-1."""

    def apply(self, x, norms, attention, feed_forward) -> Stream:
        """See `Arrangement.apply`."""
        x = norms["attention_norm"](x + attention(x))
        return norms["feed_forward_norm"](x + feed_forward(x))


@config
class DeepNorm(Arrangement):
    """norm(alpha x + f(x)) (Wang et al. 2022, arXiv:2203.00555), the norms moved on by one place.

    Each sublayer reads norm(x) and is added to alpha norm(x); so the first norm is that of the
    embeddings, and the last stands after the last block, as the GLM models' files have them.
    """

    final_norm: ClassVar[bool] = True
    alpha: float = 11.832159566199232  # of the residual stream; GLM-130B: sqrt(2 layers)

    def apply(self, x, norms, attention, feed_forward) -> Stream:
        """See `Arrangement.apply`."""
        x = norms["attention_norm"](x)
        x = self.alpha * x + attention(x)
        x = norms["feed_forward_norm"](x)
        return self.alpha * x + feed_forward(x)


@config
class Parallel(Arrangement):
    """x + attention(norm(x)) + feed_forward(norm(x)): GPT-J, PaLM, Falcon."""

    final_norm: ClassVar[bool] = True
    shared_norm: bool = True  # one norm for both; else each has its own (Falcon-40B)

    @property
    def norms(self) -> tuple[str, ...]:
        """See `Arrangement.norms`."""
        return ("norm",) if self.shared_norm else ("attention_norm", "feed_forward_norm")

    def apply(self, x, norms, attention, feed_forward) -> Stream:
        """See `Arrangement.apply`."""
        attended, fed = self.branches(x, norms, attention, feed_forward)
        return x + attended + fed

    def branches(self, x, norms, attention, feed_forward) -> tuple[Stream, Stream]:
        """Both terms that are added to x; see `Arrangement.apply`."""
        first, last = self.norms[0], self.norms[-1]
        normed = norms[first](x)
        other = normed if self.shared_norm else norms[last](x)
        return attention(normed), feed_forward(other)


@config
class SandwichNorm(Arrangement):
    """x + norm(f(norm(x))): norms before and after each sublayer (Gemma 2)."""

    final_norm: ClassVar[bool] = True

    @property
    def norms(self) -> tuple[str, ...]:
        """See `Arrangement.norms`."""
        return (*super().norms, "attention_output_norm", "feed_forward_output_norm")

    def apply(self, x, norms, attention, feed_forward) -> Stream:
        """See `Arrangement.apply`."""
        attended = attention(norms["attention_norm"](x))
        x = x + norms["attention_output_norm"](attended)
        fed = feed_forward(norms["feed_forward_norm"](x))
        return x + norms["feed_forward_output_norm"](fed)
