"""Pages of the web that are saved as files."""

from __future__ import annotations

from collections.abc import Iterator

from lmjax.config import config
from lmjax.data.documents import Document, OnSkip, Part
from lmjax.data.encodings import decode_page
from lmjax.data.file_source import FileSource

ENDINGS = (".html", ".htm", ".xhtml", ".html.gz", ".htm.gz")


@config
class HtmlFiles(FileSource):
    """HTML pages, a file each, in any encoding; of a folder all that are in it.

    The text of a document is the page's markup: the step `MainText` makes text of it.
    """

    def endings(self) -> tuple[str, ...]:
        """See `FileSource.endings`."""
        return ENDINGS

    def documents_of(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `FileSource.documents_of`."""
        data = self.whole(part, on_skip)
        if data is None:
            return
        if b"\0" in data[:512] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
            self.refuse(f"{part.name} is no page: there are zeros among its first bytes", on_skip)
            return
        if (text := decode_page(data)) and not text.isspace():
            yield Document(text, part.name, metadata={"file": part.name})
