"""A pass over a shard: documents in, through the steps between two corpus steps, documents out."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lmjax.config import UserError, config
from lmjax.data.cleaning.corpus_step import CorpusStep, GrowingArray, StoredArrays
from lmjax.data.cleaning.formats import JsonLinesOutput, OutputFormat, between_passes
from lmjax.data.cleaning.ledger import Border, Ledger, text_size
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.documents import Document, Part, Source

DOCUMENTS = "documents"  # in a shard's folder, with the format's ending
LEDGER = "ledger.json"
LEFT_OUT = "left_out.jsonl.gz"  # a line for each document that was dropped, and for bad input
MARKS = "marks"  # folder, for the corpus step
ALL = "all"  # folder of a decision on all shards, beside those of their numbers
FINDINGS = "findings.jsonl.gz"  # a line for each leak
BATCH = 1 << 17  # characters of documents that are marked together
READING = "reading"  # name of the step that the source is


@config
class Collection:
    """Documents of one kind, and the steps that they alone need."""

    name: str  # of its folder in the output, and in the report
    source: Source  # where they are read
    steps: tuple[Step, ...] = ()  # before those of the whole cleaning: `MainText` for pages


class ShardTask(NamedTuple):
    """A shard in a pass.

    Attributes:
        collection: number of its collection.
        parts: of the source, in the first pass.
        size: bytes, for progress.
        before: its folder in the pass before; None in the first.
        verdict: folder with the corpus step's decisions; None in the first.
        number: of the shard, over all collections.
    """

    collection: int
    parts: tuple[Part, ...]
    size: int
    before: pathlib.Path | None
    verdict: pathlib.Path | None
    number: int


@dataclasses.dataclass(frozen=True)
class ShardPass:
    """Settings that all shards of a pass have in common.

    Attributes:
        collections: of the cleaning.
        steps: of this pass, with their names.
        decided: the corpus step whose decisions it applies first, with its name; None in the first.
        marked: the corpus step for which it marks what comes out; None in the last.
        written: format of the files.
        on_error: what to do where a step fails.
        most_bytes: of a document; longer ones are dropped.
    """

    collections: tuple[Collection, ...]
    steps: tuple[tuple[str, Step], ...]
    decided: tuple[str, CorpusStep] | None
    marked: tuple[str, CorpusStep] | None
    written: OutputFormat
    on_error: str
    most_bytes: int


def passes(
    collections: tuple[Collection, ...],
    steps: Sequence[Step | CorpusStep],
    written: OutputFormat,
    on_error: str,
    most_bytes: int,
) -> list[ShardPass]:
    """The passes of a cleaning: a new one after each corpus step."""
    found: list[ShardPass] = []
    segment: list[tuple[str, Step]] = []
    decided = None
    for name, step in (*named(steps), ("", None)):
        if isinstance(step, Step):
            segment.append((name, step))
            continue
        marked = None if step is None else (name, step)
        between = written if marked is None else between_passes()
        common = (between, on_error, most_bytes)
        found.append(ShardPass(collections, tuple(segment), decided, marked, *common))
        segment, decided = [], marked
    return found


def named(steps: Sequence[Step | CorpusStep]) -> list[tuple[str, Step | CorpusStep]]:
    """Steps with names: of the class, numbered where there are several of one."""
    names = [type(step).__name__ for step in steps]
    return [
        (name if names.count(name) == 1 else f"{name} {1 + names[:at].count(name)}", step)
        for at, (name, step) in enumerate(zip(names, steps))
    ]


def make_shard(task: ShardTask, folder: pathlib.Path, common: ShardPass) -> None:
    """Writes what comes out of a shard into an empty folder: documents, ledger, marks."""
    with (
        _Lines(folder / LEFT_OUT) as left_out,
        _Lines(folder / FINDINGS) as findings,
        common.written.writer(folder / f"{DOCUMENTS}{common.written.ending}") as add,
    ):
        run = _ShardRun(task, common, left_out, findings)
        marker = None if common.marked is None else _Marker(common.marked[1], folder / MARKS)
        for document in run.documents():
            add(document)
            if marker is not None:
                marker.add(document)
        if marker is not None:
            begin = time.perf_counter()
            marker.finish()
            run.ledger.of(common.marked[0]).seconds += marker.seconds + time.perf_counter() - begin
    (folder / LEDGER).write_text(json.dumps(run.ledger.to_json(), ensure_ascii=False), "utf-8")


class _ShardRun:
    """The documents of a shard on their way through the steps."""

    def __init__(self, task: ShardTask, common: ShardPass, left_out: _Lines, findings: _Lines):
        self._task, self._common = task, common
        self._left_out, self._findings = left_out, findings
        self._collection = common.collections[task.collection]
        self.ledger = Ledger()
        # Named here, in their order.
        if task.before is None:
            self.ledger.of(f"{READING} ({self._collection.name})")
        else:
            self.ledger.of(common.decided[0])
        own = named(self._collection.steps) if task.before is None else []
        own = [(f"{name} ({self._collection.name})", step) for name, step in own]
        self._steps = [
            (name, step, self.ledger.of(name), Border(step)) for name, step in (*own, *common.steps)
        ]

    def documents(self) -> Iterator[Document]:
        """Those that come out of the last step."""
        for document, size in self._decided() if self._task.before else self._read():
            for name, step, counts, border in self._steps:
                begin = time.perf_counter()
                result = self._applied(name, step, document)
                size = counts.add(document, size, result, time.perf_counter() - begin)
                if isinstance(result, Dropped):
                    self._drop(document, name, result)
                    break
                border.look(document, counts)
                document = result
            else:
                self.ledger.let_out(document, size)
                yield document

    def _applied(self, name: str, step: Step, document: Document) -> Document | Dropped:
        try:
            return step(document)
        except UserError:
            raise
        except Exception as error:
            if self._common.on_error == "raise":
                raise UserError(
                    f"{document.identity}: the step {name} failed: {type(error).__name__}: {error}"
                    "\n(on_error=skip drops such documents and counts them)"
                ) from error
            return Dropped(f"the step failed: {type(error).__name__}", str(error)[:200])

    def _drop(self, document: Document, step: str, result: Dropped) -> None:
        line = {"id": document.identity, "collection": self._collection.name, "step": step}
        self._left_out.add(line | {"reason": result.reason, "measured": result.measured})

    def _read(self) -> Iterator[tuple[Document, int]]:
        """The documents of the source, with their bytes."""
        counts = self.ledger.of(f"{READING} ({self._collection.name})")
        begin = time.perf_counter()
        for part in self._task.parts:
            for document in self._collection.source.read(part, self._skip):
                size, result = text_size(document.text), document
                if size > self._common.most_bytes:
                    result = Dropped("longer than most_bytes", size)
                    self._drop(document, READING, result)
                counts.add(document, size, result, time.perf_counter() - begin)
                if result is document:
                    yield document, size
                begin = time.perf_counter()

    def _skip(self, message: str) -> None:
        self.ledger.skipped += 1
        line = {"id": "", "collection": self._collection.name, "step": READING}
        self._left_out.add(line | {"reason": message, "measured": ""})

    def _decided(self) -> Iterator[tuple[Document, int]]:
        """Documents of the pass before that the corpus step keeps."""
        (name, step), task = self._common.decided, self._task
        counts, current = self.ledger.of(name), []

        def documents() -> Iterator[Document]:
            for document in read_between(task.before):
                current[:] = [document]
                yield document

        def tell(document: Document, finding: str) -> None:
            line = {"id": document.identity, "collection": self._collection.name, "step": name}
            self._findings.add(line | {"finding": finding})

        parts = (StoredArrays(task.verdict / name) for name in (ALL, f"{task.number:06}"))
        verdict = {name: array for part in parts for name, array in part.items()}
        begin = time.perf_counter()
        for result in step.apply(documents(), verdict, tell):
            document = current[0]
            size = text_size(document.text)
            size = counts.add(document, size, result, time.perf_counter() - begin)
            if isinstance(result, Dropped):
                self._drop(document, name, result)
            else:
                yield result, size
            begin = time.perf_counter()


class _Marker:
    """Marks documents for a corpus step, some at a time."""

    def __init__(self, step: CorpusStep, folder: pathlib.Path) -> None:
        self._step, self._batch, self._size = step, [], 0
        self._marks, self._is_empty = GrowingArray(folder), True
        self.seconds = 0.0

    def add(self, document: Document) -> None:
        self._batch.append(document)
        self._size += len(document.text)
        if self._size >= BATCH:
            self._mark()

    def _mark(self) -> None:
        begin = time.perf_counter()
        self._marks.add(self._step.mark(self._batch))
        self._batch, self._size, self._is_empty = [], 0, False
        self.seconds += time.perf_counter() - begin

    def finish(self) -> None:
        """Stores all marks, empty arrays where there was no document."""
        if self._batch or self._is_empty:
            self._mark()
        self._marks.finish()


class _Lines:
    """A file of JSON lines, written as lines come."""

    def __init__(self, path: pathlib.Path) -> None:
        self._raw = path.open("wb")
        self._file = gzip.GzipFile("", "wb", 3, self._raw, mtime=0)

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()
        self._raw.close()

    def add(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False, default=float).encode() + b"\n")


def read_between(folder: pathlib.Path) -> Iterator[Document]:
    """The documents of a shard that a pass has left to the next one."""
    (path,) = folder.glob(f"{DOCUMENTS}.jsonl.*")
    return JsonLinesOutput().read(path)


def joined(paths: Iterable[pathlib.Path], target: pathlib.Path) -> None:
    """Joins files of compressed lines, which may stand one after another."""
    with open(target, "wb") as file:
        for path in paths:
            with open(path, "rb") as part:
                shutil.copyfileobj(part, file)
