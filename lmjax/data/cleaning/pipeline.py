"""From sources to cleaned documents: pass after pass over all shards, going on after any kill.

A pass makes a folder of each shard. Between two passes a corpus step decides on all documents by
small marks. Work that is finished is never done again; the output appears when all of it is there.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import operator
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lmjax.config import UserError, config, fields, fingerprint, replace
from lmjax.data.cleaning.corpus_step import (
    KEPT,
    CorpusStep,
    Decided,
    GrowingArray,
    StoredArrays,
    kept_name,
)
from lmjax.data.cleaning.formats import OutputFormat
from lmjax.data.cleaning.ledger import EXCERPT, Ledger
from lmjax.data.cleaning.shard_pass import (
    ALL,
    DOCUMENTS,
    FINDINGS,
    LEDGER,
    LEFT_OUT,
    MARKS,
    Collection,
    ShardPass,
    ShardTask,
    joined,
    make_shard,
    passes,
    read_between,
)
from lmjax.data.cleaning.step import Step
from lmjax.data.cleaning.summary import SUMMARY, Summary
from lmjax.data.documents import Document, Part, Progress, digest, silent
from lmjax.data.executor import WorkerPool, map_items
from lmjax.data.files import find_files
from lmjax.data.shards import grouped

WORK = "work"  # folder of what is not finished, in the output
SHARDS = 32  # into which a small collection is divided
ESCAPED = 3  # bytes in a line of JSON for a byte of text, at most, but for control characters
VERSION = "1"  # to be raised when the same settings make other documents


@config
class CleaningRecipe:
    """Steps that belong together, in their order; may be one of the steps of a cleaning."""

    # each takes a document, or all of them (duplicates, leaks)
    steps: tuple[Step | CorpusStep, ...] = ()


def flat(steps: Sequence[Step | CorpusStep | CleaningRecipe]) -> tuple[Step | CorpusStep, ...]:
    """The steps, with those of recipes in place of these."""
    found: list[Step | CorpusStep] = []
    for step in steps:
        found += step.steps if isinstance(step, CleaningRecipe) else [step]
    return tuple(found)


class CleaningPipeline:
    """A cleaning in its folder.

    All numbers of shards depend on the sources alone, so that any number of workers makes the same
    files, and another one may go on with them.
    """

    def __init__(
        self,
        collections: tuple[Collection, ...],
        steps: Sequence[Step | CorpusStep],
        written: OutputFormat,
        folder: pathlib.Path,
        on_error: str = "raise",
        most_bytes: int = 64 << 20,
    ) -> None:
        """Nothing is read yet; the folder must be there, and locked.

        Args:
            collections: what is cleaned; of two equal documents that of the earlier one is kept.
            steps: of all collections.
            written: format of the output.
            folder: the output.
            on_error: "raise" or "skip", where a step fails on a document.
            most_bytes: of a document; longer ones are dropped before the steps.
        """
        self.collections = tuple(_bounded(one, most_bytes) for one in collections)
        self.folder, self.written = folder, written
        self.work = folder / WORK
        self.passes = passes(self.collections, steps, written, on_error, most_bytes)
        self._settings = fingerprint(CleaningRecipe(steps=tuple(steps))), fingerprint(written)

    def run(self, workers: int = 0, progress: Progress = silent) -> Summary:
        """Cleans, or does what is left of it.

        Args:
            workers: processes; 0 is this one.
            progress: is told bytes of source.

        Raises:
            UserError: a source cannot be read, or was changed since the cleaning began.
        """
        done = self.folder / SUMMARY
        if done.is_file():
            shutil.rmtree(self.work, ignore_errors=True)  # which a kill has left
            return Summary.from_json(json.loads(done.read_text("utf-8")))
        shards = self._shards()
        self._begin(shards)
        # Processes take a second to begin: the same ones do all passes.
        with WorkerPool(min(workers, len(shards))) as pool:
            tasks, folders = self._run_passes(shards, pool, progress)
        return self._finish(tasks, folders)

    def _run_passes(
        self, shards: list[tuple[int, tuple[Part, ...]]], pool: WorkerPool, progress: Progress
    ) -> tuple[list[ShardTask], list[pathlib.Path]]:
        """Makes the folders of all passes; the tasks and folders of the last."""
        before: list[pathlib.Path] | None = None
        for number, each in enumerate(self.passes):
            tasks = self._tasks(shards, before, number)
            folder = self.work / f"pass-{number}"
            folder.mkdir(exist_ok=True)
            doing = f"pass {number + 1} of {len(self.passes)}"
            start = functools.partial(_same, each)
            common = (start, pool, progress, doing, operator.attrgetter("size"))
            folders = map_items(make_shard, tasks, folder, *common)
            _forget_documents(before or ())
            if each.marked is not None:
                progress(f"deciding: {each.marked[0]}", 0, 1)
                self._decide(number, each, folders)
            before = folders
        return tasks, before

    @functools.cached_property
    def size(self) -> int:
        """Bytes of the sources' files."""
        return sum(part.size for _, parts in self._shards() for part in parts)

    def _shards(self) -> list[tuple[int, tuple[Part, ...]]]:
        """The number of a collection, and neighbouring parts of its source, of each shard."""
        return [
            (number, group)
            for number, collection in enumerate(self.collections)
            for group in grouped(collection.source.parts(), SHARDS)
        ]

    def _begin(self, shards: list[tuple[int, tuple[Part, ...]]]) -> None:
        """Makes the folder for work, or finds it with work on the same text.

        Raises:
            UserError: it is work on another text, or by other settings.
        """
        key = self._key(shards)
        path = self.work / "made_from.txt"
        if path.is_file():
            if path.read_text() != key:
                raise other_text(self.work)
            return
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        path.with_suffix(".tmp").write_text(key)
        path.with_suffix(".tmp").replace(path)

    def _key(self, shards: list[tuple[int, tuple[Part, ...]]]) -> str:
        """A fingerprint of the settings and of the sources' files."""
        return digest(
            VERSION, *self._settings, *map(_settings_of, self.collections), *map(str, shards)
        )

    def _tasks(
        self,
        shards: list[tuple[int, tuple[Part, ...]]],
        before: list[pathlib.Path] | None,
        number: int,
    ) -> list[ShardTask]:
        verdict = None if before is None else self.work / f"decided-{number - 1}"
        return [
            ShardTask(
                collection,
                parts if before is None else (),
                sum(part.size for part in parts),
                None if before is None else before[shard],
                verdict,
                shard,
            )
            for shard, (collection, parts) in enumerate(shards)
        ]

    def _decide(self, number: int, each: ShardPass, folders: list[pathlib.Path]) -> None:
        """Lets the corpus step decide, and keeps what it says in a folder."""
        target = self.work / f"decided-{number}"
        if target.exists():
            return
        called, step = each.marked
        marks = [StoredArrays(folder / MARKS) for folder in folders]
        decided: Decided = step.decide(marks)
        unfinished = target.with_suffix(".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        StoredArrays.save(unfinished / ALL, decided.common)
        for shard, (own, verdict) in enumerate(zip(marks, decided.verdicts, strict=True)):
            StoredArrays.save(unfinished / f"{shard:06}", verdict)
            if kept := step.kept(verdict):
                writer = GrowingArray(unfinished / KEPT / kept_name(step) / f"{shard:06}")
                for name, mask in kept.items():
                    writer.select(own, name, mask)
                writer.finish()
        shown = _shown_pairs(decided.pairs, folders, self._read_between)
        pairs = [{"step": called, **one} for one in shown]
        (unfinished / "pairs.json").write_text(json.dumps(pairs, ensure_ascii=False), "utf-8")
        unfinished.replace(target)

    def _finish(self, tasks: Sequence[ShardTask], folders: list[pathlib.Path]) -> Summary:
        """Gives the output its names, the summary last: with it the output is complete."""
        summary = self._summary(tasks)
        self._publish(tasks, folders)
        (self.work / SUMMARY).write_text(json.dumps(summary.to_json(), ensure_ascii=False), "utf-8")
        (self.work / SUMMARY).replace(self.folder / SUMMARY)
        shutil.rmtree(self.work)
        return summary

    def _summary(self, tasks: Sequence[ShardTask]) -> Summary:
        """Adds up the ledgers of all passes."""
        ledgers = {collection.name: Ledger() for collection in self.collections}
        for number in range(len(self.passes)):
            for task in tasks:
                path = self.work / f"pass-{number}" / f"shard-{task.number:06}" / LEDGER
                found = Ledger.from_json(json.loads(path.read_text("utf-8")))
                if number < len(self.passes) - 1:
                    found.clear_output()
                ledgers[self.collections[task.collection].name].merge(found)
        pairs = [
            pair
            for path in sorted(self.work.glob("decided-*/pairs.json"))
            for pair in json.loads(path.read_text("utf-8"))
        ]
        found = sum(sum(1 for _ in _lines(path)) for path in sorted(self.work.rglob(FINDINGS)))
        empty = [name for one in self.collections for name in empty_files(one)]
        return Summary(ledgers, pairs, found, empty)

    def _publish(self, tasks: Sequence[ShardTask], folders: Sequence[pathlib.Path]) -> None:
        """Gives the output its names: the documents last, all at once."""
        ready = self.work / "ready"
        shutil.rmtree(ready, ignore_errors=True)
        for number, collection in enumerate(self.collections):
            own = [folders[task.number] for task in tasks if task.collection == number]
            target = ready / DOCUMENTS / collection.name
            target.mkdir(parents=True)
            counts = []
            for at, folder in enumerate(own):
                name = self.written.file_name(collection.name, at, len(own))
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                self._name_documents(folder, target / name)
                ledger = Ledger.from_json(json.loads((folder / LEDGER).read_text("utf-8")))
                counts.append(ledger.documents)
            for name, text in self.written.description(collection.name, counts).items():
                (target / name).write_text(text, "utf-8")
        every = sorted(self.work.glob("pass-*/shard-*"))
        joined([folder / LEFT_OUT for folder in every], ready / LEFT_OUT)
        joined([folder / FINDINGS for folder in every], ready / FINDINGS)
        (ready / KEPT).mkdir()
        for marks in sorted(self.work.glob(f"decided-*/{KEPT}/*")):
            shutil.copytree(marks, ready / KEPT / marks.name)
        for name in (LEFT_OUT, FINDINGS, KEPT, DOCUMENTS):
            if (self.folder / name).is_dir():  # a kill came between this and the summary
                shutil.rmtree(self.folder / name)
            (ready / name).replace(self.folder / name)

    def _read_between(self, folder: pathlib.Path) -> Iterator[Document]:
        """The documents of a shard that a pass has left to the next one."""
        return read_between(folder)

    def _name_documents(self, folder: pathlib.Path, target: pathlib.Path) -> None:
        """Gives the documents of a shard their name in the output."""
        _link(folder / f"{DOCUMENTS}{self.written.ending}", target)


def other_text(work: object) -> UserError:
    """The error for a folder with work that cannot be gone on with."""
    return UserError(
        f"{work} has unfinished work on other text, or by another version: the names or sizes of "
        "the sources' files are not those that it began with. Put them back, or delete the folder "
        "to begin anew"
    )


def _bounded(collection: Collection, most_bytes: int) -> Collection:
    """A collection whose source never holds a document that would be dropped for its length."""
    source = collection.source
    if "longest" not in fields(type(source)) or source.longest is not None:
        return collection
    return replace(collection, source=replace(source, longest=ESCAPED * most_bytes))


def _settings_of(collection: Collection) -> str:
    """A fingerprint of a collection's settings, but for its behaviour at errors."""
    source = collection.source
    if "on_error" in fields(type(source)):
        source = replace(source, on_error="skip")
    return fingerprint(replace(collection, source=source))


def _same(value: Any) -> Any:
    return value


def _forget_documents(folders: Sequence[pathlib.Path]) -> None:
    """Removes documents that the next pass has read; ledgers and marks stay."""
    for folder in folders:
        for path in folder.glob(f"{DOCUMENTS}.*"):
            path.unlink()


def _shown_pairs(
    pairs: Sequence[tuple[int, int]],
    folders: Sequence[pathlib.Path],
    read: Callable[[pathlib.Path], Iterator[Document]],
) -> list[dict[str, str]]:
    """Identity and beginning of both documents of each pair."""
    wanted = sorted({number for pair in pairs for number in pair})
    found: dict[int, tuple[str, str]] = {}
    first = 0
    for folder in folders:
        count = json.loads((folder / LEDGER).read_text("utf-8"))["lengths"]
        last = first + sum(count.values())
        if any(first <= number < last for number in wanted):
            for number, document in enumerate(read(folder), first):
                if number in wanted:
                    found[number] = document.identity, document.text[:EXCERPT]
        first = last
    return [
        {
            "kept": found[one][0],
            "kept_text": found[one][1],
            "dropped": found[other][0],
            "dropped_text": found[other][1],
        }
        for one, other in pairs
    ]


def _link(path: pathlib.Path, target: pathlib.Path) -> None:
    """A second name for a file, or a copy where the file system has none."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def _lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of `left_out` or `findings`."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def empty_files(collection: Collection) -> list[str]:
    """The files of a collection's source that have no byte, which the source passes over."""
    path = getattr(collection.source, "path", ())
    files = getattr(collection.source, "files", None)
    with contextlib.suppress(UserError):
        named = files() if files else find_files(path) if path else ()
        return [name for name in named if os.path.exists(name) and not os.path.getsize(name)]
    return []
