"""Documents in Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from lmjax.config import UserError, config
from lmjax.data.documents import Document, OnSkip, Part
from lmjax.data.file_source import EXTRA, FileSource, too_long
from lmjax.data.files import DamagedFile, open_bytes
from lmjax.files import errors_told

BATCH = 4 << 20  # bytes of rows that are decoded together; the library's own default is by rows


@config
class ParquetFiles(FileSource):
    """Rows of Parquet files, one column of which is the text; read some rows at a time.

    A file is decoded page by page (of its format: about 1 MB, or one row that is longer). With
    `longest`, a group of rows that have more bytes than that on average is left out undecoded.
    """

    field: str = "text"  # the column with the text
    metadata: tuple[str, ...] = ()  # columns that are kept beside the text, where there are any

    def validate(self) -> None:
        """Raises UserError for metadata that cannot be kept."""
        super().validate()
        if {"", self.field} & {*self.metadata} or len({*self.metadata}) < len(self.metadata):
            raise UserError(f"metadata={self.metadata}: give each further column's name, once")

    def endings(self) -> tuple[str, ...]:
        """See `FileSource.endings`."""
        return (".parquet",)

    def parts(self) -> tuple[Part, ...]:
        """See `Source.parts`: a group of rows each, or a file that cannot be read."""
        found = []
        for name in self.files():
            try:
                with open_bytes(name) as raw:
                    about = _open(name, raw).metadata
                    sizes = [
                        about.row_group(n).total_byte_size for n in range(about.num_row_groups)
                    ]
            except DamagedFile:
                sizes = [1]  # it is told when it is read
            except OSError:
                with errors_told(f"cannot read {name}"):
                    raise
            found += [Part(name, n, n + 1, max(size, 1)) for n, size in enumerate(sizes)]
        if not found:
            raise UserError(f"there is no row in {self.path}")
        return tuple(found)

    def documents_of(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `FileSource.documents_of`."""
        import pyarrow

        with open_bytes(part.name) as raw:
            file = _open(part.name, raw)
            names = file.schema_arrow.names
            if self.field not in names:
                raise DamagedFile(
                    f"{part.name} has no column {self.field!r}; the columns are {', '.join(names)}"
                )
            group = file.metadata.row_group(part.start)
            rows, size = group.num_rows, _column_size(group, self.field)
            if self.longest is not None and size > self.longest * rows:
                on_skip(too_long(f"{part.name}: group {part.start} of {rows} rows", size))
                return
            first = sum(file.metadata.row_group(n).num_rows for n in range(part.start))
            batch = max(1, BATCH * rows // max(part.size, 1))
            columns = [self.field, *(name for name in self.metadata if name in names)]
            options = {"row_groups": [part.start], "columns": columns}
            try:
                for table in file.iter_batches(batch, **options):
                    for number, row in self._rows(table):
                        at = f"{part.name}:{first + number}"
                        if isinstance(row, int):
                            on_skip(too_long(at, row))
                        else:
                            yield from self._document(row, at, on_skip)
                    first += table.num_rows
            except (pyarrow.ArrowException, OSError) as error:
                raise DamagedFile(f"{part.name} is damaged: {error}") from None

    def _rows(self, table: Any) -> Iterator[tuple[int, dict[str, Any] | int]]:
        """Numbers and values of rows; of those above `longest` their bytes in place of values."""
        sizes = None if self.longest is None else _text_sizes(table.column(self.field))
        if sizes is None:
            yield from enumerate(table.to_pylist())
            return
        short = sizes <= self.longest
        rows = iter(table.filter(short).to_pylist())
        for number, size in enumerate(sizes.tolist()):
            yield number, next(rows) if short[number] else size

    def _document(self, row: dict[str, Any], at: str, on_skip: OnSkip) -> Iterator[Document]:
        text = row.pop(self.field)
        if not isinstance(text, str):
            self.refuse(f"{at}: column {self.field!r} has {type(text).__name__}, not text", on_skip)
        elif text:
            yield Document(text, at, metadata=row or None)


def _column_size(group: Any, field: str) -> int:
    """Bytes of a group's column when it is not compressed, by what the file says."""
    columns = map(group.column, range(group.num_columns))
    return sum(one.total_uncompressed_size for one in columns if one.path_in_schema == field)


def _text_sizes(column: Any) -> Int[np.ndarray, "rows"] | None:
    """Bytes of each row's text, 0 where there is none; None for a column without texts."""
    import pyarrow
    from pyarrow import compute

    texts = column.dictionary if pyarrow.types.is_dictionary(column.type) else column
    try:
        sizes = compute.binary_length(texts)
    except pyarrow.ArrowNotImplementedError:
        return None
    if texts is not column:
        sizes = sizes.take(column.indices)
    return sizes.fill_null(0).to_numpy(zero_copy_only=False)


def _open(name: str, raw: Any) -> Any:
    """An open file as Parquet.

    Raises:
        UserError: the library is missing.
        DamagedFile: it is none.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{name}: Parquet files are read by pyarrow: {EXTRA}") from None
    try:
        return ParquetFile(raw, pre_buffer=False)
    except (pyarrow.ArrowException, EOFError) as error:
        raise DamagedFile(f"{name} is damaged or no Parquet: {error}") from None
