"""Tokenizes a source shard by shard."""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import types
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from lmjax.config import UserError
from lmjax.data.documents import Document, Part, Progress, Source, is_held_out
from lmjax.data.executor import map_items
from lmjax.data.metadata import MetadataWriter
from lmjax.data.round_trip import Comparison
from lmjax.data.spans import KINDS
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
    for shard in grouped(parts, SHARDS):
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


def grouped(parts: Sequence[Part], shards: int) -> Iterator[tuple[Part, ...]]:
    """Neighbouring parts together; independent of the number of workers, so that any may go on.

    Args:
      parts: of a source.
      shards: groups that a small corpus is divided into, about; those of a large one have `SHARD`
        bytes.
    """
    wanted = min(SHARD, sum(part.size for part in parts) // shards)
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
            _Split(
                *(file(f"{name}.{kind}") for kind in ("tokens", "text", "metadata")),
                tokenizer,
                keeps,
            )
            for name, keeps in zip(names, _keep_text(task), strict=True)
        ]
        for documents in _batches(task, skipped):
            for document, pieces in zip(documents, _encode(documents, tokenizer)):
                held_out = len(names) > 1 and is_held_out(document, task.held_out)
                splits[held_out].add(document, pieces)
            for split in splits:
                split.write()
        for name, split in zip(names, splits, strict=True):
            split.finish(folder / name)
    (folder / "skipped.json").write_text(json.dumps(dataclasses.asdict(skipped)))


def _keep_text(task: Task) -> list[bool]:
    """Returns whether the shard keeps text, for each split."""
    names = split_names(task.held_out)
    return [name == "held_out" or task.before < EARLY for name in names]


class _Split:
    """One split of a shard: its tokens, and what is known of its documents."""

    def __init__(
        self,
        tokens: BinaryIO,
        text: BinaryIO,
        metadata: BinaryIO,
        tokenizer: Tokenizer,
        keeps_text: bool,
    ):
        self._tokens, self._text, self._tokenizer = tokens, text, tokenizer
        self._metadata = MetadataWriter(metadata)
        self._room = TEXT_BYTES if keeps_text else 0
        self._lengths: list[tuple[int, int]] = []
        self._spans: list[tuple[int, int, int]] = []
        self._labels: list[tuple[float, ...]] = []
        self._size = 0  # tokens
        self._waiting: list[np.ndarray] = []  # tokens that are not written yet
        self._frame = _Frame(tokenizer)
        self._comparison = Comparison(tokenizer)

    def add(self, document: Document, pieces: Sequence[np.ndarray]) -> None:
        """Takes a document and the tokens of its pieces, to be written by `write`."""
        parts, spans = self._frame.around(document, pieces)
        size = sum(map(len, parts))
        self._waiting += parts
        text = document.text.encode("utf-8")
        if self._room > 0:
            self._text.write(text)
            self._room -= len(text)
        self._lengths.append((size, len(text)))
        if spans:
            before = self._size
            self._spans += [(before + first, before + end, kind) for first, end, kind in spans]
        self._size += size
        self._metadata.add(document.metadata, document.identity)
        self._labels.append(document.labels)
        if len(document.labels) != len(self._labels[0]):
            raise UserError(
                f"{document.identity} has {len(document.labels)} labels, and others of the source "
                f"have {len(self._labels[0])}"
            )
        if self._comparison.goes_on:
            self._comparison.add(_pieces(document), [tokens.tolist() for tokens in pieces])

    def write(self) -> None:
        """Writes the tokens of the documents that were taken: of many at once, as they are short.

        Raises:
          UserError: the tokenizer gives ids that it cannot have.
        """
        if not self._waiting:
            return
        ids = np.concatenate(self._waiting)
        self._waiting.clear()
        size = self._tokenizer.vocab_size
        if len(ids) and not 0 <= ids.min() <= ids.max() < size:
            raise impossible(int(ids[(ids < 0) | (ids >= size)][0]), self._tokenizer)
        self._tokens.write(ids.astype(token_type(size)))

    def finish(self, path: pathlib.Path) -> None:
        """Writes what is known when all documents are there; `path` with another ending."""
        lengths = np.asarray(self._lengths, np.int64).reshape(-1, 2)
        save_array(path.with_suffix(".lengths.npy"), lengths)
        spans = np.asarray(self._spans, np.int64).reshape(-1, 3)
        save_array(path.with_suffix(".spans.npy"), spans)
        save_array(path.with_suffix(".metadata.npy"), self._metadata.finish())
        width = len(self._labels[0]) if self._labels else 0
        labels = np.asarray(self._labels, np.float32).reshape(len(self._labels), width)
        save_array(path.with_suffix(".labels.npy"), labels)
        path.with_suffix(".json").write_text(json.dumps(self._comparison.counts()), "utf-8")


@dataclasses.dataclass
class _Skipped:
    """Pieces of input that were left out of a shard."""

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


def _encode(documents: list[Document], tokenizer: Tokenizer) -> Iterator[list[np.ndarray]]:
    """The tokens of each piece of each document."""
    texts = [text for document in documents for text in _pieces(document)]
    encoded = iter(tokenizer.encode_arrays(texts))
    for document in documents:
        yield [next(encoded) for _ in range(_count_pieces(document))]


class _Frame:
    """Tokens that open and close a document: begin and end, one of them, or the separator."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._opening, self._closing = map(_ids, (tokenizer.opening, tokenizer.closing))

    def around(
        self, document: Document, pieces: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], list[tuple[int, int, int]]]:
        """The parts of a document's tokens, in order, and its spans among the tokens.

        Spans are (first token, one past last, number of the kind), without the tokens that are put
        around them.

        Raises:
          UserError: the tokenizer lacks what stands around them.
        """
        if document.encode is not None:
            ids, spans = _encoded(document, self._tokenizer)
            return [_ids(ids)], spans
        if not document.spans:
            return [self._opening, pieces[0], self._closing], []
        parts, spans = [self._opening, pieces[0]], []
        for number, span in enumerate(document.spans):
            content, behind = pieces[2 * number + 1 : 2 * number + 3]
            parts.append(_ids(_mark(document, span.opening, self._tokenizer)))
            first = sum(map(len, parts))
            spans.append((first, first + len(content), KINDS.index(span.kind)))
            parts += [content, _ids(_mark(document, span.closing, self._tokenizer)), behind]
        return [*parts, self._closing], spans


def _ids(tokens: Sequence[int]) -> np.ndarray:
    """Some ids as an array, which may be wrong ones."""
    return np.asarray(tokens, np.int64)


def _encoded(
    document: Document, tokenizer: Tokenizer
) -> tuple[Sequence[int], list[tuple[int, int, int]]]:
    """The tokens and spans of a document that makes them itself.

    Raises:
      UserError: the tokenizer has not what it takes; with the document's name.
    """
    try:
        ids, spans = document.encode(tokenizer)
    except UserError as error:
        raise UserError(f"{document.identity}: {error}") from None
    numbers = {kind: number for number, kind in enumerate(KINDS)}
    return ids, [(first, end, numbers.get(kind, kind)) for first, end, kind in spans]


def _count_pieces(document: Document) -> int:
    return 0 if document.encode is not None else 1 + 2 * len(document.spans)


def impossible(token: int, tokenizer: Tokenizer) -> UserError:
    """The error for an id that the tokenizer cannot have."""
    size = tokenizer.vocab_size
    return UserError(f"the tokenizer gives the id {token}, but says that it has vocab_size={size}")


def _pieces(document: Document) -> list[str]:
    """The text, cut at the borders of its spans: before, in and between them, and behind.

    Nothing of a document that makes its tokens itself.

    Raises:
      UserError: the spans overlap, fall, or reach beyond the text.
    """
    if document.encode is not None:
        return []
    if not document.spans:
        return [document.text]
    edges = [0, *(edge for span in document.spans for edge in span[:2]), len(document.text)]
    if edges != sorted(edges):
        raise UserError(
            f"{document.identity}: spans have to rise without overlap in a text of "
            f"{len(document.text)} characters, got "
            f"{', '.join(f'{span.first} to {span.end}' for span in document.spans)}"
        )
    return [document.text[first:end] for first, end in itertools.pairwise(edges)]


def _mark(document: Document, name: str, tokenizer: Tokenizer) -> list[int]:
    """The special token of a name beside a span; none where it is empty."""
    if not name:
        return []
    if name not in tokenizer.special:
        names = dict.fromkeys(name for span in document.spans for name in span[3:] if name)
        missing = [name for name in names if name not in tokenizer.special]
        known = ", ".join(sorted(tokenizer.special)[:12]) or "none"
        kinds = " and ".join(dict.fromkeys(span.kind for span in document.spans))
        raise UserError(
            f"{document.identity}: the tokens {' and '.join(map(repr, names))} shall stand around "
            f"the {kinds}, but the tokenizer lacks {' and '.join(map(repr, missing))} (its special"
            f" tokens: {known}). Name others in the source, or add them behind the vocabulary with "
            "data.tokenizer='WithTokens(tokenizer=..., tokens=(...))'"
        )
    return [tokenizer.special[name]]


def save_array(path: pathlib.Path, array: np.ndarray) -> None:
    """Like `np.save` on the path, which does not say why it fails when the disk is full."""
    with open(path, "wb") as file:
        # To a file as such numpy writes in C; to anything with a `write`, by it.
        np.save(types.SimpleNamespace(write=file.write), array)
