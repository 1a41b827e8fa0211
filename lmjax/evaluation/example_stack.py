"""Contents of a picture of an example: one row, as the encoder or the decoder reads it."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from lmjax.data.tokenizers import Tokenizer
from lmjax.models import Batch
from lmjax.objectives import TokenTargets
from pallas_kernels.attention import Mask

UNSEEN, CONTEXT, WRITTEN, PADDING = range(4)  # parts; the first is a cell of a mask, no token
ROWS = {  # of numbers above a mask, and what they are called
    "positions": "position",
    "block_positions": "block position",
    "token_types": "token type",
    "segments": "segment",
    "ranks": "rank",
}


@dataclasses.dataclass(frozen=True)
class TokenStack:
    """One row as the decoder reads it, or the encoder.

    Attributes:
      texts: of the tokens; see `token_texts`.
      is_special: which tokens stand for no text.
      shades: of each token, twice its part, and 1 more in every second segment.
      numbers: what stands above the mask, by name.
      mask: which token sees which.
      targets: their texts, or None.
      weights: of the targets; None where there are none.
    """

    texts: list[str]
    is_special: Bool[np.ndarray, "seq"]
    shades: Int[np.ndarray, "seq"]
    numbers: dict[str, Int[np.ndarray, "seq"]]
    mask: Bool[np.ndarray, "query key"]
    targets: list[str] | None
    weights: Float[np.ndarray, "seq"] | None

    @classmethod
    def of(
        cls, batch: Batch, targets: TokenTargets | None, tokenizer: Tokenizer, causal: bool
    ) -> TokenStack:
        """The stack that reads this batch of one row."""
        tokens, segments = batch.tokens[0], batch.segments[0]
        numbers = {
            name: getattr(batch, field)[0]
            for field, name in ROWS.items()
            if getattr(batch, field) is not None
        }
        if len(np.unique(segments)) == 1:
            del numbers["segment"]
        return cls(
            texts=token_texts(tokenizer, tokens),
            is_special=np.isin(tokens, list(tokenizer.special.values())),
            shades=2 * _parts(batch, causal) + (segments + 1) % 2,
            numbers=numbers,
            mask=_dense(batch.mask(causal), len(tokens), len(tokens)),
            targets=None if targets is None else token_texts(tokenizer, targets.tokens[0]),
            weights=None if targets is None else targets.weights[0],
        )


def token_texts(tokenizer: Tokenizer, tokens: Int[np.ndarray, "seq"]) -> list[str]:
    """Each token as it can be read in a picture.

    Special tokens have their names, a space is ▁, a tab →, the end of a line ↵; what is not to be
    read, as a part of a character, has its bytes in hexadecimal.
    """
    names = {token: name for name, token in tokenizer.special.items()}
    texts = []
    for token in tokens.tolist():
        spelt = tokenizer.token_bytes(token)
        text = names.get(token) or spelt.decode("utf-8", "replace")
        text = text.translate({ord(" "): "▁", ord("\n"): "↵", ord("\t"): "→"})
        readable = text.isprintable() and "\ufffd" not in text
        texts.append(text if readable else f"<{spelt.hex(' ').upper()}>")
    return texts


def _parts(batch: Batch, causal: bool) -> Int[np.ndarray, "seq"]:
    """Kind of each token: of its segment's lowest rank (context), or of a higher one."""
    segments = batch.segments[0]
    parts = np.full(segments.shape, WRITTEN if causal else CONTEXT)
    if batch.ranks is not None:
        for segment in np.unique(segments):
            ranks = np.where(segments == segment, batch.ranks[0], np.iinfo(np.int32).max)
            parts[ranks == ranks.min()] = CONTEXT
    return np.where(segments == 0, PADDING, parts)


def _dense(mask: Mask, queries: int, keys: int) -> Bool[np.ndarray, "query key"]:
    return np.asarray(mask.dense(queries, keys))[0, 0]


def cross_mask(batch: Batch) -> Bool[np.ndarray, "query key"] | None:
    """Mask of the encoder's tokens that each token of the decoder sees."""
    if batch.encoder is None:
        return None
    segments, source = batch.segments, batch.encoder.segments
    mask = Mask(query_segments=segments, key_segments=source)
    return _dense(mask, segments.shape[1], source.shape[1])
