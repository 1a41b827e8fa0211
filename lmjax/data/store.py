"""The token store: a tokenized corpus on disk, memory-mapped, that knows what it was made from."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt

from lmjax.config import UserError
from lmjax.data.metadata import MetadataReader
from lmjax.data.round_trip import RoundTrip
from lmjax.data.tokenizers import Tokenizer, token_type
from lmjax.files import local_path

FORMAT = 3  # of the files; a store of another format is made anew
MANIFEST_FILE = "manifest.json"
TOKENS_FILE = "tokens.bin"
OFFSETS_FILE = "documents.npy"
BYTES_FILE = "document_bytes.npy"
SPANS_FILE = "spans.npy"
LABELS_FILE = "labels.npy"
METADATA_FILE = "metadata.bin"
METADATA_BLOCKS_FILE = "metadata.npy"  # first document and first byte of each of its blocks
TEXT_FILE = "text.bin"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of a store, and the source and tokenizer that it was made from."""

    format: int
    source: str  # fingerprint of the source
    tokenizer: str  # fingerprint of the tokenizer
    split: str  # "all", "train" or "held_out"
    held_out: float  # fraction of the documents that is held out
    vocab_size: int
    tokens: int
    largest: int  # of all ids
    documents: int
    text_bytes: int  # UTF-8 bytes of the text, separators not counted
    round_trip: RoundTrip  # what the tokens do not hold of the text
    separator: int | None  # token that ends a document and begins the next one, if one does both
    skipped: int  # pieces of input that were left out
    skipped_first: tuple[str, ...]  # what was wrong with the first of them
    sizes: dict[str, int]  # bytes of each file
    sha256: str  # of the tokens


class TokenStore:
    """A tokenized corpus: one long array of tokens, and where its documents begin.

    Tokens may not hold all of a text, so the first documents are kept as they were, too.

    Documents lie one after another, each as `[begin] + ids + [end]`, or `[separator] + ids` where
    the tokenizer has one token for both. Answers and turns are known by their borders (`spans`);
    special tokens may stand around them. Pickles as its path, so that workers map it themselves.

    Attributes:
      tokens: the ids, uint16 or uint32, mapped from the file.
      offsets: where each document begins, and the length of `tokens` at the end.
      document_bytes: UTF-8 bytes of each document's text.
      spans: of each answer or turn its first token, one past its last, and the number of its kind
        (`lmjax.data.spans.KINDS`); rising, without overlap.
      labels: numbers to learn of each document; no column where its source has none. A further
        column may be in a file of its own, as what another model says of the documents.
      manifest: counts and fingerprints.
    """

    def __init__(self, folder: str | os.PathLike, further_labels: str | None = None):
        """Maps the store in `folder`.

        Args:
            folder: with the store's files.
            further_labels: a file of numpy's with one more label of each document.

        Raises:
            UserError: there is none, it is of another format, or its files were cut.
        """
        self._further_labels = further_labels
        self.folder = local_path(folder, "folder")
        self.manifest = _read_manifest(self.folder)
        for name, size in self.manifest.sizes.items():
            path = self.folder / name
            found = path.stat().st_size if path.exists() else None
            if found != size:
                raise UserError(
                    f"the token store {self.folder} is damaged: {name} should have {size} bytes "
                    f"and {'is missing' if found is None else f'has {found}'}; delete "
                    f"{self.folder.parent}, and it is made again"
                )
        # As plain arrays over the maps: numpy's own class for maps is slow in small operations.
        self.tokens: UInt[np.ndarray, "tokens"] = np.asarray(
            np.memmap(self.folder / TOKENS_FILE, token_type(self.manifest.vocab_size), mode="r")
        )
        self.offsets: Int64[np.ndarray, "documents+1"] = np.asarray(
            np.load(self.folder / OFFSETS_FILE, mmap_mode="r")
        )
        self.document_bytes: Int64[np.ndarray, "documents"] = np.asarray(
            np.load(self.folder / BYTES_FILE, mmap_mode="r")
        )
        self.spans: Int64[np.ndarray, "3 spans"] = np.zeros((3, 0), np.int64)
        if SPANS_FILE in self.manifest.sizes:
            self.spans = np.asarray(np.load(self.folder / SPANS_FILE, mmap_mode="r"))
        self.labels: Float32[np.ndarray, "documents labels"] = np.zeros(
            (self.manifest.documents, 0), np.float32
        )
        if LABELS_FILE in self.manifest.sizes:
            self.labels = np.asarray(np.load(self.folder / LABELS_FILE, mmap_mode="r"))
        if further_labels is not None:
            self.labels = np.column_stack([self.labels, np.load(further_labels)])

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (str(self.folder), self._further_labels)

    def __repr__(self) -> str:
        return f"TokenStore({str(self.folder)!r})"

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all the text: what bits per byte are divided by."""
        return self.manifest.text_bytes

    def not_comparable(self) -> str:
        """Reason why bits per byte of this text would mean nothing; empty where they are right."""
        if not self.text_bytes:
            return "not comparable: there is no byte of text"
        return self.manifest.round_trip.not_comparable()

    def source_texts(self) -> Iterator[bytes]:
        """The first documents as the source has them, in UTF-8: up to 16 MB, the last one whole."""
        with open(self.folder / TEXT_FILE, "rb") as file:
            left = os.fstat(file.fileno()).st_size
            for length in self.document_bytes:
                left -= int(length)
                if left < 0:
                    return
                yield file.read(int(length))

    def metadata(self, document: int) -> dict[str, Any]:
        """Metadata of a document; empty where its source gives none.

        Neighbouring documents are read together: going through them in order is quick.

        Args:
            document: its number, from 0.

        Raises:
            UserError: there is no document of that number.
        """
        if not 0 <= document < self.manifest.documents:
            raise UserError(
                f"document={document}: {self.folder} has the documents 0 to "
                f"{self.manifest.documents - 1}"
            )
        return {} if self._metadata is None else self._metadata[document]

    @functools.cached_property
    def _metadata(self) -> MetadataReader | None:
        if METADATA_FILE not in self.manifest.sizes:
            return None
        return MetadataReader(
            self.folder / METADATA_FILE, np.load(self.folder / METADATA_BLOCKS_FILE)
        )

    def text(self, document: int, tokenizer: Tokenizer) -> str:
        """Text that the tokens of one document decode to; its source may say more."""
        tokens = self.tokens[self.offsets[document] : self.offsets[document + 1]]
        return tokenizer.decode(tokens.tolist())


def open_store(folder: str | os.PathLike, source: str, tokenizer: str) -> TokenStore:
    """Maps a store, and makes sure that it was made from this source and this tokenizer.

    Args:
        folder: where the store lies.
        source: fingerprint of the source.
        tokenizer: fingerprint of the tokenizer.

    Raises:
        UserError: it was made from something else, or is damaged.
    """
    store = TokenStore(folder)
    for name, expected in (("source", source), ("tokenizer", tokenizer)):
        found = getattr(store.manifest, name)
        if found != expected:
            raise UserError(
                f"the token store {folder} was made from another {name}: its fingerprint is "
                f"{found}, this {name} has {expected}; delete {store.folder.parent} or name "
                "another cache"
            )
    return store


def _read_manifest(folder: pathlib.Path) -> Manifest:
    path = folder / MANIFEST_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise UserError(
                f"the token store {folder} has format {values['format']}, this version reads "
                f"{FORMAT}; delete {folder.parent}, and it is made again"
            )
        values["skipped_first"] = tuple(values["skipped_first"])
        values["round_trip"]["example"] = tuple(values["round_trip"]["example"])
        values["round_trip"] = RoundTrip(**values["round_trip"])
        return Manifest(**values)
    except FileNotFoundError:
        raise UserError(f"there is no token store in {folder}: {path.name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the token store {folder} is damaged: {path.name} cannot be read ({error}); delete "
            f"{folder.parent}, and it is made again"
        ) from None
