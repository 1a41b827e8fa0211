"""Makes token stores: in parallel, going on where a kill stopped it, visible only when complete."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lmjax.config import UserError
from lmjax.data.documents import Document, Part, Source, is_held_out
from lmjax.data.store import (
    BYTES_FILE,
    FORMAT,
    MANIFEST_FILE,
    OFFSETS_FILE,
    TOKENS_FILE,
    Manifest,
    TokenStore,
    open_store,
)
from lmjax.data.tokenizers import Tokenizer, load_tokenizer, token_type

BATCH = 1 << 20  # characters that are tokenized together
SHARD = 16 << 20  # bytes of source that make a shard at least, in a large corpus
SHARDS = 32  # into which a small corpus is divided
REPORTED = 5  # skipped pieces of input whose message is kept

Progress = Callable[[str, int, int], None]  # what is being done, how much is done, of how much


def silent(what: str, done: int, total: int) -> None:
    """A `Progress` that tells nobody."""


class Task(NamedTuple):
    """A shard to be tokenized."""

    source: Source
    parts: tuple[Part, ...]
    held_out: float
    folder: pathlib.Path

    @property
    def size(self) -> int:
        """Bytes of source."""
        return sum(part.size for part in self.parts)


def split_names(held_out: float) -> tuple[str, ...]:
    """The stores that a source is divided into."""
    return ("train", "held_out") if held_out else ("all",)


def build_stores(
    source: Source,
    tokenizer: Tokenizer,
    folder: str | os.PathLike,
    held_out: float = 0.0,
    workers: int = 0,
    progress: Progress = silent,
) -> dict[str, TokenStore]:
    """Tokenizes a source into a store for each split, or opens them where they are already made.

    Shards that were finished before an interruption are used again. The folder appears, complete,
    by one renaming. Two processes that want the same folder wait for each other.

    Args:
        source: the documents.
        tokenizer: makes ids of them.
        folder: where the stores shall lie, as folders "train" and "held_out", or "all".
        held_out: fraction of the documents for "held_out"; 0 for "all".
        workers: processes that tokenize; 0 does it in this one.
        progress: is told bytes of source.

    Raises:
        UserError: the source cannot be read, a split comes out empty, the disk is full, or the
            folder holds stores of something else.
    """
    folder = pathlib.Path(folder)
    fingerprint = source.fingerprint()
    names = split_names(held_out)
    with _full_disk_told(folder), _lock(folder, progress):
        if not folder.exists():
            work = folder.with_name(folder.name + ".partial")
            try:
                _begin(work, [FORMAT, SHARD, SHARDS, fingerprint, tokenizer.fingerprint, held_out])
                shards = _make_shards(source, tokenizer, work, held_out, workers, progress)
                for name in names:
                    manifest = _empty_manifest(fingerprint, tokenizer, name, held_out)
                    _merge(shards, work / "stores" / name, manifest)
                _check_splits(work / "stores", names, held_out)
            except UserError:  # it will be another text, or other settings, when it is put right
                shutil.rmtree(work)
                raise
            (work / "stores").replace(folder)
            shutil.rmtree(work)
    return {name: open_store(folder / name, fingerprint, tokenizer.fingerprint) for name in names}


def _begin(work: pathlib.Path, key: list[Any]) -> None:
    """Makes the folder for shards, and empties it if it holds those of something else."""
    path = work / "made_from.json"
    text = json.dumps(key)
    if not path.exists() or path.read_text() != text:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        path.write_text(text)


def _empty_manifest(source: str, tokenizer: Tokenizer, split: str, held_out: float) -> Manifest:
    return Manifest(
        format=FORMAT,
        source=source,
        tokenizer=tokenizer.fingerprint,
        split=split,
        held_out=held_out,
        vocab_size=tokenizer.vocab_size,
        tokens=0,
        documents=0,
        text_bytes=0,
        skipped=0,
        skipped_first=(),
        sizes={},
        sha256="",
    )


def _make_shards(
    source: Source,
    tokenizer: Tokenizer,
    work: pathlib.Path,
    held_out: float,
    workers: int,
    progress: Progress,
) -> list[pathlib.Path]:
    """Tokenizes what is not tokenized yet; the folders of all shards, in order."""
    parts = source.parts()
    total = sum(part.size for part in parts)
    tasks = [
        Task(source, shard, held_out, work / f"shard-{number:06d}")
        for number, shard in enumerate(_group(parts, total))
    ]
    missing = [task for task in tasks if not task.folder.exists()]
    done = total - sum(task.size for task in missing)
    progress("tokenizing", done, total)
    finished = _in_processes if workers else _in_this_process
    for size in finished(missing, tokenizer, work, workers):
        done += size
        progress("tokenizing", done, total)
    return [task.folder for task in tasks]


def _group(parts: tuple[Part, ...], total: int) -> Iterator[tuple[Part, ...]]:
    """Neighbouring parts together; independent of the number of workers, so that any may go on."""
    wanted = min(SHARD, total // SHARDS)
    group: list[Part] = []
    size = 0
    for part in parts:
        group.append(part)
        size += part.size
        if size >= wanted:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def _in_this_process(
    tasks: list[Task], tokenizer: Tokenizer, work: pathlib.Path, workers: int
) -> Iterator[int]:
    for task in tasks:
        _write_shard(task, tokenizer)
        yield task.size


_worker_tokenizer: Tokenizer | None = None  # of a worker process


def _in_processes(
    tasks: list[Task], tokenizer: Tokenizer, work: pathlib.Path, workers: int
) -> Iterator[int]:
    if not tasks:
        return
    tokenizer.save(work / "tokenizer")
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(tasks)),
        # Not fork: jax may be running threads in this process.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(work / "tokenizer",),
    )
    try:
        futures = [pool.submit(_write_shard_in_worker, task) for task in tasks]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer: pathlib.Path) -> None:
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and shuts the pool down

    def leave_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _worker_tokenizer = load_tokenizer(tokenizer)
    _worker_tokenizer.threads = 1


def _write_shard_in_worker(task: Task) -> int:
    _write_shard(task, _worker_tokenizer)
    return task.size


def _write_shard(task: Task, tokenizer: Tokenizer) -> None:
    """Tokenizes a shard into its folder, which appears when it is complete."""
    unfinished = task.folder.with_name(task.folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    skipped = _Skipped()
    names = split_names(task.held_out)
    lengths: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    try:
        with contextlib.ExitStack() as stack:
            files = {
                name: stack.enter_context(open(unfinished / f"{name}.tokens", "wb"))
                for name in names
            }
            for documents in _batches(task, skipped):
                for document, ids in zip(documents, _tokenize(documents, tokenizer)):
                    held_out = is_held_out(document, task.held_out)
                    name = names[held_out if len(names) > 1 else 0]
                    files[name].write(ids.tobytes())
                    lengths[name].append((len(ids), len(document.text.encode("utf-8"))))
        for name in names:
            values = np.asarray(lengths[name], np.int64).reshape(-1, 2)
            _save_array(unfinished / f"{name}.lengths.npy", values)
        (unfinished / "skipped.json").write_text(json.dumps(dataclasses.asdict(skipped)))
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    unfinished.replace(task.folder)


@dataclasses.dataclass
class _Skipped:
    """What was left out of a shard."""

    count: int = 0
    first: list[str] = dataclasses.field(default_factory=list)

    def __call__(self, message: str) -> None:
        self.count += 1
        if len(self.first) < REPORTED:
            self.first.append(message)


def _batches(task: Task, skipped: _Skipped) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for part in task.parts:
        for document in task.source.read(part, skipped):
            batch.append(document)
            size += len(document.text)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _tokenize(documents: list[Document], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Ids of each document with begin and end, or with the one separator before it."""
    before = [] if tokenizer.begin is None else [tokenizer.begin]
    after = [] if tokenizer.begin == tokenizer.end else [tokenizer.end]
    kind = token_type(tokenizer.vocab_size)
    for ids in tokenizer.encode_batch([document.text for document in documents]):
        yield np.asarray(before + ids + after, kind)


def _merge(shards: list[pathlib.Path], folder: pathlib.Path, manifest: Manifest) -> None:
    """Joins one split of all shards into a store."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    name = manifest.split
    hasher = hashlib.sha256()
    with open(folder / TOKENS_FILE, "wb") as target:
        for shard in shards:
            with open(shard / f"{name}.tokens", "rb") as file:
                while block := file.read(BATCH):
                    target.write(block)
                    hasher.update(block)
        _flush(target)
    lengths = np.concatenate([np.load(shard / f"{name}.lengths.npy") for shard in shards])
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths[:, 0], out=offsets[1:])
    _save_array(folder / OFFSETS_FILE, offsets)
    _save_array(folder / BYTES_FILE, lengths[:, 1])
    skipped = [json.loads((shard / "skipped.json").read_text()) for shard in shards]
    messages = [message for entry in skipped for message in entry["first"]]
    manifest = dataclasses.replace(
        manifest,
        tokens=int(offsets[-1]),
        documents=len(lengths),
        text_bytes=int(lengths[:, 1].sum()),
        skipped=sum(entry["count"] for entry in skipped),
        skipped_first=tuple(messages[:REPORTED]),
        sizes={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        sha256=hasher.hexdigest(),
    )
    with open(folder / MANIFEST_FILE, "w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(manifest), file, indent=1, ensure_ascii=False)
        _flush(file)


def _save_array(path: pathlib.Path, array: np.ndarray) -> None:
    """Like `np.save` on the path, which does not say why it fails when the disk is full."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getbuffer())


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _check_splits(stores: pathlib.Path, names: tuple[str, ...], held_out: float) -> None:
    counts = {
        name: json.loads((stores / name / MANIFEST_FILE).read_text(encoding="utf-8"))
        for name in names
    }
    documents = sum(manifest["documents"] for manifest in counts.values())
    if not documents:
        skipped = counts[names[0]]["skipped"]
        reason = f"; {skipped} were left out: {counts[names[0]]['skipped_first']}" if skipped else ""
        raise UserError(f"the corpus is empty: there is no document in it{reason}")
    for name, manifest in counts.items():
        if not manifest["documents"]:
            raise UserError(
                f"with held_out={held_out} the {name} part of the corpus is empty: there "
                f"{'is 1 document' if documents == 1 else f'are {documents} documents'}. Divide the "
                "text into more documents (split=paragraph), change held_out, or give an "
                "evaluation source and held_out=0"
            )


@contextlib.contextmanager
def _lock(folder: pathlib.Path, progress: Progress) -> Iterator[None]:
    """Holds the folder's lock, which the operating system takes back when a process dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that tokenizes the same text", 0, 1)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _full_disk_told(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder.parent).free
        raise UserError(
            f"the disk is full while tokenizing into {folder} ({free / 1e9:.1f} GB free); free "
            "some space or name another place with data.cache. Finished shards are kept in "
            f"{folder}.partial and used again"
        ) from None
