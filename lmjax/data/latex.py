"""LaTeX sources, as arXiv has them: files, folders and archives of papers."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterator

from lmjax.config import config
from lmjax.data.documents import Document, OnSkip, Part
from lmjax.data.file_source import FileSource, too_long
from lmjax.data.files import open_file, read_blocks

ENDINGS = (".tex", ".tex.gz", ".tar", ".tar.gz", ".tgz")
ARCHIVES = (".tar", ".tar.gz", ".tgz")
BEGIN = r"\begin{document}"
INPUT = re.compile(r"\\(?:input|include|subfile)\s*\{([^{}]+)\}")
COMMENT = re.compile(r"(?<!\\)((?:\\\\)*)%.*")
DEEPEST = 8  # files within files


@config
class LatexFiles(FileSource):
    """Papers in LaTeX: files, of a folder all that are in it, and archives of a paper each.

    The text of a document is its source with the files that it reads in place of their names; the
    step `LatexText` takes comments, preamble and macros out. Files without a beginning of a
    document are parts of others, and are left out.
    """

    def endings(self) -> tuple[str, ...]:
        """See `FileSource.endings`."""
        return ENDINGS

    def documents_of(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `FileSource.documents_of`."""
        if part.name.endswith(ARCHIVES):
            files = self._members(part, on_skip)
        else:
            data = self.whole(part, on_skip)
            name = os.path.basename(part.name).removesuffix(".gz")
            files = None if data is None else {name: _decoded(data)}
        if files is None:
            return
        found = False
        for name, text in sorted(files.items()):
            if BEGIN in without_comments(text):
                found = True
                if part.name.endswith(ARCHIVES):
                    whole = inlined(text, files.get)
                    identity = f"{part.name}:{name}"
                else:
                    whole = inlined(text, self._beside(part.name, on_skip))
                    identity = part.name
                yield Document(whole, identity, metadata={"file": part.name})
        if not found and part.name.endswith(ARCHIVES):
            self.refuse(f"{part.name} has no paper in LaTeX", on_skip)

    def _members(self, part: Part, on_skip: OnSkip) -> dict[str, str] | None:
        """Texts of an archive's files in LaTeX, by their names; None where it is left out."""
        found: dict[str, str] = {}
        size = 0
        with open_file(part.name) as raw:
            file = _Blocks(read_blocks(raw, part.name))
            try:
                with tarfile.open(fileobj=file, mode="r|*") as archive:
                    for member in archive:
                        if not (member.isfile() and member.name.lower().endswith(".tex")):
                            continue
                        size += member.size
                        if self.longest is not None and size > self.longest:
                            on_skip(too_long(part.name, size))
                            return None
                        data = archive.extractfile(member).read()
                        found[member.name.removeprefix("./")] = _decoded(data)
            except tarfile.TarError as error:
                self.refuse(f"{part.name} is no archive: {error}", on_skip)
                return None
        return found

    def _beside(self, path: str, on_skip: OnSkip) -> Callable[[str], str | None]:
        """Reads files of the folder of another one; nothing outside of it."""
        folder = os.path.realpath(os.path.dirname(os.path.abspath(path)))

        def read(name: str) -> str | None:
            wanted = os.path.realpath(os.path.join(folder, name))
            if not wanted.startswith(folder + os.sep) or not os.path.isfile(wanted):
                return None
            if self.longest is not None and (size := os.path.getsize(wanted)) > self.longest:
                on_skip(too_long(wanted, size))
                return None
            with open(wanted, "rb") as file:
                return _decoded(file.read())

        return read


class _Blocks:
    """Blocks of bytes as a file, to be read from its beginning to its end."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, b""

    def read(self, size: int) -> bytes:
        """The next bytes: as many, or fewer at the end."""
        while len(self._rest) < size and (block := next(self._blocks, b"")):
            self._rest += block
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


def inlined(text: str, read: Callable[[str], str | None], depth: int = 0) -> str:
    """A source with the files that it reads; what is not there stays as it is.

    Args:
        text: the source.
        read: name of a file -> its source; None: there is none.
        depth: files around it.
    """

    def content(match: re.Match[str]) -> str:
        line = match.string.rfind("\n", 0, match.start()) + 1
        if COMMENT.search(match.string[line : match.start()]):
            return match.group()  # in a comment
        name = match[1].strip()
        for one in (name, f"{name}.tex"):
            if (found := read(one)) is not None:
                return inlined(found, read, depth + 1)
        return match.group()

    return INPUT.sub(content, text) if depth < DEEPEST else text


def without_comments(text: str) -> str:
    """A source without comments; a line that is one goes with its end."""
    kept = []
    for line in text.split("\n"):
        short = COMMENT.sub(r"\1", line)
        if short.strip() or not line.strip() or short == line:
            kept.append(short if short == line else short.rstrip())
    return "\n".join(kept)


def _decoded(data: bytes) -> str:
    """Text of a source: UTF-8, or else Latin-1, which most older papers have."""
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return data.decode("latin-1").replace("\r\n", "\n")
