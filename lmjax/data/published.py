"""Readers of published corpora, in the layout of their files. Each docstring names the licence.

Nothing is downloaded: the files are yours. A licence of a collection does not replace those of the
texts in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from lmjax.config import UserError, config, preset
from lmjax.data.documents import BadRecord, Document, OnSkip, Part
from lmjax.data.file_source import FileSource, too_long
from lmjax.data.files import open_file, read_blocks
from lmjax.data.sources import JsonLines, JsonRecords

Paths = str | tuple[str, ...]
BETWEEN = re.compile(r"[,\s]*")  # two objects of an array


@preset
def c4_files(path: Paths) -> JsonLines:
    """C4 and mC4 as the Allen Institute publishes them: c4-train.*.json.gz.

    Licence: ODC-BY 1.0, and Common Crawl's terms of use.

    Args:
        path: files.
    """
    return JsonLines(path=path, metadata=("url", "timestamp"))


@preset
def wikipedia_files(path: Paths) -> JsonLines:
    """Wikipedia in plain text, as WikiExtractor writes it with --json: wiki_00, wiki_01, ...

    Licence: CC BY-SA 4.0 and GFDL; articles written before June 2023 CC BY-SA 3.0.

    Args:
        path: files.
    """
    return JsonLines(path=path, metadata=("id", "title", "url"))


@preset
def skypile_files(path: Paths) -> JsonLines:
    """SkyPile-150B (Wei et al. 2023, arXiv:2310.19341): Chinese pages.

    Licence: Skywork Community License, which has conditions for commercial use.

    Args:
        path: files, data/*.jsonl.
    """
    return JsonLines(path=path)


@config
class FirstField(JsonRecords):
    """JSON lines whose text is in the first of several fields that a line has."""

    fields: tuple[str, ...] = ("text", "content", "data")  # names, in order

    def documents_of(self, record: dict[str, Any], identity: str) -> Iterator[Document]:
        """See `JsonRecords.documents_of`."""
        name = next((one for one in self.fields if one in record), None)
        if name is None:
            raise BadRecord(f"there is none of the fields {', '.join(self.fields)}")
        if text := self._text(record, name):
            yield Document(text, identity, metadata=self.metadata_of(record))


@preset
def yayi2_files(path: Paths) -> FirstField:
    """YAYI 2's pretraining data (Luo et al. 2023, arXiv:2312.14862): part_*.jsonl.

    Licence: Apache-2.0. The name of the field with the text is that which a line has.

    Args:
        path: files.
    """
    return FirstField(path=path)


@config
class PileFiles(JsonRecords):
    """The Pile's layout (Gao et al. 2020, arXiv:2101.00027): "text", and "meta" with its subset.

    Also that of RedPajama and SlimPajama. Licence: the Pile is published under MIT, its parts have
    their own, of which some forbid what others allow; Books3 was withdrawn.
    """

    subsets: tuple[str, ...] = ()  # such as "ArXiv" and "PubMed Central"; empty: all
    # Keys of `meta` with the name of the subset, of which the first that is there counts.
    keys: tuple[str, ...] = ("pile_set_name", "redpajama_set_name", "source")

    def documents_of(self, record: dict[str, Any], identity: str) -> Iterator[Document]:
        """See `JsonRecords.documents_of`."""
        meta = record.get("meta")
        if not isinstance(meta, dict):
            raise BadRecord("there is no object in the field 'meta'")
        subset = next((str(meta[key]) for key in self.keys if key in meta), "")
        if self.subsets and subset not in self.subsets:
            return
        if text := self._text(record, "text"):
            about = (self.metadata_of(record) or {}) | ({"subset": subset} if subset else {})
            yield Document(text, identity, metadata=about or None)


@config
class WuDaoFiles(FileSource):
    """WuDaoCorpora's layout (Yuan et al. 2021): a file has an array of objects.

    Each has "title", "content" and "dataType"; the text is the title, where there is one, and the
    content after it. Licence: WuDao's own agreement for research; it is no open one. An array is
    read piece by piece.
    """

    kinds: tuple[str, ...] = ()  # of "dataType" that are read, such as one for encyclopaedias
    title: bool = True  # put the title before the text

    def endings(self) -> tuple[str, ...]:
        """See `FileSource.endings`."""
        return (".json", ".json.gz", ".json.zst")

    def documents_of(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `FileSource.documents_of`."""
        for number, record in enumerate(self._records(part, on_skip)):
            identity = f"{part.name}:{number}"
            content = record.get("content") if isinstance(record, dict) else None
            if not isinstance(content, str):
                self.refuse(f"{identity}: there is no text in the field 'content'", on_skip)
                continue
            kind = str(record.get("dataType") or "")
            if not content.strip() or (self.kinds and kind not in self.kinds):
                continue
            title = str(record.get("title") or "") if self.title else ""
            text = f"{title}\n{content}" if title else content
            yield Document(text, identity, metadata={"kind": kind} if kind else None)

    def _records(self, part: Part, on_skip: OnSkip) -> Iterator[Any]:
        """The objects of a file's array, with little more than one of them in memory."""
        decoder, text, begun = json.JSONDecoder(), "", False
        with open_file(part.name) as file:
            for piece in _texts(read_blocks(file, part.name), part.name):
                text += piece
                if not begun:
                    text = text.lstrip("\ufeff \t\r\n")
                    if text and not text.startswith("["):
                        self.refuse(f"{part.name} has no array of objects", on_skip)
                        return
                    begun, text = bool(text), text[1:]
                at = BETWEEN.match(text).end()
                while True:
                    try:
                        record, end = decoder.raw_decode(text, at)
                    except ValueError:
                        break  # the rest of the object comes with the next piece
                    if self.longest is None or end - at <= self.longest:
                        yield record
                    else:
                        on_skip(too_long(f"{part.name}, an object", end - at))
                    at = BETWEEN.match(text, end).end()
                text = text[at:]
                if self.longest is not None and len(text) > self.longest:
                    # Where it ends is not known, and neither is what follows.
                    on_skip(f"{too_long(part.name, len(text))}; the rest of it is left out")
                    return
        if text.strip() != "]":
            self.refuse(f"{part.name} ends in the middle of its array: {text[:40]!r}", on_skip)


def _texts(blocks: Iterator[bytes], name: str) -> Iterator[str]:
    """Blocks of UTF-8 as texts. UserError: they are something else."""
    rest = b""
    for block in blocks:
        data = rest + block
        # A character that is cut is left for the next one.
        cut = next((n for n in range(1, 4) if n <= len(data) and data[-n] >= 0xC0), 0)
        whole, rest = (data[: len(data) - cut], data[len(data) - cut :]) if cut else (data, b"")
        try:
            yield whole.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not UTF-8 ({error.reason})") from None
    if rest:
        yield rest.decode("utf-8", "replace")
