"""ONNX files of `lmjax.interop.onnx_file`, run by onnxruntime.

model = OnnxModel("quickstart.onnx")
model.greedy([[5, 2, 7], [3]], max_tokens=20)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lmjax.config import UserError

Arrays = dict[str, np.ndarray]


class OnnxModel:
    """A model that continues texts, and its encoder where it has one."""

    def __init__(self, path: str | os.PathLike, threads: int = 0):
        """Loads a file; UserError where onnxruntime is missing or cannot.

        Args:
          path: of the file; NAME.encoder.onnx beside it is its encoder.
          threads: of one operator; 0: as many as there are cores.
        """
        path = Path(path)
        self.session = session(path, threads)
        encoder = path.with_suffix(f".encoder{path.suffix}")
        self.encoder = session(encoder, threads) if encoder.exists() else None
        self.inputs = {one.name: one for one in self.session.get_inputs()}

    def run(self, given: Mapping[str, np.ndarray], past: Arrays) -> tuple[np.ndarray, Arrays]:
        """Logits [batch, new, vocab] and the cache after the new tokens.

        Args:
          given: inputs by name.
          past: the cache before them; empty at first.
        """
        names = [name for name in self.inputs if name.startswith("past_key_values.")]
        if not past:
            rows = len(given["input_ids"])
            past = {name: empty(self.inputs[name], rows) for name in names}
        known = {name: array for name, array in given.items() if name in self.inputs}
        logits, *present = self.session.run(None, {**known, **past})
        return logits, dict(zip(names, present, strict=True))

    def encode(self, sources: Sequence[Sequence[int]]) -> Arrays:
        """Inputs of the decoder that an encoder gives for its texts."""
        ids, mask = left_padded(sources)
        names = [one.name for one in self.encoder.get_outputs()]
        found = self.encoder.run(None, {"input_ids": ids, "attention_mask": mask})
        return dict(zip(names, found)) | {"encoder_attention_mask": mask}

    def greedy(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sources: Sequence[Sequence[int]] | None = None,
        prefix: bool = False,
    ) -> list[list[int]]:
        """The most likely continuation of each prompt, token by token.

        Args:
          prompts: token ids, of any lengths.
          max_tokens: of each continuation.
          sources: what an encoder reads, for a model with one.
          prefix: prompts are read from both sides (objective PrefixLM).
        """
        read = {} if sources is None else self.encode(sources)
        ids, mask = left_padded(prompts)
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        past: Arrays = {}
        found = []
        for _ in range(max_tokens):
            ranks = np.zeros_like(positions) if prefix and not past else positions
            given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            logits, past = self.run(given | {"ranks": ranks} | read, past)
            ids = logits[:, -1].argmax(axis=-1)[:, None]
            found.append(ids[:, 0])
            positions = positions[:, -1:] + 1
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        return np.stack(found, axis=1).tolist() if found else [[] for _ in prompts]


def session(path: Path, threads: int = 0) -> Any:
    """A file in onnxruntime on the CPU."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            "ONNX files are run by the package onnxruntime: pip install 'lmjax[onnx]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of classes that are not public
        raise UserError(f"onnxruntime cannot load {path}: {error}") from None


def empty(one: Any, rows: int) -> Float[np.ndarray, "batch heads past head_dim"]:
    """A cache input without tokens."""
    _, heads, _, width = one.shape
    return np.zeros((rows, heads, 0, width), np.float32)


def left_padded(
    rows: Sequence[Sequence[int]],
) -> tuple[Int[np.ndarray, "batch seq"], Int[np.ndarray, "batch seq"]]:
    """Rows of tokens that end together, and the mask of what is no padding."""
    length = max(map(len, rows))
    ids, mask = (np.zeros((len(rows), length), np.int64) for _ in range(2))
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = row
        mask[number, length - len(row) :] = 1
    return ids, mask
