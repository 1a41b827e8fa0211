"""Formats of cleaned documents: JSON lines, Parquet, ArrayRecord.

The bytes of a file depend on its documents alone, for one version of the libraries: no time, no
name, no threads.
"""

from __future__ import annotations

import abc
import contextlib
import gzip
import importlib.util
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from lmjax.config import UserError, config
from lmjax.data.documents import BadRecord, Document
from lmjax.data.file_source import EXTRA
from lmjax.data.files import open_file, read_blocks

Add = Callable[[Document], None]  # takes the next document of a file
GROUP = 8 << 20  # bytes of text that make a group of rows in a Parquet file
TFDS_VERSION = "1.0.0"  # of a data set, which is the name of its folder
KEYS = ("text", "id", "group")  # of a line, beside the metadata


@config
class OutputFormat(abc.ABC):
    """Base of the formats of cleaned documents."""

    @property
    @abc.abstractmethod
    def ending(self) -> str:
        """Ending of the files' names."""

    @abc.abstractmethod
    def writer(self, path: pathlib.Path) -> contextlib.AbstractContextManager[Add]:
        """Opens a file, which is complete when the block ends; gives what takes its documents.

        Raises:
            UserError: a library is missing.
        """

    @abc.abstractmethod
    def read(self, path: pathlib.Path) -> Iterator[Document]:
        """The documents of a file."""

    def file_name(self, collection: str, number: int, count: int) -> str:
        """Name of a collection's file, below the collection's folder.

        Args:
            collection: its name.
            number: of the file.
            count: of files.
        """
        return f"{number:05}{self.ending}"

    def description(self, collection: str, documents: Sequence[int]) -> dict[str, str]:
        """Further files of a collection's folder, by their names.

        Args:
            collection: its name.
            documents: of each file, in order.
        """
        return {}


@config
class JsonLinesOutput(OutputFormat):
    """A JSON object a line: "text", "id" (its origin), and the metadata; read by `JsonLines`."""

    compression: Literal["zst", "gz", "none"] = "gz"  # zst is faster, and an extra (zstd)
    level: int = 3  # of the compression

    @property
    def ending(self) -> str:
        """See `OutputFormat.ending`."""
        return ".jsonl" if self.compression == "none" else f".jsonl.{self.compression}"

    @contextlib.contextmanager
    def writer(self, path: pathlib.Path) -> Iterator[Add]:
        """See `OutputFormat.writer`."""
        with open(path, "wb") as raw, self._compressed(raw) as file:
            buffered = io.BufferedWriter(file, 1 << 16) if self.compression == "gz" else file

            def add(document: Document) -> None:
                buffered.write(json.dumps(record_of(document), ensure_ascii=False).encode() + b"\n")

            yield add
            buffered.flush()

    def read(self, path: pathlib.Path) -> Iterator[Document]:
        """See `OutputFormat.read`."""
        rest = b""
        with open_file(str(path)) as file:
            for block in read_blocks(file, str(path)):
                *lines, rest = (rest + block).split(b"\n")
                yield from (document_of(json.loads(line)) for line in lines)

    def _compressed(self, raw: Any) -> contextlib.AbstractContextManager[Any]:
        if self.compression == "none":
            return contextlib.nullcontext(raw)
        if self.compression == "gz":
            return gzip.GzipFile("", "wb", self.level, raw, mtime=0)
        try:
            import zstandard
        except ImportError:
            raise UserError(f"compression=zst needs zstandard: {EXTRA}") from None
        return zstandard.ZstdCompressor(self.level).stream_writer(raw, closefd=False)


def between_passes() -> OutputFormat:
    """The format of what one pass leaves to the next: the quickest that is installed."""
    quickest = "gz" if importlib.util.find_spec("zstandard") is None else "zst"
    return JsonLinesOutput(compression=quickest, level=1)


@config
class ParquetOutput(OutputFormat):
    """Parquet with the columns "text", "id" and "metadata" (JSON); read by `ParquetFiles`."""

    @property
    def ending(self) -> str:
        """See `OutputFormat.ending`."""
        return ".parquet"

    @contextlib.contextmanager
    def writer(self, path: pathlib.Path) -> Iterator[Add]:
        """See `OutputFormat.writer`."""
        library, parquet = _parquet()
        schema = library.schema([(name, library.string()) for name in ("text", "id", "metadata")])
        rows: list[dict[str, str]] = []
        size = 0
        with parquet.ParquetWriter(path, schema, compression="zstd") as file:

            def flush() -> None:
                file.write_table(library.Table.from_pylist(rows, schema))
                rows.clear()

            def add(document: Document) -> None:
                nonlocal size
                metadata = json.dumps(dict(document.metadata or {}), ensure_ascii=False)
                rows.append({"text": document.text, "id": document.identity, "metadata": metadata})
                size += len(document.text)
                if size >= GROUP:
                    flush()
                    size = 0

            yield add
            if rows:
                flush()

    def read(self, path: pathlib.Path) -> Iterator[Document]:
        """See `OutputFormat.read`."""
        _, parquet = _parquet()
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(256):
                for row in batch.to_pylist():
                    metadata = json.loads(row["metadata"])
                    yield Document(row["text"], row["id"], metadata=metadata or None)


@config
class ArrayRecordOutput(OutputFormat):
    """ArrayRecord files as TensorFlow Datasets has them, read by `TFDS` and by TFDS itself."""

    @property
    def ending(self) -> str:
        """See `OutputFormat.ending`."""
        return ".array_record"

    @contextlib.contextmanager
    def writer(self, path: pathlib.Path) -> Iterator[Add]:
        """See `OutputFormat.writer`."""
        from array_record.python import array_record_module

        features = _features()
        file = array_record_module.ArrayRecordWriter(str(path), "group_size:1,max_parallelism:1")

        def add(document: Document) -> None:
            metadata = json.dumps(dict(document.metadata or {}), ensure_ascii=False)
            record = {"text": document.text, "id": document.identity, "metadata": metadata}
            file.write(features.serialize_example(features.encode_example(record)))

        try:
            yield add
        finally:
            file.close()

    def file_name(self, collection: str, number: int, count: int) -> str:
        """See `OutputFormat.file_name`: as TFDS names the shards of a split."""
        return f"{TFDS_VERSION}/{collection}-train.array_record-{number:05}-of-{count:05}"

    def description(self, collection: str, documents: Sequence[int]) -> dict[str, str]:
        """See `OutputFormat.description`: for TFDS, a data set of the collection's name."""
        split = {
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "name": "train",
            "numBytes": "0",
            "shardLengths": [str(number) for number in documents],
        }
        about = {
            "fileFormat": "array_record",
            "name": collection,
            "splits": [split],
            "version": TFDS_VERSION,
        }
        found = {"dataset_info.json": about, "features.json": _features().to_json()}
        return {
            f"{TFDS_VERSION}/{name}": json.dumps(values, indent=2, sort_keys=True)
            for name, values in found.items()
        }

    def read(self, path: pathlib.Path) -> Iterator[Document]:
        """See `OutputFormat.read`."""
        from array_record.python import array_record_module

        reader, features = array_record_module.ArrayRecordReader(str(path)), _features()
        try:
            for number in range(reader.num_records()):
                found = features.deserialize_example_np(reader.read([number])[0])
                text, identity, metadata = (
                    found[name].decode("utf-8") for name in ("text", "id", "metadata")
                )
                yield Document(text, identity, metadata=json.loads(metadata) or None)
        finally:
            reader.close()


def format_of(path: pathlib.Path) -> OutputFormat | None:
    """The format of a file by its name; None for a file of another kind."""
    for mark, found in (
        (".jsonl", JsonLinesOutput()),
        (".parquet", ParquetOutput()),
        (".array_record", ArrayRecordOutput()),
    ):
        if mark in path.name:
            return found
    return None


def record_of(document: Document) -> dict[str, Any]:
    """A document as JSON values."""
    record = {"text": document.text, "id": document.identity}
    if document.group:
        record["group"] = document.group
    return record | {k: v for k, v in (document.metadata or {}).items() if k not in KEYS}


def document_of(record: Mapping[str, Any]) -> Document:
    """The document that `record_of` gave. BadRecord: it is none of those."""
    try:
        text, identity = record["text"], record["id"]
    except KeyError as error:
        raise BadRecord(f"there is no field {error}") from None
    metadata = {name: value for name, value in record.items() if name not in KEYS}
    return Document(text, identity, record.get("group", ""), metadata=metadata or None)


def _parquet() -> tuple[Any, Any]:
    """pyarrow and its Parquet. UserError: it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"Parquet files are written by pyarrow: {EXTRA}") from None
    return pyarrow, pyarrow.parquet


def _features() -> Any:
    """The features of an example in the files, as TFDS describes them."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    return tfds.features.FeaturesDict({"text": text, "id": text, "metadata": text})
