"""From the data settings of an experiment to its tokenizer, its token stores and its loader."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Literal

from lmjax.config import UserError, config, fingerprint
from lmjax.data.cache import cache_errors_told, cache_folder, shared
from lmjax.data.documents import Document, Part, Progress, Source, digest, in_split, silent
from lmjax.data.groups import Groups
from lmjax.data.hashes import FileHashes
from lmjax.data.loader import Loader, Prepare
from lmjax.data.mixture import Mixture
from lmjax.data.plan import Plan, make_plan
from lmjax.data.request_rows import RequestRows
from lmjax.data.rows import Ring, RowReader, WholeDocuments
from lmjax.data.store import FORMAT, TokenStore
from lmjax.data.tokenize import build_stores
from lmjax.data.tokenizers import (
    SETTINGS_FILE,
    Corpus,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
)
from lmjax.data.tokenizers.subwords import TrainedBPE
from lmjax.files import errors_told, write_atomically
from lmjax.remote import check_path

TOGETHER = 64  # parts of a source that are read side by side for the tokenizer
SURPLUS = 4  # times as much text is opened as the tokenizer learns from
ORIGIN_FILE = "origin.txt"

Fingerprints = Mapping[str, Mapping[str, str]]  # by domain, of its "source" and "evaluation"


@config
class Domain:
    """Text of one kind: trained on with its weight, and evaluated by its name."""

    name: str  # under which its held-out loss is reported
    source: Source  # the text
    weight: float = 1.0  # relative share of the training rows; 0 in every stage: evaluated only
    evaluation: Source | None = None  # held-out text, in place of a part of `source`

    def validate(self) -> None:
        if self.weight < 0:
            raise UserError(f"the weight of {self.name} is {self.weight}; it cannot be negative")
        if self.weight == 0 and self.evaluation is not None:
            raise UserError(f"{self.name} has weight 0: give what is evaluated as its source")


@config
class Stage:
    """From `first_step` on, the domains have these weights."""

    first_step: int  # 0-based step
    weights: tuple[float, ...]  # of the domains of data.train, in their order


@config
class Data:
    """Text to train on, its tokenizer, and the rows of a step."""

    train: tuple[Domain, ...]  # the mixture
    stages: tuple[Stage, ...] = ()  # changes of its weights
    tokenizer: TokenizerConfig = TrainedBPE()  # made once, then kept with the run
    held_out: float = 0.05  # fraction of each source's documents that is evaluated, not trained on
    length: int = 1024  # tokens that the model reads in a row
    batch_size: int = 16  # rows in a step, over all devices
    ramp: tuple[tuple[int, int], ...] = ()  # changes of batch_size: (step, rows from there on)
    # what is a row: a stretch of all the text, with documents cut at its edges, whole documents, or
    # documents that belong together, each in a slot: compared answers, or one text with its labels
    rows: Literal["ring", "whole_documents", "groups"] = "ring"
    # what to do with a document that is longer than a row of whole ones, or than an answer may be:
    # cut it, or leave it out
    long_documents: Literal["cut", "drop"] = "cut"
    workers: int = 0  # processes that prepare batches; 0 is a thread
    tokenize_workers: int = 0  # processes that tokenize; 0 uses this one
    # folder for tokens; empty is $LMJAX_CACHE, or ~/.cache/lmjax; machines share those at a URL
    cache: str = ""
    # what to do when a run goes on and its text is another one: stop, or say so and train on it
    on_change: Literal["raise", "warn"] = "raise"

    def validate(self) -> None:
        """Raises UserError for data that cannot be trained on."""
        check_path(self.cache, "cache", write=True)
        names = [domain.name for domain in self.train]
        if not names or len(set(names)) < len(names):
            raise UserError(f"data.train needs domains of different names, got {names}")
        self._check_stages()
        if not any(domain.weight for domain in self.train):
            raise UserError("every domain of data.train has weight 0; there is nothing to train on")
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out is {self.held_out}; it must be at least 0 and below 1")
        for name in ("length", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("workers", "tokenize_workers"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it cannot be negative")

    def _check_stages(self) -> None:
        steps = [stage.first_step for stage in self.stages]
        if steps != sorted(set(steps)) or any(step < 1 for step in steps):
            raise UserError(f"the first steps of data.stages must rise from 1, got {steps}")
        for stage in self.stages:
            if len(stage.weights) != len(self.train):
                raise UserError(
                    f"a stage of data.stages has {len(stage.weights)} weights, but there are "
                    f"{len(self.train)} domains"
                )
            if min(stage.weights) < 0 or not any(stage.weights):
                raise UserError(
                    f"the weights of a stage are {stage.weights}; none can be negative, and not "
                    "all 0"
                )

    def is_trained(self, domain: Domain) -> bool:
        """Returns whether the domain has a weight in any stage."""
        number = self.train.index(domain)
        return bool(domain.weight) or any(stage.weights[number] for stage in self.stages)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The rows of a step, first and after each change."""
        return (self.batch_size, *(rows for _, rows in self.ramp))

    def plan(self, seed: int) -> Plan:
        """The data plan of a run that begins with these settings."""
        return make_plan(seed, self.batch_size, self.ramp)


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Tokenizer and token stores of a job.

    Attributes:
      tokenizer: of all the stores.
      train: the stores that are trained on, by domain.
      held_out: the stores that are evaluated, by domain.
      data: the settings.
      fingerprints: what the text of each domain is known by, to be kept with what is trained on it.
      warnings: what has changed since, where `data.on_change` lets the run go on.
    """

    tokenizer: Tokenizer
    train: dict[str, TokenStore]
    held_out: dict[str, TokenStore]
    data: Data
    fingerprints: Fingerprints = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def loader(
        self,
        plan: Plan,
        prepare: Prepare,
        row_length: int,
        overlap: int = 1,
        host_index: int = 0,
        host_count: int = 1,
        spans: bool = False,
        room: int | None = None,
        slots: int | None = None,
        keeps_begin: bool = False,
        replies_apart: bool = False,
    ) -> Loader:
        """The loader of the training rows.

        Args:
            plan: which rows each step takes, `data.plan(seed)` at first.
            prepare: of the objective.
            row_length: tokens of the store that a row takes, of the objective for `data.length`.
            overlap: how many of them the next row takes too, of the objective likewise.
            host_index: number of this process among those that train together.
            host_count: how many there are.
            spans: whether `prepare` reads answers and turns.
            room: how many of a row's tokens whole documents may fill, of the objective likewise.
            slots: documents of a row of groups, whose labels `prepare` reads; None: it has none.
            keeps_begin: whether a document of a group that is too long keeps its beginning.
            replies_apart: whether requests and replies have a room of their own each.

        Raises:
            UserError: no document has room in a row.
        """

        def named(weights: tuple[float, ...]) -> dict[str, float]:
            pairs = zip(self.data.train, weights, strict=True)
            return {domain.name: weight for domain, weight in pairs if domain.name in self.train}

        weights = named(tuple(domain.weight for domain in self.data.train))
        changes = [(int(plan.rows(s.first_step)[0]), named(s.weights)) for s in self.data.stages]
        readers = {
            name: self.reader(store, row_length, overlap, room, slots, keeps_begin, replies_apart)
            for name, store in self.train.items()
        }
        mixture = Mixture(readers, weights, tuple(changes))
        workers = self.data.workers
        reads = {"spans": spans, "labels": slots is not None}
        return Loader(plan, mixture, prepare, host_index, host_count, workers, **reads)

    def reader(
        self,
        store: TokenStore,
        row_length: int,
        overlap: int = 1,
        room: int | None = None,
        slots: int | None = None,
        keeps_begin: bool = False,
        replies_apart: bool = False,
    ) -> RowReader:
        """Rows of a store, as `data.rows` has them; see `loader`."""
        if self.data.rows == "ring":
            return Ring(store, row_length, overlap)
        if self.data.rows == "groups":
            return Groups(store, row_length, slots or 1, self.data.long_documents, keeps_begin)
        if replies_apart:
            return RequestRows(store, row_length, room, self.data.long_documents)
        return WholeDocuments(store, row_length, room, self.data.long_documents)

    def skipped(self) -> dict[str, int]:
        """Numbers of pieces of input that were left out (on_error=skip), by the first's message."""
        found = {}
        for store in (*self.train.values(), *self.held_out.values()):
            if store.manifest.skipped:
                found[store.manifest.skipped_first[0]] = store.manifest.skipped
        return found


def prepare(
    data: Data,
    tokenizer_folder: str | os.PathLike,
    progress: Progress = silent,
    before: Fingerprints | None = None,
) -> PreparedData:
    """Makes, or finds in the cache, all that a job needs of its data.

    The tokenizer is kept in a folder of the run, and read from there when the run goes on. A text
    is known by what its files hold: it may be copied to another place, with other names.

    Args:
        data: the settings.
        tokenizer_folder: of the run.
        progress: is told what takes time.
        before: `PreparedData.fingerprints` of what was trained on so far; None: nothing was, or it
            is not known.

    Raises:
        UserError: a source cannot be read, the tokenizer cannot be made, a part of the data comes
            out empty, the cache cannot be written, or, unless `data.on_change` is "warn", the text
            is not what it was. Other settings of the tokenizer than the run folder's are refused in
            any case.
    """
    hash_files = FileHashes(cache_folder(data.cache) / "hashes", progress)
    found = _identify(data, hash_files)
    warnings = _changes(data, found, before)
    tokenizer, more = _tokenizer(data, pathlib.Path(tokenizer_folder), found, progress)
    train: dict[str, TokenStore] = {}
    held_out: dict[str, TokenStore] = {}
    for domain in data.train:
        marks, fraction = found[domain.name], _held_out(data, domain)
        made_with = tokenizer, hash_files, progress
        stores = _stores(data, domain.source, marks["source"], fraction, *made_with)
        if domain.evaluation is not None:
            mark = marks["evaluation"]
            evaluation = _stores(data, domain.evaluation, mark, 0.0, *made_with)
            held_out[domain.name] = evaluation["all"]
        elif not data.is_trained(domain):
            held_out[domain.name] = stores["all"]
            continue
        elif fraction:
            held_out[domain.name] = stores["held_out"]
        train[domain.name] = stores["train" if fraction else "all"]
    return PreparedData(tokenizer, train, held_out, data, found, warnings + more)


def _identify(data: Data, hash_files: FileHashes) -> Fingerprints:
    """Fingerprints of each domain's text."""
    return {
        domain.name: {
            name: source.fingerprint(hash_files)
            for name in ("source", "evaluation")
            if (source := getattr(domain, name)) is not None
        }
        for domain in data.train
    }


def _changes(data: Data, found: Fingerprints, before: Fingerprints | None) -> tuple[str, ...]:
    """Warnings where the text is not the one before.

    Raises:
        UserError: in place of the warning, as `data.on_change` says.
    """
    changed = [
        f"{name} ({kind})"
        for name, marks in found.items()
        for kind, mark in marks.items()
        if before is not None and before.get(name, {}).get(kind) != mark
    ]
    if not changed:
        return ()
    words = f"the text is another one than the run was trained on so far: {', '.join(changed)}"
    if data.on_change == "raise":
        raise UserError(
            f"{words}. Its files were changed, cut short, added to or put in another order. Put "
            "them back, choose another output folder, or set data.on_change=warn to go on with them"
        )
    return (words,)


def _held_out(data: Data, domain: Domain) -> float:
    return data.held_out if data.is_trained(domain) and domain.evaluation is None else 0.0


def _stores(
    data: Data,
    source: Source,
    mark: str,
    fraction: float,
    tokenizer: Tokenizer,
    hash_files: FileHashes,
    progress: Progress,
) -> dict[str, TokenStore]:
    key = digest(str(FORMAT), mark, tokenizer.fingerprint, str(fraction))
    folder = cache_folder(data.cache) / "tokens" / f"{type(source).__name__}-{key}"
    workers = data.tokenize_workers
    made_with = progress, mark, hash_files
    with shared(data.cache, "tokens", folder):
        return build_stores(source, tokenizer, folder, fraction, workers, *made_with)


@dataclasses.dataclass(frozen=True)
class _Texts(Corpus):
    """The text that a tokenizer learns from."""

    data: Data
    progress: Progress

    def sample(self, size: int) -> Iterator[str]:
        """A share of `size` from each domain that is trained on, in proportion to its weight."""
        domains = [domain for domain in self.data.train if domain.weight]
        total = sum(domain.weight for domain in domains)
        for number, domain in enumerate(domains):
            self.progress("reading text for the tokenizer", number, len(domains))
            yield from self._spread(domain, int(size * domain.weight / total))

    def _spread(self, domain: Domain, size: int) -> Iterator[str]:
        """Training documents from all over a source.

        Where there is far more text than is wanted, only some parts are opened. They are read side
        by side, a limited number at a time, a document of each in turn.
        """
        parts = domain.source.parts()
        surplus = sum(part.size for part in parts) // (SURPLUS * max(size, 1))
        parts = parts[:: max(1, min(surplus, len(parts) // TOGETHER))]
        groups = -(-len(parts) // TOGETHER)
        for group in range(groups):
            left = size / groups
            for document in self._in_turn(domain, parts[group::groups]):
                if left <= 0:
                    break
                left -= len(document.text.encode("utf-8"))
                yield document.text

    def _in_turn(self, domain: Domain, parts: tuple[Part, ...]) -> Iterator[Document]:
        fraction = _held_out(self.data, domain)
        readers = [domain.source.read(part, lambda message: None) for part in parts]
        for turn in itertools.zip_longest(*readers):
            for document in turn:
                if document is not None and in_split(document, "train", fraction):
                    yield document

    def everything(self) -> Iterator[str]:
        for domain in self.data.train:
            for source in filter(None, (domain.source, domain.evaluation)):
                for document in source.documents():
                    yield document.text


def _tokenizer(
    data: Data, folder: pathlib.Path, fingerprints: Fingerprints, progress: Progress
) -> tuple[Tokenizer, tuple[str, ...]]:
    """The run's tokenizer: of the run folder, of the cache, or made now; and what to warn of."""
    origin = _origin(data, fingerprints)
    path = folder / ORIGIN_FILE
    with errors_told(f"cannot use the tokenizer in {folder}"):
        if (folder / SETTINGS_FILE).exists():
            found = path.read_text(encoding="utf-8") if path.exists() else ""
            return load_tokenizer(folder), _other_origin(data, folder, found, origin)
    cached = cache_folder(data.cache) / "tokenizers" / origin
    with cache_errors_told(cached), shared(data.cache, "tokenizers", cached):
        if (cached / SETTINGS_FILE).exists():
            try:
                tokenizer = load_tokenizer(cached)
            except UserError as error:
                raise UserError(f"{error}; delete {cached}, and it is made again") from None
        else:
            cached.parent.mkdir(parents=True, exist_ok=True)  # not only when it has been made
            progress("making the tokenizer", 0, 1)
            tokenizer = data.tokenizer.build(_Texts(data, progress))
            tokenizer.save(cached)
            progress("making the tokenizer", 1, 1)
    with errors_told(f"cannot keep the tokenizer in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, origin)
        tokenizer.save(folder)
    return tokenizer, ()


def _other_origin(data: Data, folder: pathlib.Path, found: str, origin: str) -> tuple[str, ...]:
    """Warnings where the folder's tokenizer was made from something else.

    Raises:
        UserError: it was made by other settings, or from other text and `data.on_change` says so.
    """
    if found == origin:
        return ()
    of_text = "-" in origin
    if of_text and len(found) == len(digest()):  # from when text was known by the time of its files
        return ()
    same_settings = of_text and found.partition("-")[0] == origin.partition("-")[0]
    if same_settings and data.on_change == "warn":
        return (f"the tokenizer in {folder} was made from the text before, and stays",)
    raise UserError(
        f"the tokenizer in {folder} was made from other text or other settings than this "
        "experiment's; the run cannot go on with another one. Give another output folder, or put "
        "the text and settings back"
        + (" (data.on_change=warn goes on with other text)" if same_settings else "")
    )


def _origin(data: Data, found: Fingerprints) -> str:
    """A fingerprint of all that decides about the tokenizer; of settings and of text where both."""
    own = data.tokenizer.origin()
    if own is not None:
        return digest(own)
    shares = [f"{domain.weight} {_held_out(data, domain)}" for domain in data.train]
    marks = [mark for domain in data.train for mark in found[domain.name].values()]
    return f"{digest(fingerprint(data.tokenizer), *shares)}-{digest(*marks)}"
