"""Audit of a classifier of quality: what does it keep of each language, source and length?"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from urllib.parse import urlsplit

from lmjax.console import Table
from lmjax.data.cleaning.languages import language_of
from lmjax.data.cleaning.quality import keep_probability
from lmjax.data.documents import Document

MOST_ROWS = 20  # of a table, the largest groups
FEWEST = 20  # documents of a group that a remark is made about
UNFAIR = 2.0  # so many times less is kept of a group than of all, and it is remarked
LENGTHS = (200, 500, 1000, 2000, 5000, 20_000)  # characters, the edges of groups


def audit_tables(score: Callable[[str], float], documents: Sequence[Document]) -> Iterator[Table]:
    """Tables of the share that GPT-3's rule keeps, by language, source and length.

    Classifiers of quality take the language, form and origin of their good examples for quality
    (Gururangan et al. 2022, arXiv:2201.10474); here it can be seen.

    Args:
        score: of a text, by the classifier.
        documents: raw ones, which it has not learned from.
    """
    scored = [(one, score(one.text)) for one in documents]
    for name, group in (("language", _language), ("source", _source), ("length", _length)):
        yield _table(name, scored, group)


def _table(
    name: str, scored: Sequence[tuple[Document, float]], group: Callable[[Document], str]
) -> Table:
    groups: dict[str, list[float]] = defaultdict(list)
    for document, score in scored:
        groups[group(document)].append(score)
    found = {key: (len(own), _mean(own), _kept(own)) for key, own in groups.items()}
    # By number, but lengths in their order.
    order = _lengths().index if name == "length" else lambda key: (-found[key][0], key)
    keys = sorted(found, key=order)
    rows = tuple((key, *found[key]) for key in keys[:MOST_ROWS])
    every = _kept([score for _, score in scored])
    notes = [
        f"Of {key} {kept:.3f} are kept, of all documents {every:.3f}."
        for key, count, _, kept in rows
        if count >= FEWEST and kept * UNFAIR < every
    ]
    if len(keys) > MOST_ROWS:
        notes.append(f"{len(keys) - MOST_ROWS} smaller groups are left out.")
    columns = (name, "raw documents", "score", "kept by GPT-3's rule")
    caption = "Of held-out raw documents: how many, their mean score, and the share kept."
    return Table(f"Quality by {name}", columns, rows, caption, notes=tuple(notes))


def _language(document: Document) -> str:
    return str((document.metadata or {}).get("language") or language_of(document.text)[0])


def _source(document: Document) -> str:
    """Host of the URL, or file that the document is from."""
    url = str((document.metadata or {}).get("url") or "")
    return urlsplit(url).hostname or document.identity.rpartition(":")[0] or document.identity


def _length(document: Document) -> str:
    length = len(document.text)
    return _lengths()[sum(length >= edge for edge in LENGTHS)]


def _lengths() -> list[str]:
    edges = [0, *LENGTHS]
    names = [f"{low:,} to {high - 1:,} characters" for low, high in itertools.pairwise(edges)]
    return [*names, f"{LENGTHS[-1]:,} or more characters"]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _kept(scores: Iterable[float]) -> float:
    """Share that GPT-3's rule keeps."""
    kept = [float(keep_probability(score)) for score in scores]
    return sum(kept) / max(len(kept), 1)
