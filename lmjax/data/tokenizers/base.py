"""Tokenizers: text to token ids and exactly back, and the settings that make them."""

import abc
import hashlib
import json
import os
import pathlib
import re
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Integer

from lmjax.config import UserError, config
from lmjax.config.declare import module_of
from lmjax.files import local_path, replacing
from lmjax.remote import local_copy

SEPARATOR = "<|endoftext|>"  # the token between documents, where there is one for begin and end
SETTINGS_FILE = "tokenizer.json"


class Ends(NamedTuple):
    """Tokens around a text.

    Attributes:
      opening: ids that are put before every text.
      closing: ids that are put behind a document.
      end: the id that ends a document.
    """

    opening: tuple[int, ...]
    closing: tuple[int, ...]
    end: int

    @property
    def begin(self) -> int | None:
        return self.opening[0] if self.opening else None


class TextPiece(NamedTuple):
    """A part of what is encoded: a text, or the name of a special token."""

    text: str
    special: bool


def name_pattern(names: Collection[str]) -> str:
    """A regular expression for any of some names, the longest that fits; none: for nothing."""
    if not names:
        return "(?!)"
    longest_first = sorted(names, key=len, reverse=True)
    first = "".join(sorted({re.escape(name[0]) for name in names}))  # tried before all of them
    return f"(?=[{first}])(?:{'|'.join(map(re.escape, longest_first))})"


def cut_at_names(text: str, names: Collection[str]) -> list[TextPiece]:
    """A text cut at the names of special tokens; of several that fit, the longest counts."""
    parts = re.split(f"({name_pattern(names)})", text)
    return [TextPiece(part, bool(n % 2)) for n, part in enumerate(parts) if part]


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    Attributes:
      kind: names the class in a saved folder; each class that is saved has one of its own.
      vocab_size: number of token ids.
      begin: id that is put before every text (prompt, document, scored text), or None where the
        model was trained without one.
      end: id that closes a document; equal to `begin` where one separator does for both.
      special: ids by name of the tokens that stand for no text, such as separators and roles;
        `encode` never makes them from their names in a text; the one for the unknown it may.
      unknown: id that stands for what the tokenizer does not know, or None where it knows all text.
      threads: how many threads `encode_batch` may use; -1 is one a core.
    """

    kind: ClassVar[str]
    vocab_size: int
    begin: int | None
    end: int
    special: Mapping[str, int]
    unknown: int | None = None
    threads: int = -1

    kinds: ClassVar[dict[str, type["Tokenizer"]]] = {}  # what a saved folder is read with

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "kind" in vars(cls):
            known = Tokenizer.kinds.get(cls.kind, cls)
            if not _same(known, cls):
                raise TypeError(f"{cls.__name__}: the kind {cls.kind!r} is {known.__name__}'s")
            Tokenizer.kinds[cls.kind] = cls

    @property
    def opening(self) -> tuple[int, ...]:
        """All ids that are put before a text: `begin` is the first, and seldom more."""
        return () if self.begin is None else (self.begin,)

    @property
    def closing(self) -> tuple[int, ...]:
        """All ids that are put behind a document; none where one separator does for both ends."""
        return () if self.begin == self.end else (self.end,)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without `opening` and `closing`."""
        return self.encode_batch([text])[0]

    def encode_special(self, text: str) -> list[int]:
        """`encode`, but names of special tokens become these tokens. Not for text of users."""
        return self.encode_pieces(cut_at_names(text, self.special))

    def encode_pieces(self, pieces: Sequence[TextPiece]) -> list[int]:
        """The ids of texts and special tokens in turn; what stands in a text stays text."""
        ids = [[self.special[p.text]] if p.special else self.encode(p.text) for p in pieces]
        return [token for part in ids for token in part]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; uses every core where the tokenizer can."""

    def encode_arrays(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "tokens"]]:
        """`encode_batch` as arrays, which some tokenizers make faster than lists."""
        return [np.asarray(ids, np.int64) for ids in self.encode_batch(texts)]

    @abc.abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for, perhaps a part of a character; b"" for a special
        token."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits of all that decides about the ids."""
        hasher = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode())
        for name, data in sorted(self.files().items()):
            hasher.update(name.encode() + hashlib.sha256(data).digest())
        return hasher.hexdigest()[:12]

    def settings(self) -> dict[str, Any]:
        """Settings for `from_saved` besides the files, as JSON."""
        return {"kind": self.kind}

    def files(self) -> dict[str, bytes]:
        """Names and contents of the files that belong to the tokenizer."""
        return {}

    @classmethod
    @abc.abstractmethod
    def from_saved(cls, settings: dict[str, Any], folder: pathlib.Path) -> "Tokenizer":
        """The tokenizer that was saved with these settings in this folder."""

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the tokenizer into a folder, from which `load_tokenizer` reads it.

        The settings come last and by renaming: a folder with settings is complete.

        Raises:
            UserError: the class has no kind of its own, and would be read as another one.
            OSError: the folder cannot be written.
        """
        if not _same(known := Tokenizer.kinds[self.kind], type(self)):
            raise UserError(
                f"the tokenizer {type(self).__name__} cannot be saved: its kind={self.kind!r} is "
                f"{known.__name__}'s; give it one of its own"
            )
        folder = local_path(folder, "folder")
        settings = self.settings() | {
            "vocab_size": self.vocab_size,
            "begin": self.begin,
            "end": self.end,
            "fingerprint": self.fingerprint,
        }
        text = json.dumps(settings, indent=1, ensure_ascii=False)
        folder.mkdir(parents=True, exist_ok=True)
        files = self.files() | {SETTINGS_FILE: text.encode("utf-8")}  # which is the last
        for name, data in files.items():
            with replacing(folder / name) as unfinished:
                unfinished.write_bytes(data)


def _same(a: type, b: type) -> bool:
    """Returns whether both are one class, declared again by a notebook's cell or a file."""
    return (module_of(a), a.__qualname__) == (module_of(b), b.__qualname__)


class Corpus(abc.ABC):
    """The text that a tokenizer may learn from."""

    @abc.abstractmethod
    def sample(self, size: int) -> Iterator[str]:
        """Texts of the training split, from all over the corpus, until `size` UTF-8 bytes."""

    @abc.abstractmethod
    def everything(self) -> Iterator[str]:
        """Every text, held-out ones too."""


@config
class TokenizerConfig(abc.ABC):
    """Base of the configs that make tokenizers."""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "origin" not in vars(cls):  # what is made in another way has another origin
            cls.origin = TokenizerConfig.origin

    @abc.abstractmethod
    def build(self, corpus: Corpus) -> Tokenizer:
        """Makes the tokenizer.

        Raises:
            UserError: the settings and the text do not allow it.
        """

    def origin(self) -> str | None:
        """A fingerprint of what the tokenizer is made from, or None if the corpus matters."""
        return None


@config
class Bytes(TokenizerConfig):
    """A token a byte of UTF-8, and a separator: 257 in all."""

    def build(self, corpus: Corpus) -> Tokenizer:
        return ByteTokenizer()

    def origin(self) -> str | None:
        return "bytes"


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes, 256 separates documents."""

    kind = "bytes"
    vocab_size = 257
    begin = end = 256
    special: Mapping[str, int] = types.MappingProxyType({SEPARATOR: 256})

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if 0 <= token < 256 else b""

    @classmethod
    def from_saved(cls, settings: dict[str, Any], folder: pathlib.Path) -> "ByteTokenizer":
        return cls()


@config
class Characters(TokenizerConfig):
    """A token a character of the corpus (held-out text included), and a separator."""

    def build(self, corpus: Corpus) -> Tokenizer:
        found: set[str] = set()
        for text in corpus.everything():
            found.update(text)
        return CharacterTokenizer("".join(sorted(found)))


class CharacterTokenizer(Tokenizer):
    """Ids are places in a sorted list of characters; the last id separates documents."""

    kind = "characters"

    def __init__(self, characters: str):
        self._characters = characters
        self._ids = {character: number for number, character in enumerate(characters)}
        self.vocab_size = len(characters) + 1
        self.begin = self.end = len(characters)
        self.special = {SEPARATOR: self.end}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Raises UserError for a character that the corpus did not have."""
        try:
            return [[self._ids[character] for character in text] for text in texts]
        except KeyError as error:
            raise UserError(
                f"the character {error.args[0]!r} is not one of the {len(self._characters)} "
                "that this character-level tokenizer was made from"
            ) from None

    def token_bytes(self, token: int) -> bytes:
        return self._characters[token : token + 1].encode("utf-8") if token >= 0 else b""

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self._characters}

    @classmethod
    def from_saved(cls, settings: dict[str, Any], folder: pathlib.Path) -> "CharacterTokenizer":
        return cls(settings["characters"])


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Reads a tokenizer that `Tokenizer.save` wrote.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = local_copy(folder, "folder")
    path = folder / SETTINGS_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no tokenizer in {folder} ({path.name} is missing)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer in {path} cannot be read: {error}") from None
    kind, kinds = settings.get("kind") if isinstance(settings, dict) else None, Tokenizer.kinds
    if kind not in kinds:
        raise UserError(
            f"{path} names the kind {kind!r}; known are {', '.join(kinds)}, and those of "
            "classes of your own whose modules are imported"
        )
    try:
        tokenizer = kinds[kind].from_saved(settings, folder)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"the tokenizer in {folder} is damaged: {error}") from None
    if tokenizer.fingerprint != settings.get("fingerprint"):
        raise UserError(f"the tokenizer in {folder} was changed after it was saved")
    return tokenizer


def token_type(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
