"""Prompts: whether a model can continue them, and how they become one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int

from lmjax.config import UserError
from lmjax.models import Batch, EncoderDecoderConfig, TransformerConfig, plain_batch
from lmjax.models.transformer import NO_HEAD

SMALLEST = 16  # slots; prompts and continuations are given the next power of two

Prompt = Sequence[int] | Batch  # token ids, or a row of a batch


class PromptTooLong(UserError):
    """A prompt has more tokens than there is room for."""


def check_prompts(
    config: TransformerConfig,
    prompts: Sequence[Sequence[int]],
    sources: Sequence[Sequence[int]] | None = None,
) -> None:
    """Raises UserError for prompts that the model cannot continue, or sources it cannot read."""
    if not config.attention.causal:
        raise UserError("the model is an encoder (attention.causal=False), which continues no text")
    if not config.word_head:
        raise UserError(NO_HEAD)
    if isinstance(config, EncoderDecoderConfig):
        if sources is None or len(sources) != len(prompts):
            raise UserError(
                f"{len(prompts)} prompts, {len(sources or ())} sources: a model with an encoder"
                " needs a source for each prompt"
            )
    elif sources is not None:
        raise UserError("the model has no encoder that could read sources: give prompts alone")
    for kind, rows in (("prompt", prompts), ("source", sources or ())):
        for number, row in enumerate(rows, 1):
            if len(row) == 0:
                raise UserError(f"{kind} {number} is empty: a model reads at least one token")
            if config.max_length is not None and len(row) > config.max_length:
                raise PromptTooLong(
                    f"{kind} {number} has {len(row)} tokens, more than the"
                    f" {config.max_length} of the model's context{_way_out(config)}"
                )
            wrong = [token for token in row if not 0 <= token < config.vocab_size]
            if wrong:
                raise UserError(
                    f"{kind} {number} has the token {wrong[0]}; the model's are 0 to"
                    f" {config.vocab_size - 1}, and its table has no row for others that a"
                    " tokenizer may have"
                )


def _way_out(config: TransformerConfig) -> str:
    """Advice, for a message, on a text that is too long."""
    if config.positions is not None:
        return f": its table of positions has {config.max_length} rows"
    return (
        "; its positions can be computed beyond it, though it was not made for that: a larger"
        " model.max_length (in a run's config.json), max_position_embeddings or rope_scaling (in"
        " that of a public model) allows it"
    )


def room(config: TransformerConfig, length: int, wanted: int) -> int:
    """Number of tokens, at most `wanted`, that can follow `length` tokens.

    The last token of a full context can still be followed by one that is never fed back.
    """
    return wanted if config.max_length is None else min(wanted, config.max_length + 1 - length)


def tokens_of(prompt: Prompt) -> Sequence[int]:
    """The tokens of a prompt."""
    return prompt.tokens.tolist() if isinstance(prompt, Batch) else prompt


def prompt_batch(
    prompts: Sequence[Prompt],
    sources: Sequence[Sequence[int]] | None = None,
    columns: int | None = None,
) -> Batch:
    """The prompts, and what the encoder reads, each left-padded to a power of two.

    The former have so many columns instead, where these are given.
    """
    texts = [prompts] if sources is None else [prompts, sources]
    lengths = [round_up(max(len(tokens_of(row)) for row in rows)) for rows in texts]
    lengths[0] = columns or lengths[0]
    batch, *encoder = map(left_padded, texts, lengths)
    return dataclasses.replace(batch, encoder=encoder[0] if encoder else None)


def left_padded(prompts: Sequence[Prompt], length: int) -> Batch:
    """The prompts as one batch of `length`, each at the right end; positions begin with it."""
    rows = [p if isinstance(p, Batch) else plain_row(p) for p in prompts]

    def padded(name: str) -> Int[np.ndarray, "batch seq"] | None:
        if all(getattr(row, name) is None for row in rows):
            return None
        lines = np.zeros((len(rows), length), np.int32)
        for line, row in zip(lines, rows):
            values = getattr(row, name)
            if values is None:  # what is not said of a row but of others
                values = row.positions if name == "ranks" else 0
            line[length - row.tokens.size :] = values
        return lines

    names = ("tokens", "positions", "segments", "ranks", "block_positions")
    return Batch(**{name: padded(name) for name in names})


def plain_row(tokens: Sequence[int]) -> Batch:
    """One row of a batch, a text without anything special."""
    return jax.tree.map(lambda a: a[0], plain_batch(np.array([tokens], np.int32)))


def prefix_row(prefix: Sequence[int], more: Sequence[int] = ()) -> Batch:
    """One row of a batch: tokens that see each other both ways, and others from left to right.

    So a model reads that learned with `PrefixLM`.
    """
    row = plain_row([*prefix, *more])
    ranks = np.where(row.positions < len(prefix), 0, row.positions).astype(np.int32)
    return dataclasses.replace(row, ranks=ranks)


def tokens_seen(
    prompts: Sequence[Sequence[int]], vocab_size: int
) -> Bool[np.ndarray, "batch vocab"]:
    """Mask of the tokens that each prompt has."""
    seen = np.zeros((len(prompts), vocab_size), bool)
    for row, prompt in zip(seen, prompts):
        row[np.asarray(prompt)] = True
    return seen


def round_up(length: int) -> int:
    """The next power of two, so that few shapes are compiled."""
    return max(SMALLEST, 1 << (length - 1).bit_length())


def round_closely(length: int) -> int:
    """The next of four lengths up to a power of two, as most of many prompts are padding in it."""
    step = max(SMALLEST, round_up(length) // 8)
    return -(-length // step) * step
