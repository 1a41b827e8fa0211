"""Metadata of documents: kept beside the tokens, compressed."""

import bisect
import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int64

from lmjax.config import UserError

BLOCK = 1024  # documents that are compressed together, and read again together
EMPTY = "{}"


class MetadataWriter:
    """Writes blocks of documents: a compressed JSON array each, or nothing where all is empty."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._waiting: list[str] = []  # a JSON object of each document
        self._sizes: list[tuple[int, int]] = []

    def add(self, metadata: Mapping[str, Any] | None, identity: str) -> None:
        """Takes that of the next document.

        Raises:
            UserError: it is not JSON; says so with the document's identity.
        """
        try:
            encoded = json.dumps(metadata, separators=(",", ":")) if metadata else EMPTY
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{identity}: the metadata of a document has to be JSON: {error}"
            ) from None
        self._waiting.append(encoded)
        if len(self._waiting) == BLOCK:
            self._write()

    def finish(self) -> Int64[np.ndarray, "blocks 2"]:
        """Writes what is left; gives how many documents and bytes each block has."""
        if self._waiting:
            self._write()
        return np.asarray(self._sizes, np.int64).reshape(-1, 2)

    def _write(self) -> None:
        data = b""
        if any(encoded != EMPTY for encoded in self._waiting):
            data = zlib.compress(f"[{','.join(self._waiting)}]".encode())
        self._file.write(data)
        self._sizes.append((len(self._waiting), len(data)))
        self._waiting.clear()


def block_edges(sizes: Int64[np.ndarray, "blocks 2"]) -> Int64[np.ndarray, "2 edges"]:
    """The first document and the first byte of each block, and one past the last of all."""
    edges = np.zeros((2, len(sizes) + 1), np.int64)
    np.cumsum(sizes.T, axis=1, out=edges[:, 1:])
    return edges


class MetadataReader:
    """Reads the metadata of any document; the last block that was read is kept."""

    def __init__(self, path: pathlib.Path, edges: Int64[np.ndarray, "2 edges"]):
        self._path = path
        self._documents, self._bytes = edges.tolist()
        self._block, self._found = -1, []

    def __getitem__(self, document: int) -> dict[str, Any]:
        block = bisect.bisect_right(self._documents, document) - 1
        if block != self._block:
            first, end = self._bytes[block : block + 2]
            with open(self._path, "rb") as file:
                file.seek(first)
                data = file.read(end - first)
            count = self._documents[block + 1] - self._documents[block]
            self._found = json.loads(zlib.decompress(data)) if data else [{}] * count
            self._block = block
        return dict(self._found[document - self._documents[block]])
