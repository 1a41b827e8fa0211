"""The text that every CPython carries: a corpus that needs no download."""

import ast
import functools
import os
import pathlib
import platform
import re
import sysconfig
from collections.abc import Iterator
from typing import Literal

from lmjax.config import UserError, config
from lmjax.data.documents import Document, HashFiles, OnSkip, Part, Source, digest

# Tests, programs, other people's packages, and tables that are hardly text. The help topics are
# documents of their own, and would otherwise stand in both domains.
LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
TOPIC = "help topic "
EXTRACTION = "1"  # to be raised when other text is taken from the same files
EMPTY_LINE = re.compile(r"\n\s*\n")
SENTENCES = re.compile(r"[A-Z].*[.?!]")  # from a capital letter to the end of a sentence
LEAST_WORDS = 5  # of a paragraph


@config
class EmbeddedCorpus(Source):
    """Text that comes with Python: its documentation, or its standard library's source."""

    # "documentation": the help topics, and a document for each module's docstrings.
    # "prose": a document for each paragraph of the documentation that is whole sentences.
    # "code": a document for each module's source.
    domain: Literal["documentation", "prose", "code"] = "documentation"

    def parts(self) -> tuple[Part, ...]:
        """See `Source.parts`."""
        modules = _modules()
        if not modules:
            raise UserError(
                f"this Python has no standard library source in {_root()}; "
                "give another corpus, for example data files of your own"
            )
        parts = [Part(name, size=size) for name, size in modules]
        if self.domain != "code":
            parts += [
                Part(TOPIC + name, size=len(text)) for name, text in sorted(_topics().items())
            ]
        return tuple(parts)

    def fingerprint(self, hash_files: HashFiles | None = None) -> str:
        return digest(EXTRACTION, self.domain, platform.python_version(), str(self.parts()))

    def read(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `Source.read`."""
        # All domains hold out the same modules: the code of a module contains its docstrings.
        if part.name.startswith(TOPIC):
            text = _topics()[part.name.removeprefix(TOPIC)]
        elif self.domain == "code":
            text = _source(part.name)
        else:
            text = _docstrings(part.name)
        if self.domain == "prose":
            for number, paragraph in enumerate(_paragraphs(text)):
                yield Document(paragraph, f"{part.name}, paragraph {number}", group=part.name)
        elif text and not text.isspace():
            yield Document(text, part.name, group=part.name)


@functools.cache
def _root() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_path("stdlib"))


@functools.cache
def _modules() -> tuple[tuple[str, int], ...]:
    """Name and size of every source file of the standard library that is part of the corpus."""
    found, root = [], str(_root())
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - LEFT_OUT
        below = folder[len(root) + 1 :].replace(os.sep, "/")
        for name in names:
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "__phello__")):
                # Without pathlib, which takes most of the time for some 2,000 files.
                size = os.stat(os.path.join(folder, name)).st_size
                found.append((f"{below}/{name}" if below else name, size))
    return tuple(sorted(found))


@functools.cache
def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return {}
    return topics


def _source(name: str) -> str:
    return (_root() / name).read_text(encoding="utf-8", errors="replace")


@functools.cache  # read twice, for the tokenizer and for the tokens, and parsing takes seconds
def docstrings(name: str) -> tuple[tuple[str, str], ...]:
    """Qualified name with signature, and docstring, of all that a module documents.

    Found without importing it.

    Args:
      name: of the module's file, as in `EmbeddedCorpus.parts`.
    """
    try:
        tree = ast.parse(_source(name))
    except (SyntaxError, ValueError):
        return ()
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return tuple(_sections(tree, module))


def _docstrings(name: str) -> str:
    """The docstrings of a module as a text."""
    sections = ["\n\n".join(section) for section in docstrings(name)]
    return "\n\n".join(sections) + "\n" if sections else ""


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs that are sentences, each on one line; no examples, tables or headings."""
    for paragraph in EMPTY_LINE.split(text):
        lines = [line.strip() for line in paragraph.splitlines()]
        # Two spaces set columns apart.
        if any("  " in line.replace(".  ", ". ") or line.startswith(">>>") for line in lines):
            continue
        sentences = " ".join(paragraph.split())
        if SENTENCES.fullmatch(sentences) and len(sentences.split()) >= LEAST_WORDS:
            yield sentences


def _sections(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node)
    if text:
        yield f"{name}{_signature(node)}", text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _sections(child, f"{name}.{child.name}")


def _signature(node: ast.AST) -> str:
    arguments = getattr(node, "args", None)
    return f"({ast.unparse(arguments)})" if arguments else ""
