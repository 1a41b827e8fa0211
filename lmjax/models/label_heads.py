"""Heads that are trained on labels: of texts, of tokens, of spans; several on one model."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lmjax.config import UserError, config
from lmjax.models.batch import Batch
from lmjax.models.heads import rows_product
from lmjax.models.linear import Builder, dropout
from lmjax.parallel import Layout

# As transformers' `problem_type`.
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


@config
class HeadConfig(abc.ABC):
    """A dense layer over hidden states; base of the heads that are trained on labels."""

    outputs: int = 2  # classes, or numbers
    name: str = "label"  # of the head; no other head of the model has it
    bias: bool = True  # of the last layer
    dropout: float = 0.0  # of the last layer's input, in training

    @property
    @abc.abstractmethod
    def of_texts(self) -> bool:
        """Returns whether it reads one token of each text, and not every token."""

    def validate(self) -> None:
        """Raise UserError for settings that cannot be meant."""
        if not self.name.isidentifier():
            raise UserError(f"name={self.name!r}: a head is named by letters, digits and _")
        if self.outputs < 1:
            raise UserError(f"outputs={self.outputs}: must be 1 or more")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout}: must be 0 or more, and below 1")
        labels = getattr(self, "labels", ())
        if labels and len(labels) != self.outputs:
            raise UserError(f"there are {len(labels)} labels for {self.outputs} outputs")


@config
class TextHeadConfig(HeadConfig):
    """Classes or numbers of each text of a row; with one output, the score of a reward model."""

    labels: tuple[str, ...] = ()  # names of the outputs; none: they have none
    # Token whose hidden state is read: the last of a causal model, the first ([CLS]) of an encoder.
    token: Literal["first", "last"] = "last"
    pooler: bool = False  # a dense layer and tanh before the last layer (BERT, T5)
    # Meaning of the outputs; none: one class of several, or with one output a number.
    problem: Problem | None = None

    @property
    def of_texts(self) -> bool:
        """See `HeadConfig.of_texts`."""
        return True


@config
class TokenHeadConfig(HeadConfig):
    """Classes of each token."""

    labels: tuple[str, ...] = ()  # names of the outputs; none: they have none

    @property
    def of_texts(self) -> bool:
        """See `HeadConfig.of_texts`."""
        return False


@config
class SpanHeadConfig(HeadConfig):
    """Start and end of a span of the text, such as the answer to a question (SQuAD).

    The first token of a text stands for no span at all.
    """

    @property
    def of_texts(self) -> bool:
        """See `HeadConfig.of_texts`."""
        return False

    def validate(self) -> None:
        """Raise UserError for other than two outputs."""
        HeadConfig.validate(self)
        if self.outputs != 2:
            raise UserError(f"outputs={self.outputs}: a span has a start and an end")


def check_heads(heads: tuple[HeadConfig, ...]) -> None:
    """Raises UserError where heads of one model have one name."""
    names = [head.name for head in heads]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"heads: there are several of the name {twice[0]!r}")


def of_texts(heads: tuple[HeadConfig, ...], path: Sequence[str]) -> bool:
    """Returns whether a parameter is of a head that reads one token of each text."""
    names = {head.name for head in heads if head.of_texts}
    return path[0] == "heads" and path[1] in names


class LabelHead(nnx.Module):
    """outputs(dropout(x)), or outputs(dropout(tanh(pooler(x)))); the last layer in float32."""

    def __init__(self, config: HeadConfig, width: int, builder: Builder):
        self.config, self.layout = config, builder.layout
        inputs = (("embed", width),)
        self.pooler = nnx.data(None)
        if getattr(config, "pooler", False):
            self.pooler = builder.linear(inputs, ((None, width),), bias=True)
        # Classes are compared, and rewards added, with more digits than a bfloat16 has.
        exact = dataclasses.replace(builder, dtype="float32")
        self.outputs = exact.linear(inputs, ((None, config.outputs),), bias=config.bias)

    def __call__(
        self,
        hidden: Float[Array, "batch seq width"],
        batch: Batch,
        texts: int = 1,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch rows outputs"]:
        """A row of outputs for each token, or for each text.

        Args:
          hidden: what the model gives for the batch.
          batch: its segments say which tokens are of which text.
          texts: for a head of texts, how many of each row are read: its segments 1, 2, ...
          key: for dropout; None drops nothing.
        """
        if not self.config.of_texts:
            x = dropout(hidden, self.config.dropout, key)
            return self.outputs(x.astype(jnp.float32))
        segments = jnp.asarray(batch.segments)  # a debugger may hand over numpy
        x = text_states(self.layout, hidden, segments, texts, self.config.token)
        if self.pooler is not None:
            x = jnp.tanh(rows_product(self.pooler, x))
        x = dropout(x, self.config.dropout, key)
        return rows_product(self.outputs, x.astype(jnp.float32))


def build_heads(
    heads: tuple[HeadConfig, ...], width: int, builder: Builder
) -> dict[str, LabelHead] | None:
    """Heads by their names, which read hidden states of `width`; None where there are none."""
    return {head.name: LabelHead(head, width, builder) for head in heads} or None


def find_head(heads: dict[str, LabelHead] | None, name: str) -> LabelHead:
    """The head of this name; UserError where the model has none."""
    if heads is None or name not in heads:
        known = ", ".join(heads or {}) or "none"
        raise UserError(f"the model has no head named {name!r}; those of model.heads are: {known}")
    return heads[name]


def text_states(
    layout: Layout,
    hidden: Float[Array, "batch seq width"],
    segments: Int[Array, "batch seq"],
    texts: int,
    token: Literal["first", "last"],
) -> Float[Array, "batch texts width"]:
    """Hidden state of the first or the last token of each text; zeros for a text without tokens.

    The texts of a row are its segments 1, 2, ..., `texts`. Padding has segment 0, wherever it is in
    the row and whatever tokens stand there.
    """
    segments = layout.reshard(segments, "batch", None)
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None, None]
    own = segments[:, None] == 1 + jnp.arange(texts, dtype=segments.dtype)[None, :, None]
    if token == "last":
        chosen = jnp.max(jnp.where(own, index, -1), axis=2, keepdims=True)
    else:
        chosen = jnp.min(jnp.where(own, index, segments.shape[1]), axis=2, keepdims=True)
    chosen = layout.reshard(chosen == index, "batch", None, "seq")
    # Every device adds the tokens that it holds: a sequence that is cut over devices stays cut.
    states = jnp.sum(jnp.where(chosen[..., None], hidden[:, None], 0), axis=2, dtype=hidden.dtype)
    return layout.reshard(states, "batch", None, None)
