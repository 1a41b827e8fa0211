"""Makes token stores: in parallel, going on where a kill stopped it, visible only when complete."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lmjax.config import UserError
from lmjax.data.cache import cache_errors_told
from lmjax.data.documents import HashFiles, Progress, Source, silent
from lmjax.data.executor import WorkerDied
from lmjax.data.files import RANGE
from lmjax.data.metadata import block_edges
from lmjax.data.round_trip import RoundTrip, unknown_name
from lmjax.data.shards import (
    REPORTED,
    SHARD,
    SHARDS,
    TEXT_BYTES,
    impossible,
    make_shards,
    save_array,
    split_names,
)
from lmjax.data.store import (
    BYTES_FILE,
    FORMAT,
    LABELS_FILE,
    MANIFEST_FILE,
    METADATA_BLOCKS_FILE,
    METADATA_FILE,
    OFFSETS_FILE,
    SPANS_FILE,
    TEXT_FILE,
    TOKENS_FILE,
    Manifest,
    TokenStore,
    open_store,
)
from lmjax.data.tokenizers import Tokenizer, token_type
from lmjax.files import local_path, lock

BLOCK = 1 << 20  # bytes copied at a time


def build_stores(
    source: Source,
    tokenizer: Tokenizer,
    folder: str | os.PathLike,
    held_out: float = 0.0,
    workers: int = 0,
    progress: Progress = silent,
    fingerprint: str | None = None,
    hash_files: HashFiles | None = None,
) -> dict[str, TokenStore]:
    """Tokenizes a source into a store for each split, or opens them where they are already made.

    Shards that were finished before an interruption are used again. The folder appears, complete,
    by one renaming. Two processes that want the same folder wait for each other; where the file
    system has no locks, each works for itself, and one of them is the first.

    Args:
        source: the documents.
        tokenizer: makes ids of them.
        folder: where the stores shall lie, as folders "train" and "held_out", or "all".
        held_out: fraction of the documents for "held_out"; 0 for "all".
        workers: processes that tokenize; 0 does it in this one.
        progress: is told bytes of source.
        fingerprint: of the source; None asks it, which may read all of it.
        hash_files: what the source is asked with, before and after its text was read.

    Raises:
        UserError: the source cannot be read or changes meanwhile, a split comes out empty, the disk
            is full or cannot be written, or the folder holds stores of something else.
    """
    folder = local_path(folder, "folder")
    fingerprint = source.fingerprint(hash_files) if fingerprint is None else fingerprint
    names = split_names(held_out)
    with cache_errors_told(folder):
        if not folder.exists():  # it is complete: a cache of others may be read-only
            key = [FORMAT, SHARD, SHARDS, RANGE, LABELS_FILE]
            key += [fingerprint, tokenizer.fingerprint, held_out]
            with _work_folder(folder, key, progress) as work:
                if work is not None:
                    shards = make_shards(source, tokenizer, work, held_out, workers, progress)
                    if source.fingerprint(hash_files) != fingerprint:
                        raise UserError(
                            "the text was changed while it was tokenized: wait until its files are "
                            "complete, and give the same command again"
                        )
                    _check_space(shards, work)
                    for name in names:
                        made_from = _MadeFrom(fingerprint, tokenizer, name, held_out)
                        _merge(shards, work / "stores" / name, made_from)
                    _check_splits(work / "stores", names, held_out)
                    _give_name(work / "stores", folder)
        return {
            name: open_store(folder / name, fingerprint, tokenizer.fingerprint) for name in names
        }


@contextlib.contextmanager
def _work_folder(
    folder: pathlib.Path, key: list[Any], progress: Progress
) -> Iterator[pathlib.Path | None]:
    """A folder for shards that nobody else works in; None where another process was quicker.

    It stays after an error of the system or a kill, to go on in; not after another UserError: it
    will be another text, or other settings, when that is put right.
    """
    with _locked(folder, progress) as alone:
        if folder.exists():
            yield None
            return
        work = folder.with_name(f"{folder.name}.partial")
        if not alone:
            work = pathlib.Path(tempfile.mkdtemp(prefix=f"{work.name}-", dir=folder.parent))
        try:
            _begin(work, key)
            yield work
        except UserError as error:
            if not (alone and isinstance(error, WorkerDied)):
                shutil.rmtree(work, ignore_errors=True)
            raise
        except BaseException:
            if not alone:  # nobody would find it
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)


def _give_name(made: pathlib.Path, folder: pathlib.Path) -> None:
    try:
        made.replace(folder)
    except OSError:
        if not folder.is_dir():  # else another process has made the same meanwhile
            raise


def _begin(work: pathlib.Path, key: list[Any]) -> None:
    """Makes the folder for shards, and empties it if it holds those of something else."""
    path = work / "made_from.json"
    text = json.dumps(key)
    if not path.exists() or path.read_text() != text:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        path.write_text(text)


class _MadeFrom(NamedTuple):
    """Source and tokenizer of a store; see `Manifest`."""

    source: str
    tokenizer: Tokenizer
    split: str
    held_out: float


def _merge(shards: list[pathlib.Path], folder: pathlib.Path, made_from: _MadeFrom) -> None:
    """Joins one split of all shards into a store."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    name, tokenizer = made_from.split, made_from.tokenizer
    counted = _merge_tokens([shard / f"{name}.tokens" for shard in shards], folder, tokenizer)
    parts = [np.load(shard / f"{name}.lengths.npy") for shard in shards]
    lengths = np.concatenate(parts)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths[:, 0], out=offsets[1:])
    itemsize = token_type(tokenizer.vocab_size).itemsize
    if (folder / TOKENS_FILE).stat().st_size != offsets[-1] * itemsize:
        raise UserError(
            f"the shards in {folder.parents[1]} are damaged, as by a power cut, and are removed: "
            "give the same command again"
        )
    save_array(folder / OFFSETS_FILE, offsets)
    save_array(folder / BYTES_FILE, lengths[:, 1])
    _merge_spans([shard / f"{name}.spans.npy" for shard in shards], folder, parts)
    _merge_labels([shard / f"{name}.labels.npy" for shard in shards], folder)
    _merge_metadata([shard / f"{name}.metadata" for shard in shards], folder)
    _merge_texts([shard / f"{name}.text" for shard in shards], folder, parts)
    # One token may be both what ends documents and what stands for the unknown.
    ends = [*tokenizer.opening, *tokenizer.closing].count(tokenizer.unknown) * len(lengths)
    compared = [json.loads((shard / f"{name}.json").read_text("utf-8")) for shard in shards]
    skipped = [json.loads((shard / "skipped.json").read_text()) for shard in shards]
    messages = [message for entry in skipped for message in entry["first"]]
    manifest = Manifest(
        format=FORMAT,
        source=made_from.source,
        tokenizer=tokenizer.fingerprint,
        split=name,
        held_out=made_from.held_out,
        vocab_size=tokenizer.vocab_size,
        tokens=int(offsets[-1]),
        largest=counted.largest,
        documents=len(lengths),
        text_bytes=int(lengths[:, 1].sum()),
        round_trip=RoundTrip(
            tokens=int(offsets[-1]) - counted.special - ends,
            unknown=counted.unknown - ends,
            unknown_name=unknown_name(tokenizer),
            compared=sum(entry["compared"] for entry in compared),
            lost=sum(entry["lost"] for entry in compared),
            example=next((tuple(e["example"]) for e in compared if e["example"]), ()),
        ),
        separator=None if tokenizer.closing else tokenizer.begin,
        skipped=sum(entry["count"] for entry in skipped),
        skipped_first=tuple(messages[:REPORTED]),
        sizes={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        sha256=counted.sha256,
    )
    with open(folder / MANIFEST_FILE, "w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(manifest), file, indent=1, ensure_ascii=False)
        _flush(file)


class _Counted(NamedTuple):
    """Counts over all tokens of a store."""

    sha256: str
    largest: int
    unknown: int
    special: int  # tokens that stand for no text, without the unknown


def _merge_tokens(
    paths: list[pathlib.Path], folder: pathlib.Path, tokenizer: Tokenizer
) -> _Counted:
    """Joins the tokens of all shards."""
    kind, unknown = token_type(tokenizer.vocab_size), tokenizer.unknown
    marks = {*tokenizer.special.values(), *tokenizer.opening, *tokenizer.closing} - {unknown}
    is_mark = np.isin(np.arange(tokenizer.vocab_size), list(marks))
    hasher, largest, unknowns, special = hashlib.sha256(), 0, 0, 0
    with open(folder / TOKENS_FILE, "wb") as target:
        for path in paths:
            with open(path, "rb") as file:
                while block := file.read(BLOCK):
                    target.write(block)
                    hasher.update(block)
                    tokens = np.frombuffer(block, kind)
                    largest = max(largest, int(tokens.max()))
                    if largest >= tokenizer.vocab_size:
                        raise impossible(largest, tokenizer)
                    special += int(is_mark[tokens].sum())
                    if unknown is not None:
                        unknowns += int((tokens == unknown).sum())
        _flush(target)
    return _Counted(hasher.hexdigest(), largest, unknowns, special)


def _merge_spans(
    paths: list[pathlib.Path], folder: pathlib.Path, lengths: list[np.ndarray]
) -> None:
    """Joins the spans of all shards, counted from the store's first token; no file for none."""
    found, before = [], 0
    for path, part in zip(paths, lengths, strict=True):
        found.append(np.load(path) + np.array([before, before, 0]))
        before += part[:, 0].sum()
    if len(spans := np.concatenate(found)):
        # Searched by their borders: each column lies together.
        save_array(folder / SPANS_FILE, np.ascontiguousarray(spans.T))


def _merge_labels(paths: list[pathlib.Path], folder: pathlib.Path) -> None:
    """Joins the labels of all shards; no file where documents have none.

    Raises:
      UserError: documents of two shards have different numbers of them.
    """
    parts = [part for part in map(np.load, paths) if len(part)]
    widths = {part.shape[1] for part in parts}
    if len(widths) > 1:
        raise UserError(f"documents of one source have {' and '.join(map(str, widths))} labels")
    if widths - {0}:
        save_array(folder / LABELS_FILE, np.concatenate(parts))


def _merge_metadata(paths: list[pathlib.Path], folder: pathlib.Path) -> None:
    """Joins the metadata of all shards; no file where no document has any."""
    edges = block_edges(np.concatenate([np.load(f"{path}.npy") for path in paths]))
    if not edges[1, -1]:
        return
    save_array(folder / METADATA_BLOCKS_FILE, edges)
    with open(folder / METADATA_FILE, "wb") as target:
        for path in paths:
            with open(path, "rb") as file:
                shutil.copyfileobj(file, target, BLOCK)
        _flush(target)


def _merge_texts(
    paths: list[pathlib.Path], folder: pathlib.Path, lengths: list[np.ndarray]
) -> None:
    """Joins the text of the first documents, up to and with the one that makes it `TEXT_BYTES`."""
    left = TEXT_BYTES
    with open(folder / TEXT_FILE, "wb") as target:
        for path, part in zip(paths, lengths, strict=True):
            ends = np.cumsum(part[:, 1])
            wanted = ends[: 1 + np.searchsorted(ends, left)].max(initial=0)
            target.write(text := _head(path, int(wanted)))
            left -= len(text)
            if left <= 0 or len(text) < ends.max(initial=0):
                break
        _flush(target)


def _head(path: pathlib.Path, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)


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
        reason = (
            f"; {skipped} were left out: {counts[names[0]]['skipped_first']}" if skipped else ""
        )
        raise UserError(f"the corpus is empty: there is no document in it{reason}")
    for name, manifest in counts.items():
        if not manifest["documents"]:
            raise UserError(
                f"with held_out={held_out} the {name} part of the corpus is empty; the corpus has "
                f"{documents} document{'s' if documents > 1 else ''} in all. Divide the text into "
                "more of them (split=paragraph), change held_out, or give an evaluation source"
            )


def _check_space(shards: list[pathlib.Path], folder: pathlib.Path) -> None:
    """Raises OSError where the joined shards will not find room on the disk."""
    needed = sum(path.stat().st_size for shard in shards for path in shard.iterdir())
    if needed > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed")


@contextlib.contextmanager
def _locked(folder: pathlib.Path, progress: Progress) -> Iterator[bool]:
    """Holds the folder's lock, and gives whether there is one.

    The operating system takes it back when a process dies.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as file:
        try:
            held = lock(file)
        except BlockingIOError:
            progress("waiting for another process that tokenizes the same text", 0, 1)
            held = lock(file, wait=True)
        yield held
