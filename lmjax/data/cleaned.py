"""The documents of a finished cleaning, to be tokenized and trained on."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from lmjax.config import UserError, config
from lmjax.data.cleaning.formats import format_of
from lmjax.data.cleaning.shard_pass import DOCUMENTS
from lmjax.data.cleaning.summary import SUMMARY
from lmjax.data.documents import Document, HashFiles, OnSkip, Part, Source, digest
from lmjax.data.hashes import FileHashes
from lmjax.files import local_path


@config
class CleanedDocuments(Source):
    """Documents of a collection, or of all, in the output of a `Cleaning`."""

    path: str  # folder: the output of the cleaning
    collection: str = ""  # name of one; empty: all

    def validate(self) -> None:
        """Raises UserError for a URL."""
        local_path(self.path, "path")

    def parts(self) -> tuple[Part, ...]:
        """See `Source.parts`."""
        return tuple(
            Part(str(path), size=path.stat().st_size)
            for path in self._files()
            if path.stat().st_size
        )

    def fingerprint(self, hash_files: HashFiles | None = None) -> str:
        """See `Source.fingerprint`: the content of the files."""
        files = [str(path) for path in self._files()]
        return digest("CleanedDocuments", *(hash_files or FileHashes())(files))

    def read(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `Source.read`."""
        path = pathlib.Path(part.name)
        yield from format_of(path).read(path)

    def _files(self) -> list[pathlib.Path]:
        folder = local_path(self.path, "path")
        if not (folder / SUMMARY).is_file():
            raise UserError(
                f"path={self.path} has no finished cleaning (there is no {SUMMARY}): run it first"
            )
        folders = sorted((folder / DOCUMENTS).iterdir())
        names = [one.name for one in folders]
        if self.collection and self.collection not in names:
            raise UserError(
                f"collection={self.collection}: {self.path} has {', '.join(names) or 'none'}"
            )
        chosen = [one for one in folders if self.collection in ("", one.name)]
        return sorted(path for one in chosen for path in one.rglob("*") if format_of(path))
