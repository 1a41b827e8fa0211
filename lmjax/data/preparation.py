"""From the data settings of an experiment to its tokenizer, its token stores and its loader."""

import dataclasses
import functools
import os
import pathlib

from lmjax.config import UserError
from lmjax.data.balance import Coverage
from lmjax.data.cache import cache_folder, shared
from lmjax.data.documents import Progress, Source, digest, silent
from lmjax.data.groups import Groups
from lmjax.data.hashes import FileHashes
from lmjax.data.loader import Loader, Prepare
from lmjax.data.mixture import Mixture
from lmjax.data.plan import Plan
from lmjax.data.request_rows import RequestRows
from lmjax.data.rows import Ring, RowFormat, RowReader
from lmjax.data.run_tokenizer import run_tokenizer
from lmjax.data.settings import Data, Fingerprints
from lmjax.data.store import FORMAT, TokenStore
from lmjax.data.tokenize import build_stores
from lmjax.data.tokenizers import Tokenizer
from lmjax.data.whole_documents import WholeDocuments


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
        rows: RowFormat,
        host_index: int = 0,
        host_count: int = 1,
    ) -> Loader:
        """The loader of the training rows.

        Args:
            plan: which rows each step takes, `data.plan(seed)` at first.
            prepare: of the objective.
            rows: what it reads in a row, of the objective for `data.length`.
            host_index: number of this process among those that train together.
            host_count: how many there are.

        Raises:
            UserError: no document has room in a row.
        """

        weights = self.shares(tuple(domain.weight for domain in self.data.train))
        changes = [
            (int(plan.rows(s.first_step)[0]), self.shares(s.weights)) for s in self.data.stages
        ]
        readers = {name: self.reader(store, rows, name) for name, store in self.train.items()}
        mixture = Mixture(readers, weights, tuple(changes))
        reads = {"spans": rows.reads_spans, "labels": rows.slots is not None}
        return Loader(plan, mixture, prepare, host_index, host_count, self.data.workers, **reads)

    def shares(self, weights: tuple[float, ...]) -> dict[str, float]:
        """Relative shares of the domains that are trained on, with the weights of a stage.

        Raises:
            UserError: `data.shares` cannot be kept.
        """
        pairs = zip(self.data.train, weights, strict=True)
        given = {domain.name: weight for domain, weight in pairs if domain.name in self.train}
        if self.data.shares is None:
            return given
        tokens = {name: store.manifest.tokens for name, store in self.train.items()}
        return self.data.shares.weights(given, tokens)

    def reader(self, store: TokenStore, rows: RowFormat, name: str | None = None) -> RowReader:
        """Rows of a store, as `data.rows` has them; see `loader`.

        The rows of the domain of a `name` have its balance and its weights in the loss.
        """
        if self.data.rows == "ring":
            return Ring(store, rows.length, rows.overlap)
        long, tags = self.data.long_documents, self.coverage.get(name)
        times = None if tags is None else tags.repeats
        if self.data.rows == "groups":
            return Groups(store, rows.length, rows.slots or 1, long, rows.keeps_begin, times)
        chosen = next((d.loss_weights for d in self.data.train if d.name == name), None)
        weights = None if chosen is None else chosen.of_documents(store)
        whole = RequestRows if rows.replies_apart else WholeDocuments
        return whole(store, rows.length, rows.room, long, times, weights)

    @functools.cached_property
    def coverage(self) -> dict[str, Coverage]:
        """Tags of the training documents of each domain that is balanced.

        Raises:
            UserError: a taxonomy cannot be read, or a document has a tag that is not in it.
        """
        return {
            domain.name: domain.balance.of_store(self.train[domain.name])
            for domain in self.data.train
            if domain.balance is not None and domain.name in self.train
        }

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
    tokenizer, more = run_tokenizer(data, pathlib.Path(tokenizer_folder), found, progress)
    train: dict[str, TokenStore] = {}
    held_out: dict[str, TokenStore] = {}
    for domain in data.train:
        marks, fraction = found[domain.name], data.held_out_of(domain)
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
        | ({} if domain.balance is None else domain.balance.marks())
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
