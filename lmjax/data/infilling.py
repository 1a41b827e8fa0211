"""Text for filling in the middle, and parallel text in both directions."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from lmjax.config import UserError, config
from lmjax.data.documents import Document, HashFiles, OnSkip, Part, Source, digest
from lmjax.data.sources import JsonRecords
from lmjax.data.spans import SpanKind
from lmjax.data.tokenizers import Tokenizer

VERSION = "1"  # to be raised when the same texts are cut in another way


@config
class FillInTheMiddle(Source):
    """Texts of which some are cut into three, and their middle comes last.

    (Bavarian et al. 2022, arXiv:2207.14255.) A model that learns from left to right so learns to
    fill in, at no cost for the rest. A text is cut at two random characters; prefix, suffix and
    middle follow special tokens of their own: prefix first (PSM), or suffix first and the prefix
    together with the middle (SPM). Which texts, and where, is a function of the text alone.

    The tokenizer has to have the tokens: `WithTokens(tokens=("<|fim_prefix|>", ...))`. Held-out
    text is cut too; give `Domain.evaluation` the source itself for its usual loss.
    """

    source: Source  # the texts, such as code
    share: float = 0.5  # of the texts that are cut
    suffix_first: float = 0.5  # share of these in which the suffix comes first
    prefix: str = "<|fim_prefix|>"  # special token before the prefix
    middle: str = "<|fim_middle|>"  # special token before the middle
    suffix: str = "<|fim_suffix|>"  # special token before the suffix

    def validate(self) -> None:
        """Raises UserError for shares that are none, or tokens that are alike."""
        for name in ("share", "suffix_first"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}: must be from 0 to 1")
        if len({self.prefix, self.middle, self.suffix, ""}) < 4:
            raise UserError("prefix, middle, suffix: give three different names of special tokens")

    def parts(self) -> tuple[Part, ...]:
        """See `Source.parts`: those of the texts."""
        return self.source.parts()

    def fingerprint(self, hash_files: HashFiles | None = None) -> str:
        """See `Source.fingerprint`."""
        names = self.prefix, self.middle, self.suffix
        settings = f"{self.share} {self.suffix_first} {names}"
        texts = self.source.fingerprint(hash_files)
        return digest("FillInTheMiddle", VERSION, settings, texts)

    def read(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `Source.read`; documents that have their own encoding or spans stay as they are."""
        for document in self.source.read(part, on_skip):
            if document.encode is not None or document.spans:
                yield document
                continue
            text = document.text
            seed = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            rng = np.random.default_rng(int.from_bytes(seed, "little"))
            if len(text) < 2 or rng.random() >= self.share:
                yield document
                continue
            first_is_suffix = bool(rng.random() < self.suffix_first)
            cuts = sorted(rng.integers(0, len(text) + 1, 2).tolist())
            encode = functools.partial(
                encode_middle,
                pieces=(text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]),
                names=(self.prefix, self.middle, self.suffix),
                suffix_first=first_is_suffix,
            )
            yield document._replace(encode=encode)


def encode_middle(
    tokenizer: Tokenizer,
    pieces: tuple[str, str, str],
    names: tuple[str, str, str],
    suffix_first: bool,
) -> tuple[list[int], list[tuple[int, int, SpanKind]]]:
    """See `Document.encode`: a text in three, whose middle comes last.

    Args:
        tokenizer: of the text.
        pieces: prefix, middle, suffix.
        names: of their special tokens.
        suffix_first: whether the suffix comes before the prefix.

    Raises:
        UserError: the tokenizer lacks one of the tokens.
    """
    if missing := [name for name in names if name not in tokenizer.special]:
        raise UserError(
            f"the tokenizer has no special token {missing[0]!r}: "
            f"data.tokenizer='WithTokens(tokens={names})' adds them"
        )
    before, last, behind = (tokenizer.special[name] for name in names)
    prefix, middle, suffix = pieces
    tokens = list(tokenizer.opening)
    if suffix_first:
        tokens += [before, behind, *tokenizer.encode(suffix)]
        tokens += [last, *tokenizer.encode(prefix + middle)]
    else:
        tokens += [before, *tokenizer.encode(prefix), behind, *tokenizer.encode(suffix)]
        tokens += [last, *tokenizer.encode(middle)]
    return [*tokens, *tokenizer.closing], []


@config
class ParallelText(JsonRecords):
    """Lines with a text in two languages, each line a document, or two in both directions.

    Skywork (Wei et al. 2023, arXiv:2310.19341, section 2.1) has paragraphs of English and Chinese.
    Both directions stand on the same side of the held-out split.
    """

    first: str = "en"  # the field with one language
    second: str = "zh"  # the field with the other
    form: str = "{}\n{}"  # of a document: both texts take the places of {}
    both: bool = True  # each line in both directions

    def validate(self) -> None:
        """Raises UserError for fields that are alike, or a form without two texts."""
        super().validate()
        if self.first == self.second or self.form.count("{}") != 2:
            raise UserError(
                f"first={self.first!r}, second={self.second!r}, form={self.form!r}: give two "
                "different fields, and a form with {} twice"
            )

    def documents_of(self, record: dict[str, Any], identity: str) -> Iterator[Document]:
        """See `JsonRecords.documents_of`; lines without one of the texts are left out."""
        one, other = self._text(record, self.first), self._text(record, self.second)
        if not one.strip() or not other.strip():
            return
        group, about = f"{one}\n{other}", self.metadata_of(record)
        before, between, behind = self.form.split("{}")
        for number, (a, b) in enumerate(((one, other), (other, one))[: 1 + self.both]):
            text = f"{before}{a}{between}{b}{behind}"
            name = identity if number == 0 else f"{identity}, reversed"
            yield Document(text, name, group, metadata=about)
