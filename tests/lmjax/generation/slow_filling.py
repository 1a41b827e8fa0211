"""Blanks filled without a cache: every row written down and read anew for each token, greedily."""

import numpy as np

from lmjax.models.batch import Batch


def padded(length=64, **rows):
    """A batch of one row; what is left over is padding that nobody sees."""
    size = len(rows["tokens"])
    fields = {name: np.pad(row, (0, length - size))[None] for name, row in rows.items()}
    segments = np.pad(np.ones(size, np.int32), (0, length - size))[None]
    return Batch(segments=segments, **{k: v.astype(np.int32) for k, v in fields.items()})


def slowly(logits, context, blanks, most, sop, stop, running=False):
    """Tokens of each blank, as GLM writes them.

    Args:
      logits: of a whole batch of one row.
      context: tokens of the text.
      blanks: the mask tokens.
      most: tokens of a blank.
      sop: the token that begins a blank's content.
      stop: tokens that end it.
      running: positions go on behind the text.
    """
    size, spans = len(context), []
    places = np.flatnonzero(np.isin(context, blanks)).tolist()
    for _ in places:
        spans.append([])
        while len(spans[-1]) < most:
            tokens, positions, inside = list(context), list(range(size)), [0] * size
            for where, span in zip(places, spans):
                for number, token in enumerate([sop, *span]):
                    positions.append(len(tokens) if running else where)
                    inside.append(0 if running else number + 1)
                    tokens.append(token)
            ranks = [0] * size + list(range(size, len(tokens)))
            row = padded(
                tokens=np.array(tokens),
                positions=np.array(positions),
                ranks=np.array(ranks),
                block_positions=np.array(inside),
            )
            token = int(np.argmax(logits(row)[len(tokens) - 1]))
            if token in stop:
                break
            spans[-1].append(token)
    return spans


def slow_sentinels(logits, source, sentinels, most, start, stop):
    """Tokens behind each sentinel, as T5 writes them; the encoder reads `source`."""
    encoder = padded(tokens=np.array(source), positions=np.arange(len(source)))
    tokens, spans = [start], []
    for sentinel in sentinels:
        tokens.append(sentinel)
        spans.append([])
        while len(spans[-1]) < most:
            row = padded(tokens=np.array(tokens), positions=np.arange(len(tokens)))
            row = Batch(**{**vars(row), "encoder": encoder})
            token = int(np.argmax(logits(row)[len(tokens) - 1]))
            if token in stop:
                break
            tokens.append(token)
            spans[-1].append(token)
    return spans
