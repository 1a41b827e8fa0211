"""Settings of the engine: its slots, its cache, and its limits."""

from __future__ import annotations

from lmjax.config import UserError, config
from lmjax.models.empty_cache import CacheKind

FEWEST = 16  # tokens of the smallest chunk that a prompt's rest is padded to


@config
class EngineSettings:
    """Sizes and limits of what answers requests."""

    slots: int = 8  # answers that are written at the same time
    cache_tokens: int = 16_384  # tokens that the cache of keys and values holds, of all answers
    # what keys and values are kept in; none: what is computed in; int8: with a scale for each head
    # of each token, in little more than a quarter of the memory of float32; fp8: floats of 8 bits
    # (e4m3) without a scale, in a quarter, less exact
    cache: CacheKind | None = None
    page: int = 16  # tokens of a page of the cache; known beginnings are found by whole pages
    prefix_cache: bool = True  # keep full pages for texts that begin alike
    # most tokens of a prompt that are read between two tokens of the answers that are being written
    chunk: int = 256
    queue: int = 256  # most requests that wait
    queue_seconds: float = 120.0  # most time that one waits
    answer_seconds: float = 600.0  # most time for an answer; it ends there
    # tokens that are guessed ahead, and checked together: from what stands in the text already, or
    # by a smaller model; 0: none (Leviathan et al. 2023, arXiv:2211.17192)
    guesses: int = 0

    def validate(self) -> None:
        """Raises UserError for numbers that no engine could have."""
        for name in ("slots", "page", "queue"):
            if (number := getattr(self, name)) < 1:
                raise UserError(f"{name}={number}: must be 1 or more")
        if self.chunk < FEWEST:
            raise UserError(f"chunk={self.chunk}: must be {FEWEST} or more")
        if self.cache_tokens < self.page:
            raise UserError(
                f"cache_tokens={self.cache_tokens}: must be page={self.page} or more, one page"
            )
        if not 0 <= self.guesses <= 64:
            raise UserError(f"guesses={self.guesses}: must be from 0 to 64")
        for name in ("queue_seconds", "answer_seconds"):
            if not (seconds := getattr(self, name)) > 0:
                raise UserError(f"{name}={seconds}: must be above 0")

    @property
    def pages(self) -> int:
        """Pages of the cache."""
        return self.cache_tokens // self.page


def buckets(first: int, most: int, factor: int = 4) -> tuple[int, ...]:
    """Sizes that shapes are rounded up to: `first`, `factor` times as many, ..., and `most`."""
    sizes = []
    while first < most:
        sizes.append(first)
        first *= factor
    return (*sizes, most)


def bucket(sizes: tuple[int, ...], wanted: int) -> int:
    """The smallest of the sizes that is not below `wanted`."""
    return next(size for size in sizes if size >= wanted)
