"""The base of sources of files with a format of their own: pages, archives of the web, tables."""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator
from typing import Literal

from lmjax.config import UserError, config, fingerprint, replace
from lmjax.data.documents import BadRecord, Document, HashFiles, OnSkip, Part, Source, digest
from lmjax.data.files import DamagedFile, file_parts, find_files
from lmjax.data.hashes import FileHashes
from lmjax.remote import check_path

EXTRA = "pip install 'lmjax[data]'"


@config
class FileSource(Source):
    """Base of sources that read files one by one."""

    path: str | tuple[str, ...]  # path, URL, folder or glob pattern, or several
    on_error: Literal["raise", "skip"] = "raise"  # what to do about what cannot be read

    def validate(self) -> None:
        """Raises UserError for a path that cannot be served."""
        for each in (self.path,) if isinstance(self.path, str) else self.path:
            check_path(each, "path")

    def endings(self) -> tuple[str, ...]:
        """Endings of the files to be read of a folder; none: a folder is refused."""
        return ()

    def files(self) -> tuple[str, ...]:
        """The files, in order. UserError: there are none."""
        patterns: list[str] = []
        for each in (self.path,) if isinstance(self.path, str) else self.path:
            if self.endings() and os.path.isdir(os.path.expanduser(each)):
                patterns += _inside(os.path.expanduser(each), self.endings())
            else:
                patterns.append(each)
        return find_files(tuple(patterns))

    def parts(self) -> tuple[Part, ...]:
        """See `Source.parts`: a file each."""
        return file_parts(self.files(), divide=False)

    def fingerprint(self, hash_files: HashFiles | None = None) -> str:
        """See `Source.fingerprint`: settings and content of the files, wherever they are."""
        settings = fingerprint(replace(self, path=""))
        return digest(settings, *(hash_files or FileHashes())(self.files()))

    @abc.abstractmethod
    def documents_of(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """The documents of a part.

        Args:
            part: of `parts`.
            on_skip: for `refuse`.

        Raises:
            DamagedFile: the file, or what is left of it, cannot be read.
        """

    def read(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `Source.read`."""
        try:
            yield from self.documents_of(part, on_skip)
        except DamagedFile as error:
            self.refuse(f"{error}; the rest of it is left out", on_skip)

    def refuse(self, message: str | BadRecord, on_skip: OnSkip) -> None:
        """Tells that something is left out.

        Raises:
            UserError: the source says to stop there.
        """
        if self.on_error == "raise":
            raise UserError(f"{message}\n(on_error=skip leaves it out and counts it)") from None
        on_skip(str(message))


def _inside(folder: str, endings: tuple[str, ...]) -> list[str]:
    """The files of a folder and those inside it with one of some endings, in order.

    Raises:
        UserError: there are none.
    """
    found = [
        os.path.join(where, name)
        for where, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(endings)
    ]
    if not found:
        raise UserError(f"the folder {folder} has no file that ends with {', '.join(endings)}")
    return sorted(found)
