"""Text of LaTeX sources, with its maths."""

from __future__ import annotations

import re

from lmjax.config import config
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.documents import Document
from lmjax.data.latex import without_comments

BODY = re.compile(r"\\begin\{document\}(.*?)(?:\\end\{document\}|\Z)", re.DOTALL)
SECTION = re.compile(r"\\(?:chapter|section)\*?\s*[\[{]")
# Up to the references, which LLaMA leaves out too.
REFERENCES = re.compile(
    r"\\begin\{thebibliography\}.*?(?:\\end\{thebibliography\}|\Z)"
    r"|\\(?:bibliography|bibliographystyle|printbibliography)\b\s*(?:\[[^\]]*\])?(?:\{[^{}]*\})?",
    re.DOTALL,
)
HIDDEN = re.compile(
    r"\\begin\{comment\}.*?\\end\{comment\}|\\iffalse\b.*?\\fi(?![A-Za-z])", re.DOTALL
)
# A name, and perhaps the number of its arguments, before a body in braces.
NEW = re.compile(
    r"\\(?:re|provide)?(?:new)?command\*?\s*(?:\{\s*\\([A-Za-z]+)\s*\}|\\([A-Za-z]+))"
    r"\s*(\[[^\]]*\])?\s*(?:\[[^\]]*\])?\s*(?=\{)"
)
DEF = re.compile(r"\\(?:g|e|x)?def\s*\\([A-Za-z]+)\s*(?=\{)")
OPERATOR = re.compile(r"\\DeclareMathOperator\*?\s*\{\s*\\([A-Za-z]+)\s*\}\s*(?=\{)")
LONGEST = 200  # characters of a body that is put in place of its name
DEEPEST = 10  # names within bodies
BLANK_LINES = re.compile(r"\n[ \t]*\n\s*\n")


@config
class LatexText(Step):
    """Takes comments, preamble and references out of a LaTeX source, and expands simple macros.

    As LLaMA does with arXiv (Touvron et al. 2023, arXiv:2302.13971, section 2.1, after Lewkowycz et
    al. 2022), but that the abstract stays: commands and maths are kept as they are. A macro without
    arguments is replaced by its body, so that all papers write the same sign in one way. A text
    that is no LaTeX stays.
    """

    abstract: bool = True  # keep what stands before the first section
    references: bool = False  # keep the list of references
    least: int = 1  # characters of what is left

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`."""
        if r"\begin{document}" not in document.text:
            return document
        source = HIDDEN.sub("", without_comments(document.text))
        if (body := BODY.search(source)) is None:
            return Dropped("the LaTeX document begins in a comment")
        macros, text = simple_macros(source), body[1]
        if not self.references:
            text = REFERENCES.sub("", text)
        if not self.abstract and (first := SECTION.search(text)):
            text = text[first.start() :]
        text = expanded(without_definitions(text), macros)
        text = BLANK_LINES.sub("\n\n", text.replace(r"\maketitle", "")).strip()
        if len(text) < self.least:
            return Dropped("no text in the LaTeX source", len(text))
        return document._replace(text=text)


def simple_macros(source: str) -> dict[str, str]:
    """Bodies of the macros without arguments, by name; the last definition counts."""
    found = {}
    for pattern, form in ((NEW, "{}"), (DEF, "{}"), (OPERATOR, r"\operatorname{{{}}}")):
        for match in pattern.finditer(source):
            body = _braced(source, match.end())
            name = match[1] or match[2]
            arguments = pattern is NEW and match[3] not in (None, "[0]")
            if body is None or arguments or "#" in body or len(body) > LONGEST:
                found.pop(name, None)
            else:
                found[name] = form.format(body)
    return found


def without_definitions(text: str) -> str:
    """A text without the definitions of macros that stand in it."""
    for pattern in (NEW, DEF, OPERATOR):
        while match := pattern.search(text):
            body = _braced(text, match.end())
            end = match.end() if body is None else match.end() + len(body) + 2
            text = text[: match.start()] + text[end:]
    return text


def expanded(text: str, macros: dict[str, str]) -> str:
    """A text with bodies in place of the names of macros, also of those within bodies."""
    if not macros:
        return text
    names = "|".join(sorted(map(re.escape, macros), key=len, reverse=True))
    pattern = re.compile(rf"\\({names})(?![A-Za-z])(\{{\}})?")
    for _ in range(DEEPEST):
        text, count = pattern.subn(lambda match: _body(macros[match[1]], match), text)
        if not count:
            break
    return text


def _body(body: str, match: re.Match[str]) -> str:
    """A body for its place: its last command must not run into a letter behind it."""
    behind = match.string[match.end() : match.end() + 1]
    return body + (" " if behind.isalpha() and re.search(r"\\[A-Za-z]+$", body) else "")


def _braced(text: str, start: int) -> str | None:
    """Text within the braces that begin at `start`; None where they do not end."""
    depth, at = 0, start
    while at < len(text):
        sign = text[at]
        if sign == "\\":
            at += 1  # an escaped brace
        elif sign == "{":
            depth += 1
        elif sign == "}":
            depth -= 1
            if not depth:
                return text[start + 1 : at]
        at += 1
    return None
