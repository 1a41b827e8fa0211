"""Documents, the sources that give them, and which documents are held out of training."""

import abc
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lmjax.config import config, fingerprint
from lmjax.data.spans import Span, SpanKind
from lmjax.data.tokenizers import Tokenizer

Split = Literal["all", "train", "held_out"]
# Tokenizer -> the ids of a document, and its spans among them: first, one past the last, and kind,
# or a negative number of classes (`lmjax.data.spans.class_code`).
Encode = Callable[[Tokenizer], tuple[Sequence[int], Sequence[tuple[int, int, SpanKind | int]]]]


class BadRecord(ValueError):
    """A record of a source that has not what it should have; the message says what."""


class Document(NamedTuple):
    """A text, and where it comes from.

    Documents of one `group` stand on the same side of the held-out split. By default the text
    itself is the group, so that copies of a document never stand on both sides.
    """

    text: str
    identity: str  # file, and line or number in it: for messages
    group: str = ""
    spans: tuple[Span, ...] = ()  # answers or turns
    metadata: Mapping[str, Any] | None = None  # small JSON values: url, licence, score, language
    labels: tuple[float, ...] = ()  # numbers to learn: classes, ranks, scores; as many in each
    # Makes its ids, all of them, where these are not those of its text, cut at its spans.
    encode: Encode | None = None


class Part(NamedTuple):
    """A piece of a source that is read on its own: a file, or a range of bytes or examples."""

    name: str
    start: int = 0
    stop: int = 0
    size: int = 0  # about how many bytes there are to read; for progress and for sharing out


OnSkip = Callable[[str], None]  # is told about each piece of input that is left out
HashFiles = Callable[[Sequence[str]], list[str]]  # what files hold, one word each (`FileHashes`)
Progress = Callable[[str, int, int], None]  # what is being done, how much is done, of how much


def silent(what: str, done: int, total: int) -> None:
    """A `Progress` that tells nobody."""


@config
class Source(abc.ABC):
    """Base of the sources of documents."""

    @abc.abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """The pieces in a fixed order; reading them one after another gives every document.

        Raises:
            UserError: there is nothing to read.
        """

    @abc.abstractmethod
    def read(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """The documents of one part, in a fixed order.

        Raises:
            UserError: something in the part cannot be read, and the source says to stop there.
        """

    def documents(self) -> Iterator[Document]:
        """Every document of the source."""
        for part in self.parts():
            yield from self.read(part, lambda message: None)

    def fingerprint(self, hash_files: HashFiles | None = None) -> str:
        """12 hexadecimal digits that change when the settings or the text change.

        Here the parts stand for the text. A source of files says what these hold, and not what they
        are called (`TextFiles.fingerprint`). The code that reads it does not count.

        Args:
            hash_files: for sources of files; None reads them whole each time.

        Raises:
            UserError: there is nothing to read.
        """
        return digest(fingerprint(self), *map(str, self.parts()))


def digest(*texts: str) -> str:
    """12 hexadecimal digits for a sequence of texts."""
    hasher = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.hexdigest()[:12]


def is_held_out(document: Document, fraction: float) -> bool:
    """Returns whether a document is kept out of training when `fraction` of the documents shall be.

    Depends on the document's group alone, neither on the order nor on other documents: a text that
    is held out stays so when the corpus grows.
    """
    if not 0 < fraction < 1:
        return fraction >= 1
    key = (document.group or document.text).encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return number < fraction * 2**64


def in_split(document: Document, split: Split, held_out: float) -> bool:
    """Returns whether a document belongs to `split`, with the fraction `held_out` held out."""
    return split == "all" or is_held_out(document, held_out) == (split == "held_out")
