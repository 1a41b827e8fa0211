"""Source code of programs: its language, its licence, and how it was made."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator

from lmjax.config import config
from lmjax.data.documents import Document, OnSkip, Part
from lmjax.data.file_source import FileSource

# Languages by the ending of a file's name.
ENDINGS = {
    ".asm": "assembly", ".bash": "shell", ".bat": "batch", ".c": "c", ".cc": "c++",
    ".clj": "clojure", ".cljs": "clojure", ".cmake": "cmake", ".coffee": "coffeescript",
    ".cpp": "c++", ".cs": "c#", ".css": "css", ".cu": "cuda", ".cuh": "cuda", ".cxx": "c++",
    ".dart": "dart", ".el": "lisp", ".erl": "erlang", ".ex": "elixir", ".exs": "elixir",
    ".f": "fortran", ".f90": "fortran", ".fs": "f#", ".go": "go", ".gradle": "groovy",
    ".groovy": "groovy", ".h": "c", ".hpp": "c++", ".hs": "haskell", ".html": "html",
    ".java": "java", ".jl": "julia", ".js": "javascript", ".json": "json", ".jsx": "javascript",
    ".kt": "kotlin", ".kts": "kotlin", ".lean": "lean", ".lisp": "lisp", ".lua": "lua",
    ".m": "objective-c", ".md": "markdown", ".ml": "ocaml", ".mjs": "javascript", ".mli": "ocaml",
    ".nim": "nim", ".pas": "pascal", ".php": "php", ".pl": "perl", ".pm": "perl",
    ".proto": "protobuf", ".ps1": "powershell", ".py": "python", ".pyi": "python",
    ".pyx": "cython", ".r": "r", ".rb": "ruby", ".rs": "rust", ".rst": "rst", ".s": "assembly",
    ".scala": "scala", ".scm": "scheme", ".sh": "shell", ".sol": "solidity", ".sql": "sql",
    ".sv": "verilog", ".swift": "swift", ".tcl": "tcl", ".tex": "tex", ".toml": "toml",
    ".ts": "typescript", ".tsx": "typescript", ".v": "verilog", ".vb": "visual basic",
    ".vhd": "vhdl", ".vhdl": "vhdl", ".vue": "vue", ".xml": "xml", ".yaml": "yaml",
    ".yml": "yaml", ".zig": "zig",
}  # fmt: skip
NAMES = {"makefile": "make", "dockerfile": "docker", "cmakelists.txt": "cmake", "rakefile": "ruby"}
PROGRAMS = {
    "bash": "shell",
    "sh": "shell",
    "python": "python",
    "node": "javascript",
    "perl": "perl",
}
SHEBANG = re.compile(r"#!\s*(?:/usr/bin/env\s+)?(?:\S*/)?([a-z]+)")
SPDX = re.compile(r"SPDX-License-Identifier:\s*([A-Za-z0-9.+-]+)")
LICENCE_FILES = ("license", "licence", "copying", "unlicense")
BEGINNING = 40  # lines of a file that are searched for its licence, and 10 for remarks
# Words that a licence has, the more special ones first, by its name in SPDX's list.
LICENCES = (
    ("AGPL-3.0", ("gnu affero general public license", "version 3")),
    ("LGPL-3.0", ("gnu lesser general public license", "version 3")),
    ("LGPL-2.1", ("gnu lesser general public license", "version 2.1")),
    ("GPL-3.0", ("gnu general public license", "version 3")),
    ("GPL-2.0", ("gnu general public license", "version 2")),
    ("MPL-2.0", ("mozilla public license", "2.0")),
    ("Apache-2.0", ("apache license", "version 2.0")),
    ("BSD-3-Clause", ("redistribution and use in source and binary forms", "neither the name")),
    ("BSD-2-Clause", ("redistribution and use in source and binary forms",)),
    ("ISC", ("permission to use, copy, modify, and/or distribute this software",)),
    ("MIT", ("permission is hereby granted, free of charge", "without restriction")),
    ("Unlicense", ("this is free and unencumbered software released into the public domain",)),
    ("CC0-1.0", ("cc0 1.0 universal",)),
)
PERMISSIVE = (
    "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "ISC", "MIT", "Unlicense",
)  # fmt: skip
GENERATED = re.compile(
    r"@generated|auto-?generated|do not edit|don't edit|generated (?:by|from|automatically)"
    r"|automatically generated|this file was generated",
    re.IGNORECASE,
)
MINIFIED_MEAN, MINIFIED_LONGEST = 100, 1000  # characters of a line


@config
class CodeFiles(FileSource):
    """Source code, a file each; of a folder all whose ending is that of a language.

    Metadata: `programming_language`, `licence` (SPDX's name, of the file or of the nearest folder
    above it with a licence; "" where none is known), `generated` and `minified`. What is to be left
    out says the step `CodeQuality`.
    """

    root: str = ""  # folder up to which licences are looked for; empty: `path` where it is a folder

    def endings(self) -> tuple[str, ...]:
        """See `FileSource.endings`."""
        return tuple(ENDINGS)

    def documents_of(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `FileSource.documents_of`."""
        data = self.whole(part, on_skip)
        if data is None:
            return
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.refuse(f"{part.name} is not UTF-8 at byte {error.start}", on_skip)
            return
        if "\0" in text[:4096]:
            self.refuse(f"{part.name} is no text: it has a zero", on_skip)
        elif text.strip():
            about = {
                "file": part.name,
                "programming_language": programming_language(part.name, text),
                "licence": self._licence(part.name, text),
                "generated": is_generated(text),
                "minified": is_minified(part.name, text),
            }
            yield Document(text, part.name, metadata=about)

    def _licence(self, name: str, text: str) -> str:
        """Licence of the file itself, or of the nearest folder above it."""
        head = "\n".join(text.split("\n", BEGINNING)[:BEGINNING])
        if found := licence_of(head):
            return found
        root = os.path.abspath(os.path.expanduser(self.root or self._folder()))
        folder = os.path.dirname(os.path.abspath(name))
        while folder == root or folder.startswith(root + os.sep):
            if found := folder_licence(folder):
                return found
            folder = os.path.dirname(folder)
        return ""

    def _folder(self) -> str:
        paths = (self.path,) if isinstance(self.path, str) else self.path
        folders = [one for one in paths if os.path.isdir(os.path.expanduser(one))]
        return folders[0] if len(folders) == 1 else os.sep


def programming_language(name: str, text: str = "") -> str:
    """A file's programming language by its name, or by its first line; "" where neither says it."""
    last = os.path.basename(name).lower()
    if last in NAMES:
        return NAMES[last]
    ending = os.path.splitext(last)[1]
    if ending in ENDINGS:
        return ENDINGS[ending]
    found = SHEBANG.match(text)
    return PROGRAMS.get(found[1], "") if found else ""


def licence_of(text: str) -> str:
    """SPDX's name of the licence that a text has or names; "" where it is not known."""
    if found := SPDX.search(text):
        return found[1]
    words = " ".join(text.lower().replace("*", " ").replace("#", " ").split())
    return next((name for name, parts in LICENCES if all(part in words for part in parts)), "")


@functools.lru_cache(maxsize=4096)
def folder_licence(folder: str) -> str:
    """Licence of a folder's own file of that kind; "" where it has none, or an unknown one."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return ""
    for name in names:
        path = os.path.join(folder, name)
        if name.lower().startswith(LICENCE_FILES) and os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                if found := licence_of(file.read(1 << 16)):
                    return found
    return ""


def is_generated(text: str) -> bool:
    """Returns whether the first lines say that a program wrote the file."""
    return any(GENERATED.search(line) for line in text.split("\n", 10)[:10])


def is_minified(name: str, text: str) -> bool:
    """Returns whether lines are as long as only a program makes them, or the name says it.

    Codex (Chen et al. 2021, arXiv:2107.03374, section 3.1) leaves out files with more than 100
    characters a line on average, or more than 1,000 in one.
    """
    if ".min." in os.path.basename(name):
        return True
    lines = text.splitlines() or [""]
    longest = max(map(len, lines))
    return longest > MINIFIED_LONGEST or len(text) / len(lines) > MINIFIED_MEAN
