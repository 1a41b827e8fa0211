"""Pages with planted dirt, each of which says what it is: to see what a cleaning finds.

Texts of a source become pages with navigation and scripts; among them are copies, edited copies,
mojibake, personal data, spam, and questions of an evaluation set.
"""

from __future__ import annotations

import html
import random
import zlib
from collections.abc import Iterator
from typing import Literal

from lmjax.config import UserError, config
from lmjax.data.cleaning.near_duplicates import ngrams
from lmjax.data.documents import Document, HashFiles, OnSkip, Part, Source, digest

Kind = Literal[
    "good", "copy", "edited", "related", "mojibake", "personal", "leak", "spam", "navigation"
]
VERSION = "1"  # to be raised when other pages are made of the same text
PAGE = 1200  # characters of text that make a page at least
NGRAM = 5  # words, of the similarity that is noted
# Of 100 pages so many are, or have beside them, a page of the kind.
SHARES: dict[Kind, int] = {
    "copy": 6,
    "edited": 10,
    "related": 6,
    "mojibake": 5,
    "personal": 6,
    "leak": 6,
    "spam": 6,
    "navigation": 6,
}
# Least and greatest share of the words that are exchanged.
EDITS = {"edited": (0.003, 0.018), "related": (0.12, 0.2)}
WORDS = """
amber basket candle dragon engine forest garden hammer island jacket kettle lantern marble
needle orange pencil quarry ribbon saddle ticket umbrella violin window yard zipper
"""
WORDS = """
amber basket candle dragon engine forest garden hammer island jacket kettle lantern marble
needle orange pencil quarry ribbon saddle ticket umbrella violin window yard zipper
"""
NOUNS = tuple(WORDS.split())
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ACCENTS = "The {noun} caf\u00e9 has a na\u00efve fa\u00e7ade, and isn\u2019t open on {day}."
PERSONAL = (
    "Write to {noun}.{other}{number}@example{number}.org or call +44 20 7946 0{number:03} today.",
    "The server {noun} is at 8.8.{low}.{low} and was paid for by the card 4111 1111 1111 1111.",
)
SCRIPT = "var shown = {}; function track(page) { shown[page] = (shown[page] || 0) + 1; }"


@config
class DirtyPages(Source):
    """HTML pages made of the texts of a source, with planted dirt; the metadata says which.

    "planted" is the kind of a page, "of" the page that it repeats, "similarity" the share of runs
    of 5 words (Jaccard) in common with it, "secret" a sentence that should be in the output if the
    page is mojibake, and should not if it is a leak or has personal data.
    """

    source: Source  # good text
    questions: int = 60  # of the evaluation set that leaks (`PlantedQuestions`)

    def validate(self) -> None:
        """Raises UserError for no questions."""
        if self.questions < 1:
            raise UserError(f"questions={self.questions}: must be 1 or more")

    def parts(self) -> tuple[Part, ...]:
        """See `Source.parts`: those of the texts."""
        return self.source.parts()

    def fingerprint(self, hash_files: HashFiles | None = None) -> str:
        """See `Source.fingerprint`."""
        return digest(
            "DirtyPages", VERSION, str(self.questions), self.source.fingerprint(hash_files)
        )

    def read(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `Source.read`."""
        for identity, text in _texts(self.source, part, on_skip):
            rng = random.Random(zlib.crc32(identity.encode("utf-8", "surrogatepass")))
            kind = _drawn(rng)
            alone = kind in ("mojibake", "personal", "leak")
            if not alone:
                yield _page(identity, text, "good")
            if kind != "good":
                yield self._planted(f"{identity} ({kind})", text, kind, identity, rng)

    def _planted(
        self, identity: str, text: str, kind: Kind, of: str, rng: random.Random
    ) -> Document:
        """A page of a kind."""
        if kind == "copy":
            return _page(identity, text.replace("\n\n", "\n\n\n"), kind, {"of": of})
        if kind in EDITS:
            edited = edit(text, rng.uniform(*EDITS[kind]), rng)
            one, other = ngrams(text, NGRAM), ngrams(edited, NGRAM)
            about = {"of": of, "similarity": len(one & other) / max(len(one | other), 1)}
            return _page(identity, edited, kind, about)
        if kind in ("mojibake", "personal", "leak"):
            secret = self._secret(kind, rng)
            paragraphs = text.split("\n\n")
            paragraphs.insert(len(paragraphs) // 2, secret)
            text = "\n\n".join(paragraphs)
            if kind == "mojibake":
                text = text.encode("utf-8").decode("cp1252", "replace")
            return _page(identity, text, kind, {"secret": secret})
        if kind == "spam":
            words = " ".join(rng.sample(NOUNS, 4))
            return _page(identity, f"The best {words} to buy with our offer. " * 80, kind)
        links = "\n\n".join(f"{noun} ({rng.randrange(90)})" for noun in NOUNS * 3)
        return _page(identity, links, kind)

    def _secret(self, kind: Kind, rng: random.Random) -> str:
        """A sentence that should be repaired, changed or cut out."""
        if kind == "mojibake":
            return ACCENTS.format(noun=rng.choice(NOUNS), day=rng.choice(DAYS))
        return question(rng.randrange(self.questions)) if kind == "leak" else _personal(rng)


@config
class PlantedQuestions(Source):
    """The evaluation set that leaks into `DirtyPages`: questions of arithmetic, made by a rule."""

    questions: int = 60  # that there are

    def parts(self) -> tuple[Part, ...]:
        """See `Source.parts`: one."""
        return (Part("questions", 0, self.questions, 100 * self.questions),)

    def read(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `Source.read`."""
        for number in range(part.start, part.stop):
            yield Document(question(number), f"question {number}")


def question(number: int) -> str:
    """A question of the evaluation set."""
    rng = random.Random(number)
    one, other, third = rng.sample(NOUNS, 3)
    many, few = rng.randrange(60, 1000), rng.randrange(2, 60)
    return (
        f"On {rng.choice(DAYS)} the {one} shop has {many} boxes of {other} parts and sells {few} "
        f"of them to the {third} shop, which gives {number + 2} back in the evening; how many "
        f"boxes does the {one} shop have at the end of that day?"
    )


def edit(text: str, share: float, rng: random.Random) -> str:
    """The text with a share of its words, at least one, exchanged for other words."""
    words = text.split(" ")
    for at in rng.sample(range(len(words)), max(1, round(share * len(words)))):
        words[at] = rng.choice(NOUNS)
    return " ".join(words)


def _texts(source: Source, part: Part, on_skip: OnSkip) -> Iterator[tuple[str, str]]:
    """Texts of a page's length, of neighbouring documents together; each paragraph once."""
    waiting: list[str] = []
    known: set[str] = set()
    number = 0
    for document in source.read(part, on_skip):
        for paragraph in document.text.split("\n\n"):
            if paragraph in known:
                continue
            known.add(paragraph)
            waiting.append(paragraph.strip())
            if sum(map(len, waiting)) >= PAGE:
                yield f"{part.name}:{part.start} page {number}", "\n\n".join(waiting)
                waiting, number = [], number + 1


def _drawn(rng: random.Random) -> Kind:
    """The kind of dirt that comes with a page."""
    left = rng.randrange(100)
    for kind, share in SHARES.items():
        if left < share:
            return kind
        left -= share
    return "good"


def _personal(rng: random.Random) -> str:
    """A sentence with personal data, all of which has to be replaced."""
    noun, other = rng.sample(NOUNS, 2)
    number, low = rng.randrange(1000), rng.randrange(1, 250)
    return rng.choice(PERSONAL).format(noun=noun, other=other, number=number, low=low)


def _page(identity: str, text: str, kind: Kind, about: dict | None = None) -> Document:
    """The text as a page, with what pages have around it."""
    links = "".join(f'<li><a href="/{noun}">{noun.capitalize()}</a></li>' for noun in NOUNS[:12])
    body = "".join(f"<p>{html.escape(one)}</p>\n" for one in text.split("\n\n") if one.strip())
    page = (
        f"<!DOCTYPE html>\n<html><head><title>{html.escape(identity)}</title>"
        f"<script>{SCRIPT}</script></head>\n<body>\n<nav class='menu'><ul>{links}</ul></nav>\n"
        f"<main><article>\n{body}</article></main>\n<footer><p>All rights reserved. "
        "<a href='/privacy'>Privacy policy</a></p></footer>\n</body></html>\n"
    )
    name = zlib.crc32(identity.encode("utf-8", "surrogatepass"))
    metadata = {"url": f"https://pages.example/{name:08x}.html", "planted": kind, **(about or {})}
    return Document(page, identity, group=identity, metadata=metadata)
