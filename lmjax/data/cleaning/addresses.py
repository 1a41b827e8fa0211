"""Rules on the addresses of pages."""

from __future__ import annotations

import functools
import ipaddress
import re
from urllib.parse import urlsplit

from lmjax.config import UserError, config
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.documents import Document
from lmjax.data.files import open_file, read_blocks
from lmjax.remote import check_path

WORD = re.compile(r"[a-z]+")


@config
class AddressRules(Step):
    """Drops pages by their URL: lists of domains, words in it, as RefinedWeb does.

    (Penedo et al. 2023, arXiv:2306.01116, section 3.1 and appendix G.1.) A page whose words of a
    list reach a sum of weights is dropped, so that one mild word alone does not decide. The URL is
    in the metadata of a document; one without is kept.
    """

    blocked: tuple[str, ...] = ()  # domains, with all below them: "example.com"
    blocked_list: str | None = None  # file of domains, one a line, # before remarks
    words: tuple[str, ...] = ()  # that weigh 1 each where they are a whole word of the URL
    strong_words: tuple[str, ...] = ()  # that are enough alone, also as a part of a word
    most_words: int = 1  # sum of weights that a page may have
    numbers: bool = True  # drop pages whose host is an address in numbers
    field: str = "url"  # of the metadata

    def validate(self) -> None:
        """Raises UserError for a list that cannot be served."""
        check_path(self.blocked_list or "", "blocked_list")
        for word in (*self.words, *self.strong_words):
            if word != word.lower() or not word:
                raise UserError(f"words: {word!r}: give words in lower case")

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`."""
        address = str((document.metadata or {}).get(self.field) or "")
        if not address:
            return document
        try:
            host = urlsplit(address if "//" in address else f"//{address}").hostname or ""
        except ValueError:
            return Dropped("the address is none", address[:100])
        if self.numbers and _is_number(host):
            return Dropped("the host is a number", host)
        if found := _below(host, _domains(self.blocked, self.blocked_list)):
            return Dropped("a blocked domain", found)
        lowered = address.lower()
        for word in self.strong_words:
            if word in lowered:
                return Dropped("a strong word in the address", word)
        found = {*self.words} & {*WORD.findall(lowered)}
        if len(found) > self.most_words:
            return Dropped("too many words of the list in the address", ", ".join(sorted(found)))
        return document


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _below(host: str, domains: frozenset[str]) -> str | None:
    """The domain of a set that a host is, or is below; None: none is."""
    while host and domains:
        if host in domains:
            return host
        host = host.partition(".")[2]
    return None


@functools.lru_cache(maxsize=8)
def _domains(named: tuple[str, ...], path: str | None) -> frozenset[str]:
    """Blocked domains. UserError: the list cannot be read."""
    found = [name.lower() for name in named]
    if path is not None:
        with open_file(path) as file:
            text = b"".join(read_blocks(file, path)).decode("utf-8", "replace")
        lines = (line.partition("#")[0].strip().lower() for line in text.split("\n"))
        found += filter(None, lines)
    return frozenset(found)
