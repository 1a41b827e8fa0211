"""The book of a cache's pages: which are free, who has which, and which hold known beginnings.

A page that is full of tokens is published under a key of all tokens up to its end. A later text
that begins with the same tokens takes the page instead of computing it. Pages that nobody has stay
known until their room is needed; the one that was given back longest ago goes first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


def page_keys(salt: bytes, tokens: Sequence[int], page: int, known: Sequence[bytes] = ()) -> list:
    """Keys of a text's full pages: each is a SHA-256 hash of all tokens up to the page's end.

    Args:
      salt: says of which model the keys and values are.
      tokens: of the text.
      page: tokens of a page.
      known: keys of its first pages, which are not computed again.
    """
    keys = list(known)
    for index in range(len(keys), len(tokens) // page):
        before = keys[-1] if keys else salt
        part = np.asarray(tokens[index * page : (index + 1) * page], np.int64)
        keys.append(hashlib.sha256(before + part.tobytes()).digest())
    return keys


class PageBook:
    """Counts the holders of each page.

    Attributes:
      pages: number of all pages.
    """

    def __init__(self, pages: int):
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, held by nobody, oldest first

    @property
    def available(self) -> int:
        """Pages that can be taken: free ones, and known ones that nobody holds."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that somebody holds."""
        return self.pages - self.available

    @property
    def known(self) -> int:
        """Pages that can be found by their key."""
        return len(self._by_key)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Takes the pages of the longest known beginning of `keys`, and returns their numbers."""
        found = []
        for key in keys:
            if (page := self._by_key.get(key)) is None:
                break
            self._idle.pop(page, None)
            self._holders[page] += 1
            found.append(page)
        return found

    def known_beginning(self, keys: Sequence[bytes]) -> int:
        """Number of pages that `match` would take; for any thread."""
        return next((n for n, key in enumerate(keys) if key not in self._by_key), len(keys))

    def take(self, count: int) -> list[int] | None:
        """Takes pages for new tokens; None, and none is taken, where there are not so many."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._by_key[self._key_of.pop(page)]
            self._holders[page] = 1
            taken.append(page)
        return taken

    def publish(self, page: int, key: bytes) -> None:
        """Makes a full page known; a key that another page has stays that one's."""
        if key not in self._by_key and page not in self._key_of:
            self._by_key[key] = page
            self._key_of[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Gives pages back; of a text the last ones first, which are of least use to others."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def check(self) -> None:
        """Raises AssertionError where the book contradicts itself."""
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free) and not free & idle
        assert all(self._holders[page] == 0 for page in free | idle)
        assert all(self._holders[page] > 0 for page in set(range(self.pages)) - free - idle)
        assert self._key_of == {page: key for key, page in self._by_key.items()}
        assert idle <= set(self._key_of) and not free & set(self._key_of)
