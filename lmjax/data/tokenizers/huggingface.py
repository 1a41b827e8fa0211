"""Tokenizers of the Hugging Face `tokenizers` library."""

import functools
import itertools
import json
import pathlib
import re
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from lmjax.config import UserError
from lmjax.data.tokenizers.base import TextPiece, Tokenizer, name_pattern
from lmjax.data.tokenizers.folder_settings import library
from lmjax.data.tokenizers.library_decoders import spelling
from lmjax.data.tokenizers.word_borders import word_borders
from lmjax.data.tokenizers.word_cache import LARGEST, WordCache

HUGGING_FACE_FILE = "huggingface.json"  # tokenizer.json is the name of our own settings
GROUP = 256  # words that are encoded as one text
BYTE_NAMES = "<(?=0x[0-9A-F]{2}>)"  # where a text spells the name of a byte's token


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face `tokenizers` library.

    Byte-level ones give every text back exactly if they do not normalise it; those that write a
    space as U+2581 take that for one. The space that some put before a text is taken away again.
    No text makes a special token: its name is cut as other text is. Added tokens that are not
    special are found in texts, and written by the decoders like other tokens.
    """

    kind = "huggingface"

    def __init__(
        self,
        data: str | Any,
        begin: int | None,
        end: int,
        opening: Sequence[int] | None = None,
        closing: Sequence[int] | None = None,
    ):
        """`data` is the library's JSON or a tokenizer of it, which is then ours.

        Raises:
          UserError: it is damaged, or how it writes text is unknown.
        """
        self._data = data if isinstance(data, str) else None
        self._tokenizer = _parsed(data) if isinstance(data, str) else data
        self._tokenizer.encode_special_tokens = True  # their names in a text stay text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._spelling = spelling(self._tokenizer.decoder)
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._pieces = _pieces(self._tokenizer)
        self.vocab_size = len(self._pieces)
        self.begin, self.end = begin, end
        self._opening, self._closing = opening, closing
        self.special = {
            added.content: token for token, added in self._added.items() if added.special
        }
        self._hidden = frozenset(self.special.values())
        self._encoder = _without_names(self._tokenizer, self.special)
        self._alphabet = _alphabet(self._tokenizer, self._pieces)
        split = word_borders(self._encoder, filter(None, self._pieces))
        whole = split is None or self.vocab_size >= LARGEST
        self._separator = None if whole else _separator(self._encoder, self._pieces)
        self._words = None if whole else WordCache(split, self._encode_words)
        self._leading = max(self._spelling.leading, int(self._puts_space()))

    @property
    def opening(self) -> tuple[int, ...]:
        return super().opening if self._opening is None else tuple(self._opening)

    @property
    def closing(self) -> tuple[int, ...]:
        return super().closing if self._closing is None else tuple(self._closing)

    @functools.cached_property
    def unknown(self) -> int | None:
        """See `Tokenizer`. Unigram models know its id, the others its name."""
        model = json.loads(self._tokenizer.to_str())["model"]
        name = model.get("unk_token")
        return model.get("unk_id") if name is None else self._tokenizer.token_to_id(name)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`; UserError for characters that the library would drop."""
        self._check(texts)
        return self._encode(texts) if self._words is None else self._words.encode_batch(texts)

    def encode_arrays(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "tokens"]]:
        """See `Tokenizer.encode_arrays`."""
        if self._words is None:
            return super().encode_arrays(texts)
        self._check(texts)
        return self._words.encode_arrays(texts)

    def _check(self, texts: Sequence[str]) -> None:
        """Raises UserError for characters that the library would drop."""
        if self._alphabet is not None and (unknown := set().union(*texts) - self._alphabet):
            raise UserError(
                f"the character {min(unknown)!r} is not one of the {len(self._alphabet)} that this"
                " tokenizer has tokens for"
            )

    def encode_special(self, text: str) -> list[int]:
        """See `Tokenizer.encode_special`; tokens take the white space that their file says."""
        if self._marking is None:
            return super().encode_special(text)
        return self._marking.encode(text, add_special_tokens=False).ids

    def encode_pieces(self, pieces: Sequence[TextPiece]) -> list[int]:
        """See `Tokenizer.encode_pieces`; what stands behind a special token as `encode_special`.

        The name of one in a text is broken in two by the end token, which is taken out again.
        """
        if self._marking is None:
            return super().encode_pieces(pieces)
        if (tokens := self._as_one(pieces)) is not None:
            return tokens
        broken, stays = self._broken(pieces)
        if (tokens := self._as_one(broken)) is None:
            return super().encode_pieces(pieces)
        kept = iter(stays)
        return [token for token in tokens if not self._is_special(token) or next(kept)]

    def token_bytes(self, token: int) -> bytes:
        return self._table[token] if 0 <= token < self.vocab_size else b""

    def decode(self, tokens: Sequence[int]) -> str:
        text = super().decode(tokens)
        if bare := self._spelling.bare:
            shown = (token for token in tokens if 0 <= token < self.vocab_size)
            first = next((token for token in shown if token not in self._hidden), None)
            if first is not None and (self._pieces[first] or "").startswith(bare):
                text = bare + text
        for _ in range(self._leading):
            text = text.removeprefix(" ")
        return text.removesuffix(" ") if self._spelling.trailing else text

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            batch = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        except UnicodeEncodeError:
            raise  # half a character, which is no text
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"the tokenizer has no tokens for a text: {error}") from None
        return [encoding.ids for encoding in batch]

    def _encode_words(self, words: Sequence[str]) -> list[str]:
        """The tokens of words as characters, each word by itself; many are encoded as one text."""
        if self._separator is None or len(words) <= GROUP:
            return ["".join(map(chr, tokens)) for tokens in self._encode(words)]
        name, token = self._separator
        groups = [name.join(words[n : n + GROUP]) for n in range(0, len(words), GROUP)]
        encoded = ("".join(map(chr, tokens)) for tokens in self._encode(groups))
        return list(itertools.chain.from_iterable(group.split(chr(token)) for group in encoded))

    def _puts_space(self) -> bool:
        """Returns whether a text is encoded with a space before it."""
        try:
            start = self._encode(["a"])[0] if self._alphabet is None else ()
        except UserError:
            return False
        return bool(start) and self._bytes(start[0])[:1] == b" "

    def _as_one(self, pieces: Sequence[TextPiece]) -> list[int] | None:
        """The ids of the pieces in one text; None where it has other special tokens than these."""
        tokens = self.encode_special("".join(piece.text for piece in pieces))
        wanted = [self.special[piece.text] for piece in pieces if piece.special]
        found, wanted = (list(filter(self._is_special, ids)) for ids in (tokens, wanted))
        return tokens if found == wanted else None

    def _is_special(self, token: int) -> bool:
        return token in self._hidden and token != self.unknown

    def _broken(self, pieces: Sequence[TextPiece]) -> tuple[list[TextPiece], list[bool]]:
        """Pieces with the end token inside of names in texts; and which special tokens stay."""
        end = next(
            TextPiece(name, True) for name, token in self.special.items() if token == self.end
        )
        starts = re.compile(f"(?={name_pattern(self.special)})")
        broken, stays = [], []
        for piece in pieces:
            if piece.special:
                broken.append(piece)
                stays += [True] if self._is_special(self.special[piece.text]) else []
                continue
            breaks = [match.start() + 1 for match in starts.finditer(piece.text)]
            for first, last in itertools.pairwise([0, *breaks, len(piece.text)]):
                broken += [TextPiece(piece.text[first:last], False), end]
            broken.pop()
            stays += [False] * len(breaks)
        return broken, stays

    @functools.cached_property
    def _marking(self) -> Any | None:
        """The library's own, which finds special tokens; None where that is only their names."""
        first = b'"prepend_scheme":"first"' in _state_of(self._tokenizer.pre_tokenizer)
        special = [added for added in self._added.values() if added.special]
        if not first and not any(a.lstrip or a.rstrip or a.single_word for a in special):
            return None
        marking = _parsed(self._tokenizer.to_str())
        marking.encode_special_tokens = False
        return marking

    @functools.cached_property
    def _table(self) -> list[bytes]:
        return [self._bytes(token) for token in range(self.vocab_size)]

    def _bytes(self, token: int) -> bytes:
        piece, added = self._pieces[token], self._added.get(token)
        if piece is None or (added is not None and added.special):
            return b""
        if added is not None and self._spelling.by_byte:  # these are in no bytes' characters
            return piece.encode("utf-8")
        return self._spelling(piece)

    def settings(self) -> dict[str, Any]:
        settings = {"kind": self.kind, "begin": self.begin, "end": self.end}
        if self.opening != super().opening:
            settings["opening"] = list(self.opening)
        if self.closing != super().closing:
            settings["closing"] = list(self.closing)
        return settings

    def files(self) -> dict[str, bytes]:
        if self._data is None:
            self._data = _without(self._separator, self._tokenizer.to_str())
        return {HUGGING_FACE_FILE: self._data.encode("utf-8")}

    @classmethod
    def from_saved(cls, settings: dict[str, Any], folder: pathlib.Path) -> "HuggingFaceTokenizer":
        data = (folder / HUGGING_FACE_FILE).read_text("utf-8")
        frame = settings.get("opening"), settings.get("closing")
        return cls(data, settings["begin"], settings["end"], *frame)


def _parsed(data: str) -> Any:
    tokenizers = library("tokenizers")
    try:
        return tokenizers.Tokenizer.from_str(data)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"the tokenizers library cannot read this tokenizer: {error}") from None


def _state_of(part: Any | None) -> bytes:
    """The library's JSON of a normalizer, pre-tokenizer, ...; without white space."""
    return b"null" if part is None else part.__getstate__()


def _without_names(tokenizer: Any, special: dict[str, int]) -> Any:
    """A tokenizer that makes no special token of a text, and all others as the library does.

    The library leaves special names in a text to the model, which may know them as pieces: a
    Unigram model prefers them to anything else. There they get names that nobody can write.
    """
    pieces = {name for name in special if _is_piece(tokenizer.model, name, special[name])}
    unigram = type(tokenizer.model).__name__ == "Unigram"
    spelt = unigram and _takes_names_for_bytes(tokenizer)
    if not pieces and not spelt:
        return tokenizer
    data = json.loads(tokenizer.to_str())
    model, secret = data["model"], secrets.token_hex(16)
    new = {name: f"{secret}{token}" for name, token in special.items()}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new.get(piece, piece): token for piece, token in model["vocab"].items()}
    else:
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in model["vocab"]]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ())]
    if pairs:
        model["merges"] = [pair for pair in pairs if new.keys().isdisjoint((*pair, "".join(pair)))]
    if model.get("unk_token") in new:
        model["unk_token"] = new[model["unk_token"]]
    for added in data["added_tokens"]:
        added["content"] = new.get(added["content"], added["content"])
    data["post_processor"] = None
    encoder = _parsed(json.dumps(data))
    encoder.encode_special_tokens = True
    if spelt:
        tokenizers = library("tokenizers")
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(BYTE_NAMES), "isolated")
        before = [encoder.pre_tokenizer] if encoder.pre_tokenizer is not None else []
        encoder.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*before, split])
    return encoder


def _separator(tokenizer: Any, pieces: Sequence[str | None]) -> tuple[str, int] | None:
    """A token that is added to a tokenizer and its name, which nobody can write.

    What stands on its sides is encoded as if it were alone. Most of what encoding a short text
    costs is then paid once for many. None where a text alone is encoded otherwise.
    """
    if b'"prepend_scheme":"first"' in _state_of(tokenizer.pre_tokenizer):
        return None
    name = secrets.token_hex(16)
    tokenizer.add_tokens([library("tokenizers").AddedToken(name, normalized=False)])
    token = tokenizer.token_to_id(name)
    unused = token >= len(pieces) or pieces[token] is None
    return (name, token) if unused and token < LARGEST else None


def _without(separator: tuple[str, int] | None, data: str) -> str:
    """The library's JSON without the separator, which is the last token that was added."""
    if separator is None:
        return data
    name, token = separator
    return re.sub(f',?\\{{"id":{token},"content":"{name}"[^}}]*\\}}', "", data)


def _takes_names_for_bytes(tokenizer: Any) -> bool:
    """Returns whether a text that spells the name of a byte's token becomes that token."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    ids = map(tokenizer.token_to_id, names)
    try:
        encodings = tokenizer.encode_batch(names, add_special_tokens=False)
    except Exception:  # there is no token for the unknown
        return False
    return any(
        found == token and end - start > 1  # it stands for more than one of the name's characters
        for token, encoding in zip(ids, encodings)
        for found, (start, end) in zip(encoding.ids, encoding.offsets)
    )


def _is_piece(model: Any, name: str, token: int) -> bool:
    """Returns whether a model makes this token of its name.

    What it does with a part of a text, it does with the part alone.
    """
    try:
        return any(made.id == token for made in model.tokenize(name))
    except Exception:  # there is no token for the unknown
        return False


def _alphabet(tokenizer: Any, pieces: Sequence[str | None]) -> set[str] | None:
    """The characters that a text may have; None where the others have tokens too, or where the
    text is changed before. The file of a character-level tokenizer of ours has such an alphabet."""
    model = tokenizer.model
    spelt = getattr(model, "unk_token", None) is not None or getattr(model, "byte_fallback", False)
    changed = tokenizer.normalizer is not None or tokenizer.pre_tokenizer is not None
    if type(model).__name__ != "BPE" or spelt or changed:
        return None
    return {piece for piece in pieces if piece is not None and len(piece) == 1}


def _pieces(tokenizer: Any) -> list[str | None]:
    """The library's names of all ids; None for ids that nothing has."""
    pieces = list(map(tokenizer.id_to_token, range(tokenizer.get_vocab_size())))
    if None not in pieces:
        return pieces
    ids = tokenizer.get_vocab()  # slower
    pieces = [None] * (1 + max(ids.values()))
    for piece, token in ids.items():
        pieces[token] = piece
    return pieces
