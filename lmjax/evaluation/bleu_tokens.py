"""Tokens of texts as sacrebleu cuts them, for BLEU.

Scores of different tokenizers cannot be compared: a published one says which it is of (Post 2018,
arXiv:1804.08771).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal

from lmjax.config import UserError
from lmjax.data.cleaning.units import split_words

BleuTokenizer = Literal["13a", "intl", "zh", "char", "none"]
ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
# The rules of mteval-v13a, of NIST, after which it is named. Each match takes both characters, so
# that of a run of marks not every one is looked at by every rule.
MARKS = "".join(sorted({*string.punctuation} - {*"',-."})) + " "
WESTERN = (
    (re.compile(f"([{re.escape(MARKS)}])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),  # dot and comma, but for those behind a digit
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),  # and in front of one
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
# Numbers, punctuation and symbols. A mark between two numbers stays with them.
UNICODE = (
    (re.compile("[^N]P"), "{} {} "),
    (re.compile("P[^N]"), " {} {}"),
    (re.compile("S"), " {} "),
)
# The characters that sacrebleu takes for Chinese. They are not those that it means: its ranges of
# the supplementary planes are read as U+2001 to U+2A6D, so that quotes and arrows stand alone, and
# the ideographs from U+20000 on are cut no more than letters are.
CHINESE = re.compile(
    "([\u2001-\u2a6d\u2e80-\u2fdf\u2ff0-\u303f\u3100-\u312f\u31a0-\u31bf\u31c0-\u31ef\u3200-\u33ff"
    "\u3400-\u4db5\u4e00-\u9fbb\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\ufe10-\ufe1f\ufe30-\ufe4f"
    "\uff00-\uffef])"
)


def bleu_tokens(text: str, tokenizer: BleuTokenizer) -> list[str]:
    """The tokens of a text.

    Args:
      text: without the blanks at its end.
      tokenizer: of sacrebleu. `13a`, its usual one, for languages with spaces; `intl` parts all
        Unicode punctuation and symbols (as Python's Unicode version has them); `zh` also each
        Chinese character; `char` all characters, for any language; `none` is for texts that are
        tokenized, between blanks.

    Raises:
      UserError: no such tokenizer. Those of Japanese (MeCab) and of SentencePiece are not here.
    """
    if tokenizer not in _CUT:
        raise UserError(f"tokenizer={tokenizer!r}: known are {', '.join(_CUT)}")
    return _CUT[tokenizer](text)


def _western(text: str) -> list[str]:
    for pattern, parted in WESTERN:
        text = pattern.sub(parted, text)
    return text.split()


def _v13a(text: str) -> list[str]:
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for name, letter in ENTITIES.items():
        text = text.replace(name, letter)
    return _western(f" {text} ")


def _zh(text: str) -> list[str]:
    return _western(CHINESE.sub(r" \1 ", text.strip()))


def _intl(text: str) -> list[str]:
    """The rules of mteval-v14 --international, found in the general categories of characters."""
    for pattern, parted in UNICODE:
        kinds = "".join(unicodedata.category(letter)[0] for letter in text)
        pieces, at = [], 0
        for match in pattern.finditer(kinds):
            pieces += [text[at : match.start()], parted.format(*text[match.start() : match.end()])]
            at = match.end()
        text = "".join([*pieces, text[at:]])
    return text.split()


_CUT: dict[str, Callable[[str], list[str]]] = {
    "13a": _v13a,
    "intl": _intl,
    "zh": _zh,
    "char": lambda text: list("".join(text.split())),
    "none": str.split,
}


def require_spaces(texts: Sequence[str], measure: str, remedy: str) -> None:
    """Sees that the words of texts stand between blanks.

    Args:
      texts: of people, not of a model, whose wrong language is to count as wrong.
      measure: that takes the words for what stands between blanks.
      remedy: of the message.

    Raises:
      UserError: most of the words of a text are of a script without spaces, where a sentence would
        be one word, and almost every score 0.
    """
    for number, text in enumerate(texts):
        if split_words(text).spaceless:
            raise UserError(
                f"{measure}: reference {number}, {text[:20]!r}..., is of a script without spaces,"
                f" of which a sentence would be one word: {remedy}"
            )
