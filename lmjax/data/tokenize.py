"""Makes token stores: in parallel, going on where a kill stopped it, visible only when complete."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from lmjax.config import UserError
from lmjax.data.documents import Source
from lmjax.data.shards import (
    REPORTED,
    SHARD,
    SHARDS,
    Progress,
    make_shards,
    save_array,
    split_names,
)
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
from lmjax.data.tokenizers import Tokenizer

BLOCK = 1 << 20  # bytes copied at a time


def silent(what: str, done: int, total: int) -> None:
    """A `Progress` that tells nobody."""


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
                shards = make_shards(source, tokenizer, work, held_out, workers, progress)
                _check_space(shards, work)
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


def _merge(shards: list[pathlib.Path], folder: pathlib.Path, manifest: Manifest) -> None:
    """Joins one split of all shards into a store."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    name = manifest.split
    hasher = hashlib.sha256()
    with open(folder / TOKENS_FILE, "wb") as target:
        for shard in shards:
            with open(shard / f"{name}.tokens", "rb") as file:
                while block := file.read(BLOCK):
                    target.write(block)
                    hasher.update(block)
        _flush(target)
    lengths = np.concatenate([np.load(shard / f"{name}.lengths.npy") for shard in shards])
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths[:, 0], out=offsets[1:])
    save_array(folder / OFFSETS_FILE, offsets)
    save_array(folder / BYTES_FILE, lengths[:, 1])
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
