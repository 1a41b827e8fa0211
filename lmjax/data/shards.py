"""Tokenizes a source shard by shard."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import types
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from lmjax.config import UserError
from lmjax.data.documents import Document, Part, Progress, Source, is_held_out
from lmjax.data.executor import map_items
from lmjax.data.round_trip import Comparison
from lmjax.data.tokenizers import Tokenizer, load_tokenizer, token_type

BATCH = 1 << 20  # characters that are tokenized together
SHARD = 16 << 20  # bytes of source that make a shard at least, in a large corpus
SHARDS = 32  # into which a small corpus is divided
REPORTED = 5  # skipped pieces of input whose message is kept
TEXT_BYTES = 16_000_000  # of a split's text that are kept beside its tokens, whole documents
# Shards that begin within so many bytes of source keep text that is not held out: enough, however
# much there is beside the text, and no second copy of a large corpus while it is tokenized.
EARLY = 1 << 30


class Task(NamedTuple):
    """A shard to be tokenized."""

    source: Source
    parts: tuple[Part, ...]
    held_out: float
    before: int  # bytes of source in the shards before it

    @property
    def size(self) -> int:
        """Bytes of source."""
        return sum(part.size for part in self.parts)


def split_names(held_out: float) -> tuple[str, ...]:
    """The stores that a source is divided into."""
    return ("train", "held_out") if held_out else ("all",)


def make_shards(
    source: Source,
    tokenizer: Tokenizer,
    work: pathlib.Path,
    held_out: float,
    workers: int,
    progress: Progress,
) -> list[pathlib.Path]:
    """Tokenizes what is not tokenized yet; the folders of all shards, in order."""
    parts = source.parts()
    tasks: list[Task] = []
    before = 0
    for shard in _group(parts, sum(part.size for part in parts)):
        tasks.append(Task(source, shard, held_out, before))
        before += tasks[-1].size
    start = functools.partial(_same, tokenizer)
    if workers:
        tokenizer.save(work / "tokenizer")
        start = functools.partial(_load, work / "tokenizer")
    return map_items(
        _write_shard, tasks, work, start, workers, progress, "tokenizing", lambda task: task.size
    )


def _same(tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer


def _load(folder: pathlib.Path) -> Tokenizer:
    """The tokenizer of a worker, which shares the machine with others."""
    tokenizer = load_tokenizer(folder)
    tokenizer.threads = 1
    return tokenizer


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


def _write_shard(task: Task, folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Tokenizes a shard into its folder."""
    skipped = _Skipped()
    names = split_names(task.held_out)
    with contextlib.ExitStack() as stack:

        def file(name: str) -> BinaryIO:
            return stack.enter_context(open(folder / name, "wb"))

        splits = [
            _Split(file(f"{name}.tokens"), file(f"{name}.text"), tokenizer, keeps)
            for name, keeps in zip(names, _keep_text(task), strict=True)
        ]
        for documents in _batches(task, skipped):
            for document, pieces in zip(documents, _encode(documents, tokenizer)):
                held_out = is_held_out(document, task.held_out)
                splits[held_out if len(names) > 1 else 0].add(document, pieces)
    for name, split in zip(names, splits, strict=True):
        split.finish(folder / name)
    (folder / "skipped.json").write_text(json.dumps(dataclasses.asdict(skipped)))


def _keep_text(task: Task) -> list[bool]:
    """Whether the shard keeps text, for each split."""
    names = split_names(task.held_out)
    return [name == "held_out" or task.before < EARLY for name in names]


class _Split:
    """One split of a shard: tokens, the text of its first documents, lengths, a comparison."""

    def __init__(self, tokens: BinaryIO, text: BinaryIO, tokenizer: Tokenizer, keeps_text: bool):
        self._tokens, self._text, self._tokenizer = tokens, text, tokenizer
        self._room = TEXT_BYTES if keeps_text else 0
        self._lengths: list[tuple[int, int]] = []
        self._comparison = Comparison(tokenizer)

    def add(self, document: Document, pieces: list[list[int]]) -> None:
        """Takes a document and the tokens of its pieces."""
        ids, text = _framed(document, pieces, self._tokenizer), document.text.encode("utf-8")
        self._tokens.write(ids.tobytes())
        if self._room > 0:
            self._text.write(text)
            self._room -= len(text)
        self._lengths.append((len(ids), len(text)))
        if self._comparison.goes_on:
            self._comparison.add(_pieces(document), pieces)

    def finish(self, path: pathlib.Path) -> None:
        """Writes what is known when all documents are there; `path` with another ending."""
        lengths = np.asarray(self._lengths, np.int64).reshape(-1, 2)
        save_array(path.with_suffix(".lengths.npy"), lengths)
        path.with_suffix(".json").write_text(json.dumps(self._comparison.counts()), "utf-8")


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


def _encode(documents: list[Document], tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
    """The tokens of each piece of each document."""
    encoded = iter(
        tokenizer.encode_batch([text for document in documents for text in _pieces(document)])
    )
    for document in documents:
        yield [next(encoded) for _ in _pieces(document)]


def _framed(document: Document, pieces: list[list[int]], tokenizer: Tokenizer) -> np.ndarray:
    """A document's tokens with what opens and closes one: begin and end, one of them, or the
    separator before it.

    An answer stands between its two special tokens.

    Raises:
      UserError: the tokenizer lacks these, or gives ids that it cannot have.
    """
    ids = pieces[0]
    if document.answer is not None:
        mask, closing = _marks(document, tokenizer)
        ids = [*ids, mask, *pieces[1], closing, *pieces[2]]
    try:
        framed = [*tokenizer.opening, *ids, *tokenizer.closing]
        return np.asarray(framed, token_type(tokenizer.vocab_size))
    except OverflowError:
        wrong = next(token for token in ids if not 0 <= token < tokenizer.vocab_size)
        raise impossible(wrong, tokenizer) from None


def impossible(token: int, tokenizer: Tokenizer) -> UserError:
    """The error for an id that the tokenizer cannot have."""
    size = tokenizer.vocab_size
    return UserError(f"the tokenizer gives the id {token}, but says that it has vocab_size={size}")


def _pieces(document: Document) -> tuple[str, ...]:
    """The text, cut before and behind its answer where it has one."""
    text, answer = document.text, document.answer
    if answer is None:
        return (text,)
    return text[: answer.first], text[answer.first : answer.end], text[answer.end :]


def _marks(document: Document, tokenizer: Tokenizer) -> tuple[int, int]:
    """Ids of the tokens around a document's answer."""
    names = document.answer.mask, document.answer.closing
    if missing := [name for name in names if name not in tokenizer.special]:
        known = ", ".join(sorted(tokenizer.special)[:12]) or "none"
        raise UserError(
            f"{document.identity}: the answer shall stand between the tokens {names[0]!r} and "
            f"{names[1]!r}, but the tokenizer lacks {' and '.join(map(repr, missing))} (its special"
            f" tokens: {known}). Name others in the source, or add them behind the vocabulary with "
            "data.tokenizer='WithTokens(tokenizer=..., tokens=(...))'"
        )
    return tokenizer.special[names[0]], tokenizer.special[names[1]]


def save_array(path: pathlib.Path, array: np.ndarray) -> None:
    """Like `np.save` on the path, which does not say why it fails when the disk is full."""
    with open(path, "wb") as file:
        # To a file as such numpy writes in C; to anything with a `write`, by it.
        np.save(types.SimpleNamespace(write=file.write), array)
