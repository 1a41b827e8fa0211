"""Rows of a text file, by which compression is calibrated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Int

from lmjax.config import UserError
from lmjax.data.tokenizers import Tokenizer
from lmjax.files import errors_told, local_path


def calibration_rows(
    path: str | None, tokenizer: Tokenizer | None, source: str, rows: int, length: int
) -> Int[np.ndarray, "rows length"] | None:
    """Rows of a calibration text, without padding; None where none is named.

    Args:
      path: of the text file.
      tokenizer: of the model; None: it has none.
      source: folder of the model, for messages.
      rows: most rows.
      length: tokens of a row.

    Raises:
      UserError: the file cannot be read or is too short, or there is no tokenizer.
    """
    if path is None:
        return None
    if tokenizer is None:
        raise UserError(f"{source} has no tokenizer, which calibration=FILE needs")
    path = local_path(path, "calibration")
    with errors_told(f"calibration={path} cannot be read"):
        text = Path(path).read_text("utf-8", errors="replace")
    # A few times as many letters as tokens are enough.
    tokens = np.array(tokenizer.encode(text[: 16 * rows * length]), np.int32)
    count = min(rows, len(tokens) // length)
    if not count:
        raise UserError(
            f"calibration={path} has {len(tokens)} tokens, less than a row of length={length}"
        )
    return tokens[: count * length].reshape(count, length)
