"""Infill formats: how families of models mark what is missing in a text, as plain data.

What generation makes of them: `lmjax.generation.fill`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class InfillFormat:
    """Base of the formats."""


@dataclasses.dataclass(frozen=True)
class BlankFormat(InfillFormat):
    """Spans after the text, at the positions of their masks (GLM, Du et al. 2022).

    Attributes:
      masks: names of the tokens that stand for blanks.
      rest: of them, those that stand for the whole rest of a text that ends with them.
      run_on: of them, those whose contents have positions after the text, as in GLM-130B.
      sop: token that begins a blank's content.
      eop: token that ends it.
    """

    masks: tuple[str, ...] = ("[MASK]", "[sMASK]", "[gMASK]")
    rest: tuple[str, ...] = ("[gMASK]",)
    run_on: tuple[str, ...] = ()
    sop: str = "<|startofpiece|>"
    eop: str = "<|endofpiece|>"


@dataclasses.dataclass(frozen=True)
class SentinelFormat(InfillFormat):
    """Numbered sentinels in an encoder's text, which the decoder repeats (T5, Raffel et al. 2020).

    Attributes:
      sentinel: name of the tokens for blanks, from number 0 on.
      start: token that the decoder begins with.
      replies: whether the decoder replies to a text without sentinels, as after training on several
        tasks, each a text and what is to be written (section 2.4).
    """

    sentinel: str = "<extra_id_{}>"
    start: str = "<pad>"
    replies: bool = False


@dataclasses.dataclass(frozen=True)
class MaskFormat(InfillFormat):
    """Masks of one token each, predicted from all other tokens at once (BERT, Devlin et al. 2019).

    Attributes:
      mask: token that hides another.
      cls: token that begins a text; None: the tokenizer's begin, if it has one.
      sep: token that ends it; None: the tokenizer's end.
    """

    mask: str = "[MASK]"
    cls: str | None = "[CLS]"
    sep: str | None = "[SEP]"


def join_formats(formats: Iterable[InfillFormat | None]) -> InfillFormat | None:
    """The format of a model that learned several: of blanks with the names of all, or the first.

    None where there is none. Blanks come before the other formats.
    """
    found = [infill for infill in formats if infill is not None]
    blanks = [infill for infill in found if isinstance(infill, BlankFormat)]
    if not blanks:
        return found[0] if found else None
    names = {
        field: tuple(dict.fromkeys(name for infill in blanks for name in getattr(infill, field)))
        for field in ("masks", "rest", "run_on")
    }
    return dataclasses.replace(blanks[0], **names)
