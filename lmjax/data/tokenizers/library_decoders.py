"""Decoders of tokenizers files, token by token."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from lmjax.config import UserError
from lmjax.data.tokenizers.folder_settings import library

Step = Callable[[str], str | bytes]  # bytes are final
# What BERT's decoder takes back of the spaces that it put before tokens.
CLEANED = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")),
    *((" 'm", "'m"), (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)


def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones for themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


BYTES = _byte_characters()


class Spelling(NamedTuple):
    """Text of each token.

    Attributes:
      steps: the decoders, each on one token.
      leading: spaces that are taken from the beginning of a text, if it has them.
      trailing: whether a space is taken from its end.
      by_byte: whether tokens are in GPT-2's characters for bytes.
      bare: what begins a token that goes on a word, but belongs to the first token of a text.
    """

    steps: tuple[Step, ...]
    leading: int = 0
    trailing: bool = False
    by_byte: bool = False
    bare: str = ""

    def __call__(self, token: str) -> bytes:
        """The bytes of a token that is not the first of a text."""
        written: str | bytes = token
        for step in self.steps:
            written = step(written)
            if isinstance(written, bytes):
                return written
        return written.encode("utf-8")


def spelling(decoder: Any | None) -> Spelling:
    """Reads a decoder of the tokenizers library; None joins tokens by spaces, as the library does.

    Raises:
      UserError: one whose text does not come token by token.
    """
    state = {"type": "none"} if decoder is None else json.loads(decoder.__getstate__())
    found, fused = Spelling(()), False
    for part in state["decoders"] if state["type"] == "Sequence" else [state]:
        if part["type"] == "Fuse":
            fused = True
        elif part["type"] not in KINDS:
            raise UserError(
                f"a tokenizer with decoder {part['type']} is not supported; known are"
                f" {', '.join(sorted({*KINDS, 'Fuse'} - {'none'}))}"
            )
        else:
            found = KINDS[part["type"]](found, part, fused)
    return found


def _then(found: Spelling, step: Step, **changes: Any) -> Spelling:
    return found._replace(steps=(*found.steps, step), **changes)


def _by_byte(found: Spelling, part: dict[str, Any], fused: bool) -> Spelling:
    def step(token: str) -> str | bytes:
        known = BYTES.keys() >= set(token)
        return bytes(BYTES[character] for character in token) if known else token

    return _then(found, step, by_byte=True)


def _byte_fallback(found: Spelling, part: dict[str, Any], fused: bool) -> Spelling:
    names = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
    return _then(found, lambda token: names.get(token, token))


def _word_piece(found: Spelling, part: dict[str, Any], fused: bool) -> Spelling:
    def step(token: str) -> str:
        inside = token.removeprefix(part["prefix"])
        return inside if inside != token else f" {token}"

    def clean(token: str) -> str:
        for spaced, cleaned in CLEANED:
            token = token.replace(spaced, cleaned)
        return token

    found = _then(found, step, leading=1, bare=part["prefix"])
    return _then(found, clean) if part["cleanup"] else found


def _metaspace(found: Spelling, part: dict[str, Any], fused: bool) -> Spelling:
    leading = found.leading if part["prepend_scheme"] == "never" else 1
    return _then(found, lambda token: token.replace(part["replacement"], " "), leading=leading)


def _replace(found: Spelling, part: dict[str, Any], fused: bool) -> Spelling:
    pattern, content = part["pattern"], part["content"]
    if "String" in pattern and (not fused or len(pattern["String"]) == 1):
        return _then(found, lambda token: token.replace(pattern["String"], content))
    if fused:
        raise UserError(f"a tokenizer whose decoder replaces {pattern} in whole texts: not known")
    decoders = library("tokenizers").decoders
    one = decoders.Replace(library("tokenizers").Regex(pattern["Regex"]), content)
    return _then(found, lambda token: one.decode([token]))


def _strip(found: Spelling, part: dict[str, Any], fused: bool) -> Spelling:
    content, start, stop = part["content"], part["start"], part["stop"]
    if fused and (content != " " or stop):
        raise UserError(f"a tokenizer whose decoder strips {content!r} from texts: not known")
    if fused:
        return found._replace(leading=start)

    def step(token: str) -> str:
        left = len(token) - len(token.lstrip(content))
        token = token[min(start, left) :]
        right = len(token) - len(token.rstrip(content))
        return token[: len(token) - min(stop, right)]

    return _then(found, step)


def _words(found: Spelling, part: dict[str, Any], fused: bool) -> Spelling:
    return _then(found, lambda token: token.replace(part["suffix"], " "), trailing=True)


def _spaced(found: Spelling, part: dict[str, Any], fused: bool) -> Spelling:
    return _then(found, lambda token: f" {token}", leading=1)


KINDS = {
    "ByteLevel": _by_byte,
    "ByteFallback": _byte_fallback,
    "WordPiece": _word_piece,
    "Metaspace": _metaspace,
    "Replace": _replace,
    "Strip": _strip,
    "BPEDecoder": _words,
    "none": _spaced,
}
