"""Pages of requests: those of known beginnings first, and new ones for the rest."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection

from lmjax.serving.active import ActiveRequest
from lmjax.serving.pages import PageBook, page_keys


@dataclasses.dataclass(frozen=True)
class RequestPages:
    """Gives requests pages of a book, and makes known what they hold.

    Attributes:
      book: of all pages.
      page: tokens of a page.
      keeps_beginnings: whether full pages are found again by texts that begin alike.
      to_the_end: whether a text gets the pages of its whole answer when it begins.
      counts: of tokens, by name, of which those of prompts are counted here.
    """

    book: PageBook
    page: int
    keeps_beginnings: bool
    to_the_end: bool
    counts: Counter[str]

    def begin(self, one: ActiveRequest) -> bool:
        """Gives a text its pages, the known ones first, unless it has some already.

        Returns:
          Whether there were enough.
        """
        if one.pages:
            return True
        pages = self.book.match(self._known_keys(one))
        length = len(one.tokens)
        if self.to_the_end:
            length = len(one.request.tokens) + one.budget - 1
        more = self.book.take(max(math.ceil(length / self.page), 1) - len(pages))
        if more is None:
            self.book.release(pages)
            return False
        one.pages, one.cached = pages + more, len(pages) * self.page
        if not one.prompt_told:
            one.matched, one.scored = one.cached, []
            self.counts["prompt_tokens"] += len(one.tokens)
        self.counts["known_tokens"] += one.cached
        return True

    def next_to_read(
        self, waiting: Collection[ActiveRequest], fits: Callable[[int, int], bool]
    ) -> list[ActiveRequest]:
        """Texts that are read in the next call, with their pages: the oldest, and short ones.

        What is left of the others is read to its end. A text that begins as one of them waits: it
        finds the beginning in the cache afterwards.

        Args:
          waiting: texts that are not read yet, the oldest first.
          fits: whether so many texts, the longest of so many tokens, are one call.

        Returns:
          [] where there are no pages for the oldest.
        """
        first, *others = waiting
        if not self.begin(first):
            return []
        group, longest = [first], first.reading
        if first.scores_prompt:
            return group
        for one in others:
            if not fits(len(group) + 1, longest):
                break
            length = max(longest, self._unread(one))
            alike = not one.pages and any(one.keys[:1] == other.keys[:1] != [] for other in group)
            if one.scores_prompt or alike or one.weights is not first.weights:
                continue
            if fits(len(group) + 1, length) and self.begin(one):
                group, longest = [*group, one], length
        return group

    def make_room(self, one: ActiveRequest, count: int) -> bool:
        """Gives a text pages for so many tokens after its cached ones; False if there are none."""
        more = self.book.take(math.ceil((one.cached + count) / self.page) - len(one.pages))
        one.pages += more or []
        return more is not None

    def extended(self, one: ActiveRequest, count: int) -> None:
        """Takes note that tokens are in the cache, and makes pages known that are full."""
        before = one.cached // self.page
        one.cached += count
        full = one.cached // self.page
        if not self.keeps_beginnings or full == before:
            return
        tokens = one.tokens[: one.cached]
        one.keys = page_keys(one.weights.salt, tokens, self.page, one.keys)
        for index in range(before, full):
            self.book.publish(one.pages[index], one.keys[index])

    def _unread(self, one: ActiveRequest) -> int:
        """Tokens of a text that are to be read."""
        if one.pages:
            return one.reading
        return len(one.tokens) - self.page * self.book.known_beginning(self._known_keys(one))

    def _known_keys(self, one: ActiveRequest) -> list[bytes]:
        """Keys of the pages of a text that may be known already."""
        if not self.keeps_beginnings:
            return []
        one.keys = page_keys(one.weights.salt, one.tokens, self.page, one.keys)
        # The last token is read in any case: its logits say what follows.
        return [] if one.scores_prompt else one.keys[: (len(one.tokens) - 1) // self.page]
