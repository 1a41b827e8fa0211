"""The frame of a tokenizer.json, the file of the Hugging Face `tokenizers` library.

It is written here without that library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Entry = dict[str, Any]  # one object of a tokenizer.json, with its `type`


class Unwritable(Exception):
    """Raised where a file cannot hold a token, or cannot give the same ids."""


class Around(NamedTuple):
    """Names of the special tokens that are put before and behind a text."""

    before: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()


def library_tokenizer(
    model: Entry,
    special: Mapping[str, int],
    around: Around,
    decoder: Entry,
    normalizers: Sequence[Entry] = (),
    pre_tokenizers: Sequence[Entry] = (),
) -> Entry:
    """A tokenizer.json.

    Args:
      model: see `byte_pair_model`; Unigram's alike.
      special: ids of tokens that stand for no text.
      around: what is put around a text.
      decoder: pieces to text.
      normalizers: what is done to a text before, in this order.
      pre_tokenizers: how a text is cut then.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for name, token in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": _sequence("normalizers", normalizers),
        "pre_tokenizer": _sequence("pretokenizers", pre_tokenizers),
        "post_processor": post_processor(around, special),
        "decoder": decoder,
        "model": model,
    }


def _sequence(key: str, entries: Sequence[Entry]) -> Entry | None:
    if len(entries) > 1:
        return {"type": "Sequence", key: list(entries)}
    return entries[0] if entries else None


def post_processor(around: Around, special: Mapping[str, int]) -> Entry | None:
    """Post-processor that puts tokens around a text, and around the second of a pair, or None."""
    if around == Around():
        return None
    before, behind = (
        [{"SpecialToken": {"id": name, "type_id": 0}} for name in names] for names in around
    )
    first, second = (
        [*before, {"Sequence": {"id": which, "type_id": 0}}, *behind] for which in "AB"
    )
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, *second],
        "special_tokens": {
            name: {"id": name, "ids": [special[name]], "tokens": [name]}
            for name in sorted({*around.before, *around.behind})
        },
    }


def byte_pair_model(
    vocabulary: Mapping[str, int],
    merges: Iterable[tuple[str, str]] = (),
    unknown: str | None = None,
    byte_fallback: bool = False,
    whole_first: bool = False,
) -> Entry:
    """Byte-pair encoding.

    Args:
      vocabulary: ids of pieces.
      merges: pairs of pieces that become one, the first first.
      unknown: the piece for a character that is in no vocabulary, and others beside it.
      byte_fallback: whether such a character becomes the pieces <0x00> to <0xFF> instead.
      whole_first: whether what the text was cut into is looked up before it is put together.
    """
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unknown is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": whole_first,
        "vocab": dict(vocabulary),
        "merges": [list(pair) for pair in merges],
    }


def merges_of(
    ranked: Iterable[Any], ids: Mapping[Any, int], is_part: Callable[[Any], bool] = lambda _: True
) -> list[tuple[Any, Any]]:
    """The pairs that make a piece: where only the pieces are known, any two of them may.

    Args:
      ranked: pieces, as strings or bytes, the one that is made first first.
      ids: all pieces.
      is_part: whether a piece may be joined to another one.
    """
    return [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in ids
        and piece[cut:] in ids
        and is_part(piece[:cut])
        and is_part(piece[cut:])
    ]


def isolate(pattern: str) -> Entry:
    """A pre-tokenizer for which what a regular expression of Oniguruma finds stands apart."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def check_new(names: Iterable[str], pieces: Iterable[str]) -> None:
    """Raises NoPlace where a vocabulary of these pieces has one of the new names."""
    pieces = set(pieces)
    for name in names:
        if name in pieces:
            raise Unwritable(f"{name!r} is a piece of text too, and no file keeps two of a name")


def as_json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode("utf-8")
