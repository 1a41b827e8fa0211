"""Links that people have shared, as a sign of quality: WebText's rule."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from urllib.parse import urlsplit

from lmjax.config import UserError, config
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.documents import Document
from lmjax.data.files import find_files, open_file, read_blocks
from lmjax.remote import check_path

URL = re.compile(r"""https?://[^\s<>"'\])]+""")
SCHEME = re.compile(r"^[a-z]+://(?:www\.)?", re.IGNORECASE)


@config
class SharedLinks(Step):
    """Keeps pages that were linked to from messages with a score.

    WebText (Radford et al. 2019, section 2.1) has the pages that messages on Reddit with a karma of
    3 or more link to. The messages are JSON lines with a URL, or a text with some, and a score; the
    score of a page is the largest of its messages'.
    """

    messages: str  # JSON lines with the messages, compressed or not; path or pattern
    least_score: float = 3.0  # of a message
    url_field: str = "url"  # of a message: the address, or a text with addresses
    score_field: str = "score"  # of a message
    field: str = "url"  # metadata of a document with its address
    inside: tuple[str, ...] = ("reddit.com", "redd.it")  # domains whose own pages do not count

    def validate(self) -> None:
        """Raises UserError for messages that cannot be read."""
        check_path(self.messages, "messages")

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`. UserError: the messages cannot be read."""
        address = str((document.metadata or {}).get(self.field) or "")
        if not address:
            return Dropped("no address")
        score = _scores(self).get(plain_address(address))
        if score is None:
            return Dropped("nobody linked to the page")
        if score < self.least_score:
            return Dropped("the score of the links is low", score)
        return document._replace(metadata={**document.metadata, "link_score": score})


def plain_address(url: str) -> str:
    """An address in the one form that is compared: no scheme, "www.", fragment or last slash."""
    url = url.strip().partition("#")[0]
    host, mark, rest = SCHEME.sub("", url).partition("/")
    return f"{host.lower()}{mark}{rest}".rstrip("/")


def outbound_links(
    records: Iterable[tuple[str, float]], inside: tuple[str, ...] = ()
) -> dict[str, float]:
    """The largest score of each address that messages link to.

    Args:
        records: the address of a message, or its text, and its score.
        inside: domains, with all below them, whose addresses do not count.
    """
    found: dict[str, float] = {}
    for text, score in records:
        for url in URL.findall(text):
            url = url.rstrip(".,;:!?")
            try:
                host = urlsplit(url).hostname or ""
            except ValueError:
                continue
            if any(host == domain or host.endswith(f".{domain}") for domain in inside):
                continue
            address = plain_address(url)
            found[address] = max(score, found.get(address, score))
    return found


@functools.lru_cache(maxsize=2)
def _scores(step: SharedLinks) -> dict[str, float]:
    """Scores of all addresses of a step's messages. UserError: they cannot be read."""
    found = outbound_links(_records(step), step.inside)
    if not found:
        raise UserError(
            f"messages={step.messages}: no line has an address in {step.url_field!r} and a number "
            f"in {step.score_field!r}"
        )
    return found


def _records(step: SharedLinks) -> Iterator[tuple[str, float]]:
    for name in find_files(step.messages):
        with open_file(name) as file:
            rest = b""
            for block in read_blocks(file, name):
                *lines, rest = (rest + block).split(b"\n")
                yield from _pairs(lines, step)
            yield from _pairs([rest], step)


def _pairs(lines: list[bytes], step: SharedLinks) -> Iterator[tuple[str, float]]:
    """Address and score of the lines that have both."""
    for line in lines:
        try:
            record = json.loads(line) if line.strip() else {}
        except ValueError:
            continue
        if not isinstance(record, dict):
            continue
        text, score = record.get(step.url_field), record.get(step.score_field)
        if isinstance(text, str) and isinstance(score, int | float):
            yield text, float(score)
