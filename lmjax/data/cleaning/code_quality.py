"""Rules for source code."""

from __future__ import annotations

from lmjax.config import UserError, config
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.code_files import (
    PERMISSIVE,
    is_generated,
    is_minified,
    licence_of,
    programming_language,
)
from lmjax.data.documents import Document


@config
class CodeQuality(Step):
    """Rules of Codex and PaLM for code: made by people, readable, with a licence that allows it.

    (Chen et al. 2021, arXiv:2107.03374, section 3.1; Chowdhery et al. 2022, arXiv:2204.02311,
    appendix: permissive licences.) What `CodeFiles` has found stands in the metadata; of other
    documents the text itself is asked.
    """

    languages: tuple[str, ...] = ()  # programming languages that stay; empty: all
    licences: tuple[str, ...] = PERMISSIVE  # by SPDX's names; empty: all
    unknown_licence: bool = False  # keep files whose licence is not known
    generated: bool = False  # keep files that a program wrote
    minified: bool = False  # keep files with lines as only a program writes them
    least_letters: float = 0.25  # share of characters that are letters or digits
    most_size: int = 1_000_000  # characters of a file

    def validate(self) -> None:
        """Raises UserError for settings that contradict each other."""
        if self.unknown_licence and not self.licences:
            raise UserError("unknown_licence: all licences stay already, as licences is empty")

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`."""
        about, text = document.metadata or {}, document.text
        name = str(about.get("file") or document.identity)
        language = about.get("programming_language") or programming_language(name, text)
        if self.languages and language not in self.languages:
            return Dropped("another programming language", language)
        if len(text) > self.most_size:
            return Dropped("a long file of code", len(text))
        if not self.generated and about.get("generated", is_generated(text)):
            return Dropped("code that a program wrote")
        if not self.minified and about.get("minified", is_minified(name, text)):
            return Dropped("code without lines")
        letters = sum(map(str.isalnum, text)) / max(len(text), 1)
        if letters < self.least_letters:
            return Dropped("too few letters in code", letters)
        if self.licences:
            licence = about["licence"] if "licence" in about else licence_of(text)
            if not licence and not self.unknown_licence:
                return Dropped("the licence is not known")
            if licence and licence not in self.licences:
                return Dropped("another licence", licence)
        return document
