"""The tokenizer of a run: of its folder, of the cache, or made of the text now."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator

from lmjax.config import UserError, fingerprint
from lmjax.data.cache import cache_errors_told, cache_folder, shared
from lmjax.data.documents import Document, Part, Progress, digest, in_split
from lmjax.data.settings import Data, Domain, Fingerprints
from lmjax.data.tokenizers import SETTINGS_FILE, Corpus, Tokenizer, load_tokenizer
from lmjax.files import errors_told, write_atomically

TOGETHER = 64  # parts of a source that are read side by side for the tokenizer
SURPLUS = 4  # times as much text is opened as the tokenizer learns from
ORIGIN_FILE = "origin.txt"


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
        fraction = self.data.held_out_of(domain)
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


def run_tokenizer(
    data: Data, folder: pathlib.Path, fingerprints: Fingerprints, progress: Progress
) -> tuple[Tokenizer, tuple[str, ...]]:
    """The run's tokenizer: of the run folder, of the cache, or made now; and what to warn of.

    Args:
        data: the settings.
        folder: of the tokenizer in the run folder.
        fingerprints: of the text.
        progress: is told what takes time.

    Raises:
        UserError: it cannot be made, or the folder's was made otherwise.
    """
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
    shares = [f"{domain.weight} {data.held_out_of(domain)}" for domain in data.train]
    marks = [mark for domain in data.train for mark in found[domain.name].values()]
    return f"{digest(fingerprint(data.tokenizer), *shares)}-{digest(*marks)}"
