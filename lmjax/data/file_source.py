"""The base of sources of files with a format of their own: pages, archives of the web, tables."""

from __future__ import annotations

import abc
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any, Literal

from lmjax.config import UserError, config, replace, to_json
from lmjax.data.documents import BadRecord, Document, HashFiles, OnSkip, Part, Source, digest
from lmjax.data.files import DamagedFile, file_parts, find_files, open_file, read_blocks
from lmjax.data.hashes import FileHashes
from lmjax.remote import check_path

EXTRA = "pip install 'lmjax[data]'"


@config
class FileSource(Source):
    """Base of sources that read files one by one."""

    path: str | tuple[str, ...]  # path, URL, folder or glob pattern, or several
    on_error: Literal["raise", "skip"] = "raise"  # what to do about what cannot be read
    # bytes of a document; longer ones are left out and counted, and never held; None: all are taken
    longest: int | None = None

    def validate(self) -> None:
        """Raises UserError for a path that cannot be served, or a limit that lets nothing by."""
        check_paths(self.path)
        check_longest(self.longest)

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
        hashes = (hash_files or FileHashes())(self.files())
        return digest(settings_digest(self, added_later=("longest",)), *hashes)

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

    def whole(self, part: Part, on_skip: OnSkip) -> bytes | None:
        """The bytes of a file; None for a file above `longest`, which is told.

        Raises:
            DamagedFile: see `read_blocks`.
        """
        blocks, size = [], 0
        with open_file(part.name) as file:
            for block in read_blocks(file, part.name):
                size += len(block)
                if self.longest is not None and size > self.longest:
                    on_skip(too_long(part.name, size))
                    return None
                blocks.append(block)
        return b"".join(blocks)

    def refuse(self, message: str | BadRecord, on_skip: OnSkip) -> None:
        """Tells that something is left out.

        Raises:
            UserError: the source says to stop there.
        """
        if self.on_error == "raise":
            raise UserError(f"{message}\n(on_error=skip leaves it out and counts it)") from None
        on_skip(str(message))


def check_paths(path: str | tuple[str, ...]) -> None:
    """Raises UserError for a URL that cannot be served."""
    for each in (path,) if isinstance(path, str) else path:
        check_path(each, "path")


def check_longest(longest: int | None) -> None:
    """Raises UserError for a limit that lets nothing through."""
    if longest is not None and longest < 1:
        raise UserError(f"longest={longest}: must be 1 or more bytes, or None")


def too_long(identity: str, size: int) -> str:
    """The message about a document that is not held, of so many bytes or more."""
    return f"{identity}: {size} bytes or more are above `longest`"


def settings_digest(source: Source, added_later: tuple[str, ...]) -> str:
    """12 hexadecimal digits that change with a source's settings, but for its path.

    Args:
        source: has `path`.
        added_later: settings that are younger than some runs; without an effect they are left out,
            so that runs from before them know their text.
    """
    values: dict[str, Any] = json.loads(to_json(replace(source, path="")))
    for name in added_later:
        if not values.get(name):
            values.pop(name, None)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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
