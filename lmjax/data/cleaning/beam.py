"""The same cleaning on Apache Beam: its runners spread the shards over many machines.

A pass is a map over shards, as on one machine, by the same function. Between two passes one worker
decides on all documents by their small marks, which it maps from its disk. What is made lies in an
object store, or in a folder that all machines see. Each shard of a pass has a manifest
there, written after its files: a worker that is killed leaves files that nothing names, and what
has a manifest is not made again. The summary comes last.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lmjax.config import UserError
from lmjax.data.cleaning.pipeline import WORK, CleaningPipeline, other_text
from lmjax.data.cleaning.shard_pass import (
    ALL,
    DOCUMENTS,
    FINDINGS,
    LEDGER,
    LEFT_OUT,
    MARKS,
    ShardTask,
    make_shard,
    read_between,
)
from lmjax.data.cleaning.summary import SUMMARY, Summary
from lmjax.data.documents import Document, Part
from lmjax.files import errors_told, local_path
from lmjax.remote import Objects, is_url, side_by_side

EXTRA = "pip install 'lmjax[beam]'"
MADE_FROM = f"{WORK}/made_from.txt"
Wanted = Callable[[str], bool]  # tells by its name whether a file is wanted


class BeamRun:
    """A cleaning whose work and output lie in a store."""

    def __init__(self, pipeline: CleaningPipeline, storage: str) -> None:
        """Nothing is read yet.

        Args:
            pipeline: the cleaning; its folder is not used.
            storage: URL of the output, or a folder that all machines see.
        """
        self.pipeline, self.storage = pipeline, storage

    def run(self, runner: str, options: Sequence[str] = ()) -> Summary:
        """Cleans, or does what is left of it, and waits until it is done.

        Args:
            runner: name of Beam's runner: "FnApiRunner" for this machine, "DataflowRunner",
                "FlinkRunner", "SparkRunner".
            options: of the runner, as on a command line.

        Raises:
            UserError: Beam is missing, or the text was changed since the cleaning began.
        """
        beam = _library()
        store = _Store(self.storage)
        if (done := store.objects.read(SUMMARY)) is None:
            shards = self.pipeline._shards()
            key = self.pipeline._key(shards)
            if (known := store.objects.read(MADE_FROM)) not in (None, key.encode()):
                raise other_text(f"{self.storage}/{WORK}")
            if known is None:
                store.objects.write(MADE_FROM, key.encode())
            made = beam.options.pipeline_options.PipelineOptions([f"--runner={runner}", *options])
            with beam.Pipeline(options=made) as graph:
                self._add(beam, graph, self.pipeline._tasks(shards, None, 0))
            done = store.objects.read(SUMMARY)
        for name in store.objects.listed():
            if name.startswith(f"{WORK}/"):
                store.objects.delete(name)
        return Summary.from_json(json.loads(done))

    def _add(self, beam: Any, graph: Any, tasks: list[ShardTask]) -> None:
        """Adds all passes to a graph of Beam's, each after the decision that it applies."""
        # Beam's own coder of named tuples does not know these.
        lines, decided = list(map(_line, tasks)), None
        for number, _ in enumerate(self.pipeline.passes):
            make = functools.partial(make_on_worker, self.pipeline, self.storage, number)
            after = () if decided is None else (beam.pvalue.AsSingleton(decided),)
            made = (
                graph
                | f"shards {number}" >> beam.Create(lines)
                # Neighbours go to different machines.
                | f"spread {number}" >> beam.Reshuffle()
                | f"pass {number}" >> beam.Map(make, *after)
                | f"all {number}" >> beam.combiners.Count.Globally()
            )
            is_last = number == len(self.pipeline.passes) - 1
            then = finish_on_worker if is_last else decide_on_worker
            then = functools.partial(then, self.pipeline, self.storage, lines, number)
            decided = made | f"{'finish' if is_last else 'decide'} {number}" >> beam.Map(then)


def _library() -> Any:
    """Apache Beam. UserError: it is not installed."""
    try:
        import apache_beam
    except ImportError:
        raise UserError(f"a cleaning on many machines needs Apache Beam: {EXTRA}") from None
    return apache_beam


def make_on_worker(
    pipeline: CleaningPipeline, storage: str, number: int, line: str, after: Any = None
) -> int:
    """Makes a shard of a pass, unless it is there; gives its number.

    Args:
        pipeline: the cleaning.
        storage: URL of the output, or a folder that all machines see.
        number: of the pass.
        line: the shard, by `_line`.
        after: a result that has to be there before.
    """
    task = _task(line)
    store, name = _Store(storage), _shard(number, task)
    if store.has(name):
        return task.number
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        if number:
            before, verdict = folder / "before", folder / "verdict"
            own = f"{task.number:06}/"
            store.fetch(_shard(number - 1, task), before, _is_document)
            store.fetch(f"decided-{number - 1}", verdict, lambda n: n.startswith((f"{ALL}/", own)))
            task = task._replace(parts=(), before=before, verdict=verdict)
        made = folder / "made"
        made.mkdir()
        make_shard(task, made, pipeline.passes[number])
        store.put(made, name)
    return task.number


def decide_on_worker(
    pipeline: CleaningPipeline, storage: str, lines: Sequence[str], number: int, made: int
) -> int:
    """Lets a corpus step decide on all shards of a pass, unless it has done so."""
    store, name = _Store(storage), f"decided-{number}"
    if not store.has(name):
        with tempfile.TemporaryDirectory() as temporary:
            here = _OnWorker(pipeline, store, pathlib.Path(temporary))
            folders = here.fetch(list(map(_task, lines)), number, _is_mark)
            here._decide(number, pipeline.passes[number], folders)
            store.put(here.work / name, name)
    return made


def finish_on_worker(
    pipeline: CleaningPipeline, storage: str, lines: Sequence[str], number: int, made: int
) -> int:
    """Puts the documents, and then what is known of them, where the output has them."""
    store = _Store(storage)
    with tempfile.TemporaryDirectory() as temporary:
        here = _OnWorker(pipeline, store, pathlib.Path(temporary))
        tasks = list(map(_task, lines))
        for each in range(number + 1):
            folders = here.fetch(tasks, each, lambda n: n in (LEDGER, LEFT_OUT, FINDINGS))
        for each in range(number):
            store.fetch(f"decided-{each}", here.work / f"decided-{each}")
        here._finish(tasks, folders)
        names = [path for path in sorted(here.folder.rglob("*")) if path.is_file()]
        for path in sorted(names, key=lambda path: path.name == SUMMARY):  # which is the last
            store.objects.upload(str(path.relative_to(here.folder)), path)
    return made


class _OnWorker(CleaningPipeline):
    """The cleaning in a folder of a worker, with copies of what it needs there."""

    def __init__(self, pipeline: CleaningPipeline, store: _Store, folder: pathlib.Path) -> None:
        self.__dict__.update(pipeline.__dict__)
        self.folder, self.work, self._store = folder, folder / WORK, store
        self.work.mkdir()

    def fetch(self, tasks: Sequence[ShardTask], number: int, wanted: Wanted) -> list[pathlib.Path]:
        """The folders of a pass's shards, with the files that are wanted."""
        names = [_shard(number, task) for task in tasks]
        side_by_side(lambda name: self._store.fetch(name, self.work / name, wanted), names)
        return [self.work / name for name in names]

    def _read_between(self, folder: pathlib.Path) -> Iterator[Document]:
        """See `CleaningPipeline._read_between`; a few shards are asked for."""
        self._store.fetch(str(folder.relative_to(self.work)), folder, _is_document)
        yield from read_between(folder)
        for path in folder.glob(f"{DOCUMENTS}.*"):
            path.unlink()

    def _name_documents(self, folder: pathlib.Path, target: pathlib.Path) -> None:
        """See `CleaningPipeline._name_documents`; the store copies them by itself where it can."""
        name = target.relative_to(self.work / "ready")
        self._store.copy(str(folder.relative_to(self.work)), _is_document, str(name))


class _Store:
    """Folders in a store, each with a manifest that is written last.

    Two workers that make the same folder at once, as runners let them, write different files, and
    the manifest of the later one counts: both hold the same.
    """

    def __init__(self, storage: str) -> None:
        in_store = is_url(storage)
        self.objects = Objects(storage, "storage", write=True) if in_store else _Here(storage)

    def manifest(self, name: str) -> dict[str, Any] | None:
        """The manifest of a folder; None where it is not complete."""
        data = self.objects.read(f"{WORK}/{name}.json")
        try:
            return None if data is None else json.loads(data)
        except ValueError:  # where files are not written whole, a kill has cut it
            return None

    def has(self, name: str) -> bool:
        """Returns whether a folder is complete."""
        return self.manifest(name) is not None

    def put(self, folder: pathlib.Path, name: str) -> None:
        """Puts the files of a folder, and then its manifest."""
        attempt = uuid.uuid4().hex
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
        with errors_told(f"cannot write {self.objects.url}"):
            where = f"{WORK}/{name}/{attempt}"
            side_by_side(lambda n: self.objects.upload(f"{where}/{n}", folder / n), sizes)
            manifest = json.dumps({"attempt": attempt, "sizes": sizes})
            self.objects.write(f"{WORK}/{name}.json", manifest.encode())

    def fetch(self, name: str, folder: pathlib.Path, wanted: Wanted = lambda name: True) -> None:
        """Copies files of a folder.

        Raises:
            UserError: it is not complete, or one of its files is not there as it was put.
        """
        where, sizes = self._found(name, wanted)
        folder.mkdir(parents=True, exist_ok=True)
        for each, size in sizes.items():
            path = folder / each
            if not self.objects.download(f"{where}/{each}", path) or path.stat().st_size != size:
                raise UserError(f"{self.objects.url}/{where}/{each} has not the bytes it had")

    def copy(self, name: str, wanted: Wanted, target: str) -> None:
        """Gives the one file of a folder that is wanted another name."""
        where, sizes = self._found(name, wanted)
        (each,) = sizes
        self.objects.copy(f"{where}/{each}", target)

    def _found(self, name: str, wanted: Wanted) -> tuple[str, dict[str, int]]:
        """The place of a folder's files, and the sizes of those that are wanted."""
        manifest = self.manifest(name)
        if manifest is None:
            raise UserError(f"{self.objects.url}/{WORK}/{name} is not complete")
        sizes = {each: size for each, size in manifest["sizes"].items() if wanted(each)}
        return f"{WORK}/{name}/{manifest['attempt']}", sizes


class _Here(Objects):
    """Files of a folder that all machines see, which appear whole as objects do."""

    def __init__(self, folder: str) -> None:
        self._root = self.url = str(local_path(folder, "storage").absolute())

    def read(self, name: str) -> bytes | None:
        path = pathlib.Path(self.path(name))
        return path.read_bytes() if path.is_file() else None

    def write(self, name: str, data: bytes) -> None:
        self._put(name, lambda unfinished: unfinished.write_bytes(data))

    def upload(self, name: str, path: pathlib.Path) -> None:
        self._put(name, lambda unfinished: shutil.copyfile(path, unfinished))

    def copy(self, name: str, target: str) -> None:
        self.upload(target, pathlib.Path(self.path(name)))

    def download(self, name: str, path: pathlib.Path) -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(self.path(name), path)
            return True
        return False

    def delete(self, name: str) -> None:
        pathlib.Path(self.path(name)).unlink(missing_ok=True)

    def listed(self) -> list[str]:
        root = pathlib.Path(self._root)
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    def _put(self, name: str, write: Callable[[pathlib.Path], Any]) -> None:
        path = pathlib.Path(self.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        write(unfinished)
        unfinished.replace(path)


def _line(task: ShardTask) -> str:
    """A shard of the first pass as JSON."""
    return json.dumps([task.collection, task.parts, task.size, task.number])


def _task(line: str) -> ShardTask:
    """The shard of which `_line` made a line."""
    collection, parts, size, number = json.loads(line)
    return ShardTask(collection, tuple(Part(*one) for one in parts), size, None, None, number)


def _shard(number: int, task: ShardTask) -> str:
    return f"pass-{number}/shard-{task.number:06}"


def _is_mark(name: str) -> bool:
    return name == LEDGER or name.startswith(f"{MARKS}/")


def _is_document(name: str) -> bool:
    return name.startswith(f"{DOCUMENTS}.")
