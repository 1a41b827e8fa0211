"""Sources of LaTeX, code and published corpora, and the steps that belong to them."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import pytest

from lmjax.config import UserError, replace
from lmjax.data import CodeFiles, FirstField, LatexFiles, PileFiles, WuDaoFiles
from lmjax.data.cleaning import CodeQuality, LatexText, SharedLinks
from lmjax.data.cleaning.latex_text import expanded, simple_macros
from lmjax.data.cleaning.links import outbound_links, plain_address
from lmjax.data.code_files import (
    is_generated,
    is_minified,
    licence_of,
    programming_language,
)
from lmjax.data.documents import Document
from lmjax.data.latex import inlined, without_comments
from lmjax.data.published import c4_files, skypile_files, wikipedia_files, yayi2_files

PAPER = r"""\documentclass{article}
\usepackage{amsmath} % for align
\newcommand{\R}{\mathbb{R}}
\newcommand\eps{\varepsilon}
\def\half{\frac{1}{2}}
\newcommand{\pair}[2]{(#1, #2)}
\DeclareMathOperator{\E}{E}
\newcommand{\RR}{\R\times\R}
\begin{document}
\title{On rivers}\maketitle
\begin{abstract}Of all rivers.\end{abstract}
% a remark
\section{Begin}
Let $x \in \R$, $\eps > 0$ and $\pair{a}{b} \in \RR$; \half of it. % and another
Of 50\% the mean is $\E[x]$.
\begin{comment}
hidden
\end{comment}
\begin{equation} \eps{}x = \half y \end{equation}
\input{more}
\bibliographystyle{plain}
\bibliography{refs}
\end{document}
what is behind
"""
MORE = r"""\newcommand{\late}{later}The end is \late.
% of more"""


def text_of(source, **settings):
    return LatexText(**settings)(Document(source, "paper")).text


def test_a_paper_keeps_its_maths_alone():
    assert text_of(inlined(PAPER, {"more.tex": MORE}.get)) == (
        "\\title{On rivers}\n"
        "\\begin{abstract}Of all rivers.\\end{abstract}\n"
        "\\section{Begin}\n"
        "Let $x \\in \\mathbb{R}$, $\\varepsilon > 0$ and $\\pair{a}{b} \\in "
        "\\mathbb{R}\\times\\mathbb{R}$; \\frac{1}{2} of it.\n"
        "Of 50\\% the mean is $\\operatorname{E}[x]$.\n\n"
        "\\begin{equation} \\varepsilon x = \\frac{1}{2} y \\end{equation}\n"
        "The end is later."
    )


def test_parts_of_a_paper_are_settings():
    assert text_of(PAPER, abstract=False).startswith("\\section{Begin}")
    assert "\\bibliography{refs}" in text_of(PAPER, references=True)
    assert LatexText()(Document("no LaTeX, 50% of it", "d")).text == "no LaTeX, 50% of it"
    commented = LatexText()(Document("% \\begin{document}\nx", "d"))
    assert commented.reason == "the LaTeX document begins in a comment"
    empty = LatexText()(Document("\\begin{document}\n\\end{document}", "d"))
    assert empty.reason == "no text in the LaTeX source"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a % b\nc", "a\nc"),
        ("a \\% b", "a \\% b"),
        ("a \\\\% b", "a \\\\"),
        ("a\n  % b\nc", "a\nc"),
        ("a\n\nb", "a\n\nb"),
    ],
)
def test_comments(source, expected):
    assert without_comments(source) == expected


def test_macros_that_call_each_other_end():
    macros = simple_macros(r"\def\a{\b}\def\b{\a}\def\c{x}\def\c{y}\newcommand{\d}[1][z]{#1}")
    assert macros == {"a": r"\b", "b": r"\a", "c": "y"}
    assert expanded(r"\c and \a and \cc", macros).startswith("y and ")
    assert expanded(r"\cc", macros) == r"\cc"
    assert expanded(r"\a b", {"a": r"\alpha"}) == r"\alpha b"
    assert expanded(r"\a{}b", {"a": r"\alpha"}) == r"\alpha b"


def archive(files):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as made:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            made.addfile(info, io.BytesIO(text.encode()))
    return data.getvalue()


def test_papers_of_files_folders_and_archives(tmp_path):
    (tmp_path / "a.tex").write_text(PAPER)
    (tmp_path / "more.tex").write_text(MORE)
    (tmp_path / "b.tex.gz").write_bytes(gzip.compress(PAPER.encode("latin-1")))
    (tmp_path / "c.tar.gz").write_bytes(
        gzip.compress(archive({"./main.tex": PAPER, "more.tex": MORE, "fig.pdf": "x"}))
    )
    found = list(LatexFiles(path=str(tmp_path)).documents())
    names = [d.identity.rpartition("/")[2] for d in found]
    assert names == ["a.tex", "b.tex.gz", "c.tar.gz:main.tex"]
    assert all("The end is" in d.text for d in found)
    (tmp_path / "d.tar").write_bytes(archive({"x.tex": "no paper"}))
    (tmp_path / "e.tar").write_bytes(b"no archive at all")
    source, told = LatexFiles(path=str(tmp_path), on_error="skip"), []
    read = [d for part in source.parts() for d in source.read(part, told.append)]
    assert len(read) == 3 and ["no paper" in told[0], "no archive" in told[1]] == [True, True]
    with pytest.raises(UserError, match=r"d\.tar has no paper"):
        list(replace(source, on_error="raise").documents())


def test_inputs_outside_of_the_folder_are_not_read(tmp_path):
    (tmp_path / "secret.tex").write_text("secret")
    inner = tmp_path / "paper"
    inner.mkdir()
    (inner / "a.tex").write_text("\\begin{document}\\input{../secret}\\input{a}x\\end{document}")
    (found,) = LatexFiles(path=str(inner)).documents()
    assert "secret}" in found.text and found.text.count("secret") == found.text.count("../secret")


MIT = "Permission is hereby granted, free of charge, to any person ... without restriction, ..."
CODE = 'def area(width, height):\n    """Area of a field."""\n    return width * height\n'


@pytest.fixture
def code(tmp_path):
    (tmp_path / "LICENSE").write_text(MIT)
    (tmp_path / "a.py").write_text(CODE)
    (tmp_path / "b.min.js").write_text("var a=1;")
    (tmp_path / "c.py").write_text("# Generated by protoc. DO NOT EDIT!\n" + CODE)
    (tmp_path / "d.json").write_text("[" + ",".join("0123456789" for _ in range(200)) + "]")
    inner = tmp_path / "gpl"
    inner.mkdir()
    (inner / "COPYING").write_text("GNU General Public License\nVersion 3, 29 June 2007")
    (inner / "e.c").write_text("int main(void) { return 0; }\n")
    (inner / "f.c").write_text("// SPDX-License-Identifier: BSD-2-Clause\nint a;\n")
    (inner / "notes.txt").write_text("no code")
    return tmp_path


def test_code_has_its_language_and_licence(code):
    found = {d.identity.rpartition("/")[2]: d for d in CodeFiles(path=str(code)).documents()}
    about = {
        name: tuple(d.metadata[k] for k in ("programming_language", "licence"))
        for name, d in found.items()
    }
    assert about == {
        "a.py": ("python", "MIT"),
        "b.min.js": ("javascript", "MIT"),
        "c.py": ("python", "MIT"),
        "d.json": ("json", "MIT"),
        "e.c": ("c", "GPL-3.0"),
        "f.c": ("c", "BSD-2-Clause"),
    }
    step = CodeQuality()
    reasons = {name: getattr(step(d), "reason", "") for name, d in found.items()}
    assert reasons == {
        "a.py": "",
        "b.min.js": "code without lines",
        "c.py": "code that a program wrote",
        "d.json": "code without lines",
        "e.c": "another licence",
        "f.c": "",
    }
    assert replace(step, licences=())(found["e.c"]) is found["e.c"]
    assert replace(step, languages=("c",))(found["a.py"]).measured == "python"
    alone = Document(CODE, "x/y.py")
    assert step(alone).reason == "the licence is not known"
    assert replace(step, unknown_licence=True)(alone) is alone
    assert step(Document("%$&/(" * 10 + "\n", "z.pl")).reason == "too few letters in code"


@pytest.mark.parametrize(
    ("name", "text", "language"),
    [
        ("a/Makefile", "", "make"),
        ("run", "#!/usr/bin/env python3\n", "python"),
        ("run", "#!/bin/sh\n", "shell"),
        ("A.RS", "", "rust"),
        ("notes", "text", ""),
    ],
)
def test_programming_languages(name, text, language):
    assert programming_language(name, text) == language


@pytest.mark.parametrize(
    ("words", "licence"),
    [
        ("Apache License\n  Version 2.0, January 2004", "Apache-2.0"),
        ("GNU LESSER GENERAL PUBLIC LICENSE Version 2.1", "LGPL-2.1"),
        ("GNU Affero General Public License version 3", "AGPL-3.0"),
        (
            "# Redistribution and use in source and\n# binary forms ... Neither the name",
            "BSD-3-Clause",
        ),
        ("All rights reserved.", ""),
    ],
)
def test_licences(words, licence):
    assert licence_of(words) == licence


def test_generated_and_minified():
    assert is_generated("/* @generated */") and not is_generated(CODE)
    assert not is_generated("\n" * 12 + "do not edit")
    assert is_minified("a.js", "x" * 1001) and is_minified("a.js", "x" * 101)
    assert not is_minified("a.js", ("x" * 99 + "\n") * 3) and not is_minified("a.js", "")


def write_lines(path, records):
    path.write_text(
        "\n".join(json.dumps(record, ensure_ascii=False) for record in records), "utf-8"
    )
    return str(path)


def test_layouts_of_published_corpora(tmp_path):
    page = {"text": "t", "url": "u", "timestamp": "s", "id": "1", "title": "n", "more": 1}
    path = write_lines(tmp_path / "a.jsonl", [page])
    (c4,), (wiki,), (sky,) = (
        list(make(path).documents()) for make in (c4_files, wikipedia_files, skypile_files)
    )
    assert c4.metadata == {"url": "u", "timestamp": "s"}
    assert wiki.metadata == {"id": "1", "title": "n", "url": "u"} and sky.metadata is None
    path = write_lines(tmp_path / "b.jsonl", [{"data": "x"}, {"content": "y", "data": "z"}])
    assert [d.text for d in yayi2_files(path).documents()] == ["x", "y"]
    with pytest.raises(UserError, match="none of the fields text"):
        list(FirstField(path=path, fields=("text",)).documents())
    pile = [
        {"text": "a", "meta": {"pile_set_name": "ArXiv"}},
        {"text": "b", "meta": {"redpajama_set_name": "RedPajamaC4"}},
        {"text": "c", "meta": {}},
    ]
    source = PileFiles(path=write_lines(tmp_path / "c.jsonl", pile))
    found = [(d.text, (d.metadata or {}).get("subset")) for d in source.documents()]
    assert found == [("a", "ArXiv"), ("b", "RedPajamaC4"), ("c", None)]
    assert [d.text for d in replace(source, subsets=("ArXiv",)).documents()] == ["a"]


def test_wudao_s_arrays(tmp_path, monkeypatch):
    records = [
        {
            "id": n,
            "title": "题" if n % 2 else "",
            "content": f"内容{n}" * 9,
            "dataType": f"类{n % 3}",
        }
        for n in range(40)
    ]
    path = tmp_path / "part-1.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), "utf-8")
    whole = list(WuDaoFiles(path=str(path)).documents())
    assert [d.text for d in whole] == [
        (f"{r['title']}\n" if r["title"] else "") + r["content"] for r in records
    ]
    assert whole[4].metadata == {"kind": "类1"} and whole[4].identity == f"{path}:4"
    monkeypatch.setattr("lmjax.data.files.BLOCK", 7)  # objects and characters are cut
    assert list(WuDaoFiles(path=str(tmp_path)).documents()) == whole
    some = WuDaoFiles(path=str(path), kinds=("类0",), title=False)
    assert [d.text for d in some.documents()] == [r["content"] for r in records[::3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"content": "a"}', "has no array"),
        ('[{"content": "a"}, {"cont', "ends in the middle"),
        ('[{"title": "a"}]', "no text in the field 'content'"),
    ],
)
def test_arrays_that_are_damaged(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message):
        list(WuDaoFiles(path=str(tmp_path / "a.json")).documents())


def test_pages_that_people_linked_to(tmp_path):
    messages = [
        {"url": "https://www.a.org/x/#top", "score": 2},
        {"url": "see http://a.org/x, and (https://b.org/y).", "score": 5},
        {"url": "https://old.reddit.com/r/z", "score": 99},
        {"url": "https://c.org", "score": 1},
        {"url": 3},
        ["no object"],
    ]
    path = write_lines(tmp_path / "m.jsonl", messages)
    step = SharedLinks(messages=path)

    def result(url):
        return step(Document("t", "d", metadata={"url": url} if url else None))

    assert result("http://a.org/x").metadata["link_score"] == 5
    assert result("https://www.B.org/y").metadata["link_score"] == 5
    assert result("https://c.org/").reason == "the score of the links is low"
    assert result("https://old.reddit.com/r/z").reason == "nobody linked to the page"
    assert result("").reason == "no address"
    with pytest.raises(UserError, match="no line has an address in 'link'"):
        replace(step, url_field="link")(Document("t", "d", metadata={"url": "x"}))
    assert plain_address("HTTPS://WWW.A.org/B/") == "a.org/B"
    assert outbound_links([("https://a.b.org/ https://b.org/", 1.0)], ("a.b.org",)) == {
        "b.org": 1.0
    }
