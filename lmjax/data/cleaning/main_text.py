"""The main text of web pages: without navigation, scripts and notices."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

from lmjax.config import UserError, config
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.documents import Document
from lmjax.data.file_source import EXTRA

MARKUP = re.compile(r"<(?:!doctype|html|head|body|div|p|table|article)\b", re.IGNORECASE)
BEGINNING = 4096  # characters in which a page has the first of its elements
# To the parser, which is written in C, a zero is the end; half of a surrogate pair has no UTF-8.
UNREADABLE = re.compile("[\0\ud800-\udfff]")
BLANK_LINES = re.compile(r"\n{3,}")
ELSEWHERE = ("nav", "header", "footer", "aside", "form")  # elements that are not the page's text
ALWAYS = ("nav", "button", "form")  # elements that are left out
SILENT = ("script", "style", "noscript", "template")  # what is in them is not shown
# Elements within a line or a table, of which no name says anything.
UNNAMED = {"#comment", "b", "br", "code", "col", "em", "i", "img", "kbd", "li", "pre", "strong"}
UNNAMED |= {"td", "tr", "tt"}
NEVER = ("html", "body", "main", "article")


def _words(*names: str) -> re.Pattern[str]:
    """Pattern of the names of elements, which stand as words in their class or identity."""
    return re.compile(rf"(?:^|[\s_-])(?:{'|'.join(names)})(?=$|[\s_-])", re.IGNORECASE)


# Never the text of the page, by the names that programs for documentation and blogs give.
APART = _words(
    *("comments?", "commentlist", "respond", "disqus", "share", "sharing", "social", "sharedaddy"),
    *("relatedposts", "newsletter", "subscribe", "cookies?", "headerlink", "editsection"),
    *("printfooter", "footer", "copyright", "byline", "search", "login", "help-popup"),
    *("navheader", "navfooter", "docnav"),
)
# Lists of links, unless they hold text: some books have boxes that are called sidebars.
LISTS = _words(
    *("toc", "contents", "tableofcontents", "nav", "navbar", "navigation", "navlinks"),
    *("breadcrumbs?", "menu", "sidebar", "sphinxsidebar", "related"),
    *("navbox", "catlinks", "archives?", "tagcloud", "tags", "pagination", "pager", "skip"),
    *("skiplink", "header"),
)
LINKED = 0.3  # share of the text in links from which on an element is a list of links
LARGEST = 0.6  # share of the page's text in an element that may be left out
# Share of the page's text without links below which the main text is thought to be cut: all of it
# is taken then.
LEAST_SHARE = 0.85


@config
class MainText(Step):
    """Takes the main text out of an HTML page.

    Navigation, tables of contents, comments and notices are left out by their names and by their
    share of links; then resiliparse (Bevendorff et al. 2018) finds the main text. Where that lacks
    much of a page's text that is in no link, as of documentation, all of the rest is taken. Lines,
    lists and the indentation of code stay. A text without markup stays as it is.
    """

    # the main text, or all of it but navigation, header, footer, sidebars and forms
    content: Literal["main", "all"] = "main"
    least: int = 1  # characters of a page's text

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`."""
        if not MARKUP.search(document.text[:BEGINNING]):
            return document
        page, library = UNREADABLE.sub("\ufffd", document.text), _library()
        text = _main(library, page) if self.content == "main" else _all(library, page)
        lines = (line.rstrip() for line in text.split("\n"))
        text = BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n")
        if len(text) < self.least:
            return Dropped("no text in the page", len(text))
        return document._replace(text=text)


class _Library(NamedTuple):
    """Parts of resiliparse.

    Attributes:
        parse: makes a tree of a page.
        walk: calls a function where each element and text of a tree begins.
        extract: makes text of a page.
    """

    parse: Any
    walk: Any
    extract: Any


def _library() -> _Library:
    """The library resiliparse. UserError: it is not installed."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.html import HTMLTree, traverse_dom
    except ImportError:
        raise UserError(f"the step MainText needs resiliparse: {EXTRA}") from None
    return _Library(HTMLTree.parse, traverse_dom, extract_plain_text)


def _all(library: _Library, page: Any) -> str:
    """All text but that of elements for navigation."""
    extract = library.extract
    return extract(page, main_content=False, alt_texts=False, skip_elements=ELSEWHERE)


def _main(library: _Library, page: str) -> str:
    """The main text."""
    tree = library.parse(page)
    if tree.body is None:
        return library.extract(page, main_content=True, alt_texts=False)
    count = _Count()
    library.walk(tree.body, count.begin, elements_only=False)
    count.close()
    linked = count.linked
    for node, size, own in count.found:
        if size < LARGEST * count.text:
            node.parent.remove_child(node)
            linked -= own
    # The library looks at the page as it was parsed.
    page = str(tree)
    main = library.extract(page, main_content=True, alt_texts=False)
    rest = _all(library, page)
    return rest if _size(main) < LEAST_SHARE * (_size(rest) - linked) else main


class _Count:
    """Counts the characters of a page as its tree is walked through.

    Attributes:
        text, linked: characters so far, and those of them in links.
        found: elements that are not the page's text by their names, each with these two of it.
    """

    def __init__(self) -> None:
        """Nothing is counted yet."""
        self.text = self.linked = 0
        self.found: list[tuple[Any, int, int]] = []
        self._links = self._silent = 0
        # Elements that matter and have not ended: their depth, themselves, the kind of their name,
        # and counts before them.
        self._open: list[tuple[int, Any, str, int, int, int]] = [(-1, None, "", 0, 0, 0)]

    def begin(self, context: Any) -> None:
        """Takes a node that begins; those that are no deeper have ended."""
        node, depth = context.node, context.depth
        while self._open[-1][0] >= depth:
            self._end()
        tag = node.tag
        if tag == "#text":
            if not self._silent:
                size = _size(node.value)
                self.text += size
                self.linked += size if self._links else 0
        elif tag in SILENT:
            self._silent += 1
            self._keep(depth, node, "silent")
        elif tag == "a":
            self._links += 1
            self._keep(depth, node, "link")
        elif tag not in UNNAMED and (name := _name(node)) is not None:
            self._keep(depth, node, name)

    def close(self) -> None:
        """Ends all elements."""
        while len(self._open) > 1:
            self._end()

    def _keep(self, depth: int, node: Any, name: str) -> None:
        self._open.append((depth, node, name, self.text, self.linked, len(self.found)))

    def _end(self) -> None:
        _, node, name, text, linked, before = self._open.pop()
        if name == "silent":
            self._silent -= 1
            return
        if name == "link":
            self._links -= 1
            if (name := _name(node)) is None:
                return
        text, linked = self.text - text, self.linked - linked
        if name == "apart" or linked >= LINKED * text:
            del self.found[before:]  # those in it go with it
            self.found.append((node, text, linked))


def _name(node: Any) -> Literal["apart", "list"] | None:
    """Tells whether an element is named as one that is not the page's text, or as a list."""
    if node.tag in NEVER:
        return None
    if node.tag in ALWAYS:
        return "apart"
    if not node.attrs:
        return None
    name = f"{node.getattr('class') or ''} {node.getattr('id') or ''}"
    if node.getattr("role") == "navigation":
        return "apart"
    if APART.search(name):
        return "apart"
    return "list" if LISTS.search(name) else None


def _size(text: str) -> int:
    """Characters that are not blank."""
    return len("".join(text.split()))
