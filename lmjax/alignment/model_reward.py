"""Rewards by a reward model."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lmjax.alignment.reward_functions import Reply, Reward, Score
from lmjax.config import UserError, config
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers import Tokenizer
from lmjax.interop.folder import model_folder, read_params, tokenizer_folder
from lmjax.models import Batch, TextHeadConfig, TransformerConfig, abstract
from lmjax.objectives import Example
from lmjax.parallel import Layout, axis_size, training_layout
from lmjax.remote import check_path
from lmjax.training.placement import own_rows, to_devices

SHORTEST = 16  # tokens of the rows of short replies


@config
class ModelReward(Reward):
    """Score of a reward model, read at the last token of the request and its reply."""

    folder: str  # run folder of the reward model, or a public model folder
    head: str = "reward"  # name of its head with one output
    batch_size: int = 64  # most replies that are scored at once

    def validate(self) -> None:
        """Raises UserError for no replies at once."""
        check_path(self.folder, "folder")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}: must be at least 1")

    def prepare(self, tokenizer: Tokenizer, length: int, policy: str) -> Score:
        """See `Reward.prepare`: with the model's parameters on the mesh that is set.

        Raises:
          UserError: the reward model cannot read what the policy writes.
        """
        model = check_reader(self.folder, "reward model", tokenizer, length, policy)
        whose = f"the reward model in {self.folder} and the policy in {policy}: the one"
        find_score(model, self.head, whose)
        return self._scorer(model)

    def score(self, replies: Sequence[Reply]) -> list[float]:
        """See `Reward.score`; reads the model anew, which the prepared reward does once."""
        return self._scorer(model_folder(self.folder))(replies)

    def _scorer(self, model: TransformerConfig) -> Score:
        """Reads the parameters, and scores replies with them."""
        layout = training_layout()
        params = read_params(self.folder, model, layout)
        shards = axis_size(*layout.axes("batch"))

        def score(replies: Sequence[Reply]) -> list[float]:
            found = []
            for first in range(0, len(replies), self.batch_size):
                part = [reply.tokens for reply in replies[first : first + self.batch_size]]
                batch = padded_rows(part, -(-len(part) // shards) * shards, model.max_length)
                example = to_devices(own_rows(Example(batch, ())), layout, model.vocab_size)
                scores = jax.device_get(_scores(model, layout, self.head, params, example.inputs))
                found += scores[: len(part)].tolist()
            return found

        return score


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scores(
    model: TransformerConfig, layout: Layout, head: str, params: dict, batch: Batch
) -> Float[Array, "rows"]:
    """Scores of texts by a head; reward models of one config share the program."""
    judge = nnx.merge(abstract(model, layout)[0], params)
    hidden, _ = judge(batch)
    scores = judge.outputs(head, hidden, batch)[:, 0, 0]
    return jax.reshard(scores, PartitionSpec())  # each process reads all of them


def padded_rows(texts: Sequence[Sequence[int]], rows: int, longest: int | None) -> Batch:
    """A row for each text, padded on the right to a power of two tokens, and rows of padding.

    Few lengths mean few compiled programs. What a head reads at a text's last token does not depend
    on the padding: it has segment 0.

    Args:
      texts: tokens of each.
      rows: number of rows, at least that of texts.
      longest: most tokens that the model reads; None: no limit.
    """
    length = SHORTEST
    while length < max(map(len, texts)):
        length *= 2
    length = length if longest is None else min(length, longest)
    tokens, segments = np.zeros((2, rows, length), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], segments[row, : len(text)] = text, 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy()
    return Batch(tokens=tokens, positions=positions, segments=segments)


def check_reader(
    folder: str, kind: str, tokenizer: Tokenizer, length: int, policy: str
) -> TransformerConfig:
    """The model in a folder, which can read what a policy writes.

    Args:
      folder: run folder or public model folder of the model.
      kind: of the model, for messages.
      tokenizer, length, policy: see `Reward.prepare`.

    Raises:
      UserError: it cannot.
    """
    model, whose = model_folder(folder), f"the {kind} in {folder} and the policy in {policy}"
    if read_tokenizer(tokenizer_folder(folder)).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{whose} have different tokenizers")
    if model.max_length is not None and model.max_length < length:
        raise UserError(
            f"{whose}: the one reads at most {model.max_length} tokens, a request and a reply "
            f"of the other have up to {length}"
        )
    return model


def find_score(model: TransformerConfig, name: str, whose: str) -> TextHeadConfig:
    """The head of a model that gives a score of a text under a name.

    Raises:
      UserError: it has none; the message begins with `whose`.
    """
    for head in model.heads:
        if isinstance(head, TextHeadConfig) and (head.name, head.outputs) == (name, 1):
            return head
    names = ", ".join(repr(head.name) for head in model.heads) or "none"
    raise UserError(
        f"{whose} has no TextHead with one output of the name {name!r}; its heads: {names}"
    )
