"""Parts that the sides of `benchmarks.data` share; nothing of ours is imported."""

import collections
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.harness import documents_of


class Side:
    """Texts, and steps that are applied to them."""

    def __init__(
        self,
        apply: Callable[[str, list[str]], int],
        pairs: Callable[[list[str]], list[list[int]]] | None = None,
    ) -> None:
        self._apply, self._pairs = apply, pairs

    def prepare(self, texts: str, pages: str) -> str:
        """Reads the texts, and pages for the steps that begin with extraction."""
        self._texts, self._pages = documents_of(texts), documents_of(pages)
        return "ready"

    def run(self, name: str, share: float = 1.0) -> dict[str, Any]:
        """Applies a step to all texts, or a share of them: processor's and other seconds."""
        texts = self._pages if name in ("extraction", "whole") else self._texts
        texts = texts[: max(1, round(share * len(texts)))]
        begin, used = time.perf_counter(), time.process_time()
        kept = self._apply(name, texts)
        used, seconds = time.process_time() - used, time.perf_counter() - begin
        size = sum(len(text.encode("utf-8")) for text in texts)
        found = {"documents": len(texts), "bytes": size, "kept": kept}
        return found | {"seconds": seconds, "processor_seconds": used}

    def pairs(self) -> list[list[int]]:
        """Pairs of texts that share a band."""
        return self._pairs(self._texts)


def by_step(keys: Sequence[Iterable[Any]]) -> list[list[int]]:
    """Pairs of numbers whose keys agree in a band."""
    groups: dict[Any, list[int]] = collections.defaultdict(list)
    for number, bands in enumerate(keys):
        for band, key in enumerate(bands):
            groups[band, key].append(number)
    found = {pair for group in groups.values() for pair in itertools.combinations(group, 2)}
    return sorted(map(list, found))
