"""Balanced sampling over tags: how often each document is read in an epoch."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from lmjax.config import UserError, config
from lmjax.data.documents import digest
from lmjax.data.store import TokenStore
from lmjax.files import errors_told
from lmjax.remote import check_path, local_copy

Path = tuple[str, ...]  # names of the levels, from the top; a tag without a taxonomy has one
UNTAGGED: Path = ("(no tag)",)
SHOWN = 5  # names that a message gives


@config
class TagBalance:
    """Reads documents of rare tags more often, level by level of a taxonomy.

    Among the children of each node of the taxonomy the share of one with n documents is in
    proportion to n^exponent, and within a leaf its documents share equally; a document with several
    tags has the mean of their shares. Each document is read at least once in an epoch: the least
    wanted once, the others as many times as their shares are larger, but at most `most` times.

    A taxonomy is a JSON file of objects in objects, with lists of names or empty objects at the
    bottom: Baichuan 2 has three levels (Yang et al. 2023, arXiv:2309.10305, section 3). Without
    one each tag is a leaf, as Qwen's tags of instructions are. Held-out data stay as they are.
    """

    field: str = "tags"  # of the lines, also named in the source's metadata: a tag, or a list
    taxonomy: str | None = None  # the JSON file; tags are its leaves, or paths as "a/b/c"
    exponent: float = 0.5  # 1: as the data are; 0: all children of a node alike
    most: int = 5  # times that a document is read in an epoch

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        check_path(self.taxonomy or "", "balance.taxonomy")
        if not 0 <= self.exponent <= 1:
            raise UserError(f"balance.exponent={self.exponent}: it lies between 0 and 1")
        if self.most < 1:
            raise UserError(f"balance.most={self.most}: each document is read at least once")

    def marks(self) -> dict[str, str]:
        """Fingerprint of the taxonomy, by a name; empty without one."""
        if self.taxonomy is None:
            return {}
        return {"taxonomy": digest(*map("/".join, read_taxonomy(self.taxonomy)))}

    def of_store(self, store: TokenStore) -> Coverage:
        """The tags of a store's documents, and how often each document is read in an epoch.

        Raises:
          UserError: the taxonomy cannot be read, or a document has a tag that is not in it.
        """
        leaves = None if self.taxonomy is None else read_taxonomy(self.taxonomy)
        known = None if leaves is None else Tags(leaves, self.taxonomy)
        paths = [
            _paths(store.metadata(number).get(self.field), known, f"document {number}")
            for number in range(store.manifest.documents)
        ]
        counts = repeats(document_shares(paths, self.exponent), self.most, paths)
        return Coverage(tuple(paths), counts, leaves or ())


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Tags of a store's documents.

    Attributes:
      paths: of each document, those of its tags.
      repeats: how often each is read in an epoch.
      leaves: of the taxonomy; empty where there is none.
    """

    paths: tuple[tuple[Path, ...], ...]
    repeats: Int64[np.ndarray, "documents"]
    leaves: tuple[Path, ...] = ()

    def missing(self) -> list[Path]:
        """Leaves of the taxonomy that no document has."""
        there = {path for paths in self.paths for path in paths}
        return [leaf for leaf in self.leaves if leaf not in there]

    @property
    def depth(self) -> int:
        """Levels of the taxonomy; 1 where there is none."""
        return max((len(leaf) for leaf in self.leaves), default=1)

    @property
    def words(self) -> str:
        """The largest nodes of the first level with their documents and reads."""
        parts = [
            f"{name} {documents:,.0f}, {reads / documents:.2f} times each"
            for name, documents, reads in self.rows(1)
            if documents
        ]
        more = f"; {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
        return "; ".join(parts[:SHOWN]) + more

    def rows(self, level: int) -> list[tuple[str, float, float]]:
        """Name, documents, and reads in an epoch, of the nodes of a level of the taxonomy.

        A document with several tags counts in parts. Nodes without documents are there too.
        """
        found: dict[str, list[float]] = {"/".join(leaf[:level]): [0.0, 0.0] for leaf in self.leaves}
        for paths, times in zip(self.paths, self.repeats.tolist(), strict=True):
            for path in paths:
                row = found.setdefault("/".join(path[:level]), [0.0, 0.0])
                row[0] += 1 / len(paths)
                row[1] += times / len(paths)
        ordered = sorted(found.items(), key=lambda pair: (-pair[1][0], pair[0]))
        return [(name, *numbers) for name, numbers in ordered]


class Tags:
    """Tags by their name, or by their path in a taxonomy."""

    def __init__(self, leaves: Sequence[Path], taxonomy: str) -> None:
        self.taxonomy = taxonomy
        self._found = collections.defaultdict(list)
        for leaf in leaves:
            for name in {leaf[-1], "/".join(leaf)}:
                self._found[name].append(leaf)

    def find(self, tag: str, document: str) -> Path:
        """The path of a tag. UserError where there is none, or several."""
        found = self._found.get(tag, [])
        if len(found) == 1:
            return found[0]
        if found:
            ways = " and ".join("/".join(path) for path in found[:SHOWN])
            raise UserError(f"{document} has the tag {tag!r}, which is {ways}: give its path")
        some = ", ".join(list(self._found)[:SHOWN])
        raise UserError(
            f"{document} has the tag {tag!r}, which is not in {self.taxonomy}; there are {some} and"
            " others"
        )


def read_taxonomy(path: str) -> tuple[Path, ...]:
    """The leaves of a taxonomy in a JSON file, in its order.

    Raises:
      UserError: it cannot be read, or is no taxonomy.
    """
    with errors_told(f"cannot read the taxonomy {path}"):
        text = local_copy(path, "balance.taxonomy").read_text("utf-8")
    try:
        leaves = tuple(_leaves(json.loads(text), ()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is no taxonomy, JSON objects in objects with lists of names: {error}"
        ) from None
    if len(set(leaves)) < len(leaves) or () in leaves:
        raise UserError(f"{path} is no taxonomy: it is empty, or has a leaf twice")
    return leaves


def _leaves(node: Any, path: Path) -> Iterator[Path]:
    if isinstance(node, dict) and node:
        for name, child in node.items():
            yield from _leaves(child, (*path, name))
    elif isinstance(node, list) and node:
        for name in node:
            if not isinstance(name, str):
                raise TypeError(f"{name!r} in the list of {'/'.join(path)} is no name")
            yield (*path, name)
    elif node in ({}, [], None):
        yield path
    else:
        raise TypeError(f"{node!r} below {'/'.join(path)} is neither an object nor a list")


def _paths(value: Any, known: Tags | None, document: str) -> tuple[Path, ...]:
    """The paths of the tags of a document, each once."""
    tags = value if isinstance(value, list) else [] if value is None else [value]
    tags = [str(tag) if isinstance(tag, int) else tag for tag in tags]  # as of classes
    if not all(isinstance(tag, str) and tag for tag in tags):
        raise UserError(f"{document} has the tags {value!r}; a tag is a name")
    found = [(tag,) if known is None else known.find(tag, document) for tag in tags]
    return tuple(dict.fromkeys(found)) or (UNTAGGED,)


def document_shares(
    paths: Sequence[Sequence[Path]], exponent: float
) -> Float64[np.ndarray, "documents"]:
    """Shares of the documents in what is read; together 1. See `TagBalance`."""
    sizes: dict[Path, float] = collections.defaultdict(float)  # documents below each node
    for own in paths:
        for path in own:
            for level in range(1, len(path) + 1):
                sizes[path[:level]] += 1 / len(own)
    totals: dict[Path, float] = collections.defaultdict(float)  # of n^exponent below each parent
    for node, size in sizes.items():
        totals[node[:-1]] += size**exponent
    shares: dict[Path, float] = {(): 1.0}
    for node in sorted(sizes, key=len):
        shares[node] = shares[node[:-1]] * sizes[node] ** exponent / totals[node[:-1]]
    of_leaf = {path: shares[path] / sizes[path] for own in paths for path in own}
    return np.array([sum(of_leaf[path] for path in own) / len(own) for own in paths])


def repeats(
    shares: Float64[np.ndarray, "documents"], most: int, paths: Sequence[Sequence[Path]]
) -> Int64[np.ndarray, "documents"]:
    """Readings of each document in an epoch: one to `most`, in proportion to shares.

    Fractions are rounded down or up so that each tag has its whole number of reads, within 1.
    """
    wanted = np.minimum(shares / shares.min(), most) if len(shares) else shares
    order = np.array(sorted(range(len(paths)), key=lambda n: paths[n][0]), np.int64)
    edges = np.floor(np.cumsum(wanted[order]) + 0.5 + 1e-9)
    found = np.empty(len(order), np.int64)
    found[order] = np.diff(edges, prepend=0)
    return found
