"""Tokenizers of the Hugging Face library: its own file, GPT-2's vocabulary, BERT's."""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from lmjax.config import UserError
from lmjax.data.folder_settings import (
    GLM_ENDS,
    added_tokens,
    check_places,
    folder_settings,
    lacks,
    library,
    read_text,
    token_name,
)
from lmjax.data.subwords import SPACE
from lmjax.data.tokenizers import SEPARATOR, Tokenizer

HUGGING_FACE_FILE = "huggingface.json"  # tokenizer.json is the name of our own settings
# Begin and end of a document where the folder does not name them.
USUAL_ENDS = ((SEPARATOR, SEPARATOR), ("<s>", "</s>"), ("[CLS]", "[SEP]"), ("<bos>", "<eos>"))
SPECIAL_ROLES = ("bos", "eos", "cls", "sep", "unk", "pad", "mask")
# RoBERTa's classes know these names where the folder says none.
ROBERTA = ("RobertaTokenizer", "RobertaTokenizerFast", "GLMRobertaTokenizer")
ROBERTA_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face `tokenizers` library.

    Byte-level ones give every text back exactly if they do not normalise it; those that write a
    space as U+2581 take that for one. The space that some put before a text is taken away again.
    """

    kind = "huggingface"

    def __init__(self, data: str, begin: int | None, end: int):
        """`data` is the library's JSON.

        Raises:
          UserError: it is damaged, or how it writes bytes is unknown.
        """
        tokenizers = library("tokenizers")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"the tokenizers library cannot read this tokenizer: {error}") from None
        self._tokenizer.encode_special_tokens = True  # their names in a text stay text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._data = data
        self._decoders = _decoders(json.loads(data)["decoder"])
        self._alphabet = _alphabet(json.loads(data))
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())
        self.begin, self.end = begin, end
        self.special = {
            added.content: token for token, added in self._added.items() if added.special
        }
        self._forged = set(self.special.values()) - {self.unknown}
        start = self._ids(["a"])[0]
        self._prefix = bool(start) and self.token_bytes(start[0])[:1] == b" "

    @functools.cached_property
    def unknown(self) -> int | None:
        """See `Tokenizer`. Unigram models know its id, the others its name."""
        model = json.loads(self._tokenizer.to_str())["model"]
        name = model.get("unk_token")
        return model.get("unk_id") if name is None else self._tokenizer.token_to_id(name)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`; UserError for characters that the library would drop."""
        if self._alphabet is not None and (unknown := set().union(*texts) - self._alphabet):
            raise UserError(
                f"the character {min(unknown)!r} is not one of the {len(self._alphabet)} that this"
                " tokenizer has tokens for"
            )
        encoded = self._ids(texts)
        for number, tokens in enumerate(encoded):
            # Unigram models look up special tokens like any other; one character is never one.
            if not self._forged.isdisjoint(tokens):
                characters = self._ids(list(texts[number]))
                encoded[number] = [token for ids in characters for token in ids]
        return encoded

    def token_bytes(self, token: int) -> bytes:
        return self._table[token] if 0 <= token < self.vocab_size else b""

    def decode(self, tokens: Sequence[int]) -> str:
        text = super().decode(tokens)
        return text[1:] if self._prefix and text.startswith(" ") else text

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        batch = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    @functools.cached_property
    def _table(self) -> list[bytes]:
        return [self._bytes(token) for token in range(self.vocab_size)]

    def _bytes(self, token: int) -> bytes:
        piece = self._tokenizer.id_to_token(token)
        if piece is None or token in self.special.values():
            return b""
        if token in self._added:
            return piece.encode("utf-8")
        if "ByteLevel" in self._decoders and BYTES.keys() >= set(piece):
            return bytes(BYTES[character] for character in piece)
        if "WordPiece" in self._decoders:
            inside = piece.removeprefix("##")
            return (inside if inside != piece else f" {piece}").encode("utf-8")
        if "ByteFallback" in self._decoders and piece[:3] == "<0x" and piece[5:] == ">":
            return bytes([int(piece[3:5], 16)])
        if not self._decoders.isdisjoint({"Replace", "Metaspace"}):
            piece = piece.replace(SPACE, " ")
        return piece.encode("utf-8")

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "begin": self.begin, "end": self.end}

    def files(self) -> dict[str, bytes]:
        return {HUGGING_FACE_FILE: self._data.encode("utf-8")}

    @classmethod
    def from_saved(cls, settings: dict[str, Any], folder: pathlib.Path) -> "HuggingFaceTokenizer":
        data = (folder / HUGGING_FACE_FILE).read_text("utf-8")
        return cls(data, settings["begin"], settings["end"])


def read_library_file(path: pathlib.Path) -> Tokenizer:
    """A tokenizer.json, with what the folder says of special tokens."""
    return _from_library(path.parent, library("tokenizers").Tokenizer.from_str(read_text(path)))


def read_gpt2(path: pathlib.Path) -> Tokenizer:
    """GPT-2's byte-level byte-pair encoding, from vocab.json and merges.txt: also GLM's of 2B, 10B
    and, with RoBERTa's vocabulary, roberta-large."""
    tokenizers = library("tokenizers")
    vocabulary = json.loads(read_text(path))
    if not BYTES.keys() <= vocabulary.keys():
        raise UserError(
            f"{path} is not GPT-2's kind of vocabulary: not every byte has a token in it"
        )
    lines = read_text(path.with_name("merges.txt")).splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return _from_library(path.parent, tokenizer)


def read_bert(path: pathlib.Path) -> Tokenizer:
    """BERT's WordPiece, from vocab.txt: also the smaller GLM's.

    Spaces, and with an uncased vocabulary case and accents, are not given back.
    """
    tokenizers = library("tokenizers")
    lines = read_text(path).split("\n")  # and at nothing else: U+2028 may be a piece
    pieces = {piece: number for number, piece in enumerate(lines) if piece}
    unknown = "[UNK]"
    if unknown not in pieces:
        raise UserError(f"{path} is not BERT's kind of vocabulary: {unknown} is not in it")
    settings = folder_settings(path.parent)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token=unknown))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),  # none: where letters become lower-case
        lowercase=settings.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    names = ("[PAD]", unknown, "[CLS]", "[SEP]", "[MASK]")
    tokenizer.add_special_tokens([name for name in names if name in pieces])
    return _from_library(path.parent, tokenizer)


def _from_library(folder: pathlib.Path, tokenizer: Any) -> HuggingFaceTokenizer:
    """Adds what the folder's settings say about special tokens."""
    added = added_tokens(folder)
    new = {name: entry for name, entry in added.items() if tokenizer.token_to_id(name) is None}
    check_places(folder, tokenizer.get_vocab_size(), new)
    for name, entry in new.items():  # one by one, as each takes the next id
        (tokenizer.add_special_tokens if entry.special else tokenizer.add_tokens)([name])
    settings = folder_settings(folder)
    named = [token_name(settings.get(f"{role}_token")) for role in SPECIAL_ROLES]
    named += map(token_name, settings.get("additional_special_tokens") or ())
    if settings.get("tokenizer_class") in ROBERTA:
        named += ROBERTA_SPECIAL
    known = [name for name in named if name and tokenizer.token_to_id(name) is not None]
    begin, end = _ends(folder, settings, tokenizer)
    tokenizer.add_special_tokens([*known, *filter(None, (begin, end))])
    ids = [None if name is None else tokenizer.token_to_id(name) for name in (begin, end)]
    return HuggingFaceTokenizer(tokenizer.to_str(), *ids)


def _ends(folder: pathlib.Path, settings: dict, tokenizer: Any) -> tuple[str | None, str]:
    """Names of the tokens that begin and end a document."""
    if ends := GLM_ENDS.get(settings.get("tokenizer_class")):
        for name in ends:
            if tokenizer.token_to_id(name) is None:
                raise UserError(lacks(folder, name))
        return ends
    for first, last in (("bos_token", "eos_token"), ("cls_token", "sep_token")):
        if end := token_name(settings.get(last)):
            begin = token_name(settings.get(first))
            for name in filter(None, (begin, end)):
                if tokenizer.token_to_id(name) is None:
                    raise UserError(f"{folder}: its {last} or {first} {name!r} is no token")
            return begin, end
    for begin, end in USUAL_ENDS:
        if tokenizer.token_to_id(begin) is not None and tokenizer.token_to_id(end) is not None:
            return begin, end
    raise UserError(f"{folder}: which token ends a document is not said in tokenizer_config.json")


def _decoders(decoder: dict[str, Any] | None) -> set[str]:
    """The kinds of decoders in a tokenizer.json, those in a sequence too."""
    inner = (decoder or {}).get("decoders", [decoder or {"type": "none"}])
    kinds = {entry["type"] for entry in inner}
    known = {"ByteLevel", "WordPiece", "ByteFallback", "Metaspace"}
    if not kinds & known:
        raise UserError(
            f"a tokenizer with decoder {', '.join(sorted(kinds))} is not supported;"
            f" known are {', '.join(sorted(known))}"
        )
    return kinds


def _alphabet(data: dict[str, Any]) -> set[str] | None:
    """The characters that a text may have; None where the others have tokens too, or where the
    text is changed before. The file of a character-level tokenizer of ours has such an alphabet."""
    model = data["model"]
    spelt = model.get("unk_token") is not None or model.get("byte_fallback")
    if model.get("type") != "BPE" or spelt or data["normalizer"] or data["pre_tokenizer"]:
        return None
    return {piece for piece in model["vocab"] if len(piece) == 1}


def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones for themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


BYTES = _byte_characters()
