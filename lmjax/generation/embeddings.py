"""Vectors and perplexities of documents by a trained model, for cleaning.

A cleaning from the command line needs imports=("lmjax.generation.embeddings",).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32

from lmjax.config import UserError, config
from lmjax.data.cleaning.embeddings import Embedder
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.documents import Document
from lmjax.generation.run import load
from lmjax.generation.text import TextGenerator
from lmjax.models import abstract, check_tokens, plain_batch
from lmjax.models.batch import Batch
from lmjax.parallel import Mesh
from lmjax.remote import check_path


@config
class ModelStates(Embedder):
    """Mean of a model's hidden states over a document's first tokens.

    SemDeDup (Abbas et al. 2023, arXiv:2303.09540) takes those of a small language model too, at the
    last token alone; their mean depends less on how a text ends.
    """

    model: str  # run folder, or folder of a public model
    tokens: int = 256  # of a document that are looked at, at most
    rows: int = 16  # documents that go through the model together

    def validate(self) -> None:
        """Raises UserError for numbers that have no meaning."""
        check_path(self.model, "model")
        if self.tokens < 1 or self.rows < 1:
            raise UserError(f"tokens={self.tokens}, rows={self.rows}: must be 1 or more")

    def vectors(self, documents: Sequence[Document]) -> Float32[np.ndarray, "documents width"]:
        """See `Embedder.vectors`. UserError: the folder holds no model."""
        with jax.set_mesh(Mesh().build()):
            loaded = _loaded(self.model)
            texts = [one.text for one in documents]
            found = [
                loaded.vectors(texts[at : at + self.rows], self.rows, self.tokens)
                for at in range(0, len(texts), self.rows)
            ]
        width = loaded.text.generator.config.hidden
        return np.concatenate(found) if found else np.zeros((0, width), np.float32)


@config
class ModelPerplexity(Step):
    """Keeps documents within a band of perplexity by a small trained model.

    A model of n-grams (`Perplexity`) costs far less; this one sees more of a text. Its band is for
    the one tokenizer that it has, so that languages are cleaned apart, or by `Collection`.
    """

    model: str  # run folder, or folder of a public model
    least: float = 0.0  # perplexity of a token
    most: float = 1000.0  # perplexity of a token
    tokens: int = 512  # of a document that are looked at, its first ones
    field: str = "perplexity"  # name of the metadata with it; empty: none

    def validate(self) -> None:
        """Raises UserError for a band that is none."""
        check_path(self.model, "model")
        if not 0 <= self.least < self.most or self.tokens < 2:
            raise UserError(
                f"least={self.least}, most={self.most}, tokens={self.tokens}: must rise from 0, and"
                " be 2 or more"
            )

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`. UserError: the folder holds no model."""
        with jax.set_mesh(Mesh().build()):
            value = _loaded(self.model).perplexity(document.text, self.tokens)
        if not self.least <= value <= self.most:
            return Dropped(f"the perplexity is {'low' if value < self.least else 'high'}", value)
        if not self.field:
            return document
        return document._replace(
            metadata={**(document.metadata or {}), self.field: round(value, 2)}
        )


@dataclasses.dataclass(frozen=True)
class LoadedStates:
    """A model that reads whole texts; a mesh must be set.

    Attributes:
      text: the model, and its tokenizer.
    """

    text: TextGenerator

    def vectors(
        self, texts: Sequence[str], rows: int, tokens: int
    ) -> Float32[np.ndarray, "documents width"]:
        """A vector for each of some texts, at most as many as `rows`, of so many tokens each."""
        batch = self._batch(texts, rows, tokens)
        states, _ = self._run(batch)
        seen = (batch.segments != 0)[..., None]
        states = np.where(seen, np.asarray(states, np.float32), 0)
        return (states.sum(1) / seen.sum(1)).astype(np.float32)[: len(texts)]

    def perplexity(self, text: str, most: int) -> float:
        """Perplexity of a token of a text's beginning; infinite where there are too few."""
        batch = self._batch([text], 1, most)
        logs = np.asarray(self._run(batch)[1])[0]
        count = int(batch.segments.sum()) - 1
        return float(np.exp(-logs[:count].mean())) if count > 0 else float("inf")

    def _batch(self, texts: Sequence[str], rows: int, most: int) -> Batch:
        tokenizer, config = self.text.tokenizer, self.text.generator.config
        length = min(most, config.max_length or most)
        opening = list(tokenizer.opening)
        tokens = np.zeros((rows, length), np.int32)
        segments = np.zeros_like(tokens)
        segments[:, 0] = 1  # a row of padding would have no mean
        for row, encoded in enumerate(tokenizer.encode_batch(list(texts))):
            # A text without tokens has one at least.
            own = [*opening, *(encoded or [tokenizer.end])][:length]
            tokens[row, : len(own)], segments[row, : len(own)] = own, 1
        batch = dataclasses.replace(plain_batch(tokens), segments=segments)
        check_tokens(batch, config.vocab_size)
        return batch

    def _run(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        generator = self.text.generator
        return self._states(generator.params, generator.put_on_devices(batch))

    @functools.cached_property
    def _states(self) -> Any:
        """Parameters, batch -> hidden states, and logarithms of the next tokens' probabilities."""
        generator = self.text.generator
        graph, _ = abstract(generator.config, generator.layout)
        size = generator.config.vocab_size

        @jax.jit
        def run(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graph, params)
            states, _ = model(batch)
            logits = generator.layout.reshard(model.logits(states), "batch", None, None)
            logs = jax.nn.log_softmax(logits[..., :size].astype(jnp.float32))
            following = jnp.take_along_axis(logs[:, :-1], batch.tokens[:, 1:, None], 2)
            return states, following[..., 0]

        return run


@functools.lru_cache(maxsize=1)
def _loaded(folder: str) -> LoadedStates:
    """Loads a model. UserError: the folder holds none."""
    return LoadedStates(load(folder))
