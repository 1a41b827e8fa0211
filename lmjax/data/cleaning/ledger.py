"""Counts of a cleaning: documents and bytes by step, reasons, examples, lengths.

A ledger is kept for each shard, and ledgers are added up. Examples are chosen by a hash of the
document's identity, so that they depend neither on the order nor on the number of workers.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

from lmjax.config import fields, replace
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.documents import Document

EXAMPLES = 8  # of each reason, and of what was kept at the border
RESULTS = 24  # examples of what came out of the last step
EXCERPT = 1000  # characters of an example
TRIED = 16  # one of so many documents is looked at more closely: is it at the border?
MOST_TRIED = 50  # of a shard and a step
NEAR = 0.15  # by so much a threshold is moved to see whether a document is at the border


@dataclasses.dataclass(order=True)
class ShownDocument:
    """An example: a document that was dropped, or nearly so.

    Attributes:
        rank: hash of the identity; the examples with the least are kept.
        identity: of the document.
        measured: that decided.
        text: beginning of it.
    """

    rank: int
    identity: str
    measured: str
    text: str


@dataclasses.dataclass
class StepCounts:
    """Counts of the documents that came into a step and came out.

    Attributes:
        documents, size: that came in, and their bytes of UTF-8.
        kept, kept_size: that came out.
        changed: documents that came out with another text.
        seconds: of one core.
        reasons: documents that were dropped, by reason.
        dropped: examples by reason.
        border: examples of what stricter thresholds would drop, by reason.
    """

    documents: int = 0
    size: int = 0
    kept: int = 0
    kept_size: int = 0
    changed: int = 0
    seconds: float = 0.0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    dropped: dict[str, list[ShownDocument]] = dataclasses.field(default_factory=dict)
    border: dict[str, list[ShownDocument]] = dataclasses.field(default_factory=dict)

    def add(self, before: Document, size: int, result: Document | Dropped, seconds: float) -> int:
        """Counts a document; returns the bytes of what came out."""
        self.documents += 1
        self.size += size
        self.seconds += seconds
        if isinstance(result, Dropped):
            count(self.reasons, result.reason)
            note(self.dropped, before, result)
            return 0
        if result.text is not before.text:
            self.changed += 1
            size = text_size(result.text)
        self.kept += 1
        self.kept_size += size
        return size

    def merge(self, other: StepCounts) -> None:
        """Adds the counts of another ledger."""
        for name in ("documents", "size", "kept", "kept_size", "changed", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, number in other.reasons.items():
            count(self.reasons, reason, number)
        for name in ("dropped", "border"):
            own = getattr(self, name)
            for reason, samples in getattr(other, name).items():
                own[reason] = sorted([*own.get(reason, []), *samples])[:EXAMPLES]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StepCounts:
        """The counts that `dataclasses.asdict` gave."""
        samples = {}
        for name in ("dropped", "border"):
            found = values[name].items()
            samples[name] = {
                reason: [ShownDocument(**one) for one in some] for reason, some in found
            }
        return cls(**{**values, **samples})


@dataclasses.dataclass
class Ledger:
    """Counts of a shard, or of several.

    Attributes:
        steps: by name, in order.
        lengths: documents that came out of the last step, by the number of binary digits of their
            number of characters.
        size: bytes of UTF-8 of these.
        languages: documents of these by the language that their metadata have.
        results: examples of these, whatever they are like.
        skipped: pieces of input that could not be read.
    """

    steps: dict[str, StepCounts] = dataclasses.field(default_factory=dict)
    lengths: dict[int, int] = dataclasses.field(default_factory=dict)
    size: int = 0
    languages: dict[str, int] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    results: list[ShownDocument] = dataclasses.field(default_factory=list)

    def of(self, step: str) -> StepCounts:
        """The counts of a step, new ones where there are none."""
        return self.steps.setdefault(step, StepCounts())

    def merge(self, other: Ledger) -> None:
        """Adds the counts of another ledger."""
        for name, counts in other.steps.items():
            self.of(name).merge(counts)
        for own, others in (
            (self.lengths, other.lengths),
            (self.languages, other.languages),
        ):
            for key, number in others.items():
                count(own, key, number)
        self.size += other.size
        self.skipped += other.skipped
        self.results = sorted([*self.results, *other.results])[:RESULTS]

    def let_out(self, document: Document, size: int) -> None:
        """Counts a document that has come out of the last step, with its bytes."""
        count(self.lengths, len(document.text).bit_length())
        self.size += size
        keep_least(self.results, document, "", RESULTS)
        if document.metadata and "language" in document.metadata:
            count(self.languages, str(document.metadata["language"]))

    def clear_output(self) -> None:
        """Forgets what came out, where it goes into another pass."""
        self.lengths, self.size, self.languages, self.results = {}, 0, {}, []

    def to_json(self) -> dict[str, Any]:
        """The ledger as JSON values."""
        return dataclasses.asdict(self)

    @property
    def documents(self) -> int:
        """Documents that came out of the last step."""
        return sum(self.lengths.values())

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Ledger:
        """The ledger that `to_json` gave."""
        steps = {name: StepCounts.from_json(found) for name, found in values["steps"].items()}
        lengths = {int(digits): number for digits, number in values["lengths"].items()}
        results = [ShownDocument(**one) for one in values.get("results", ())]
        numbers = values["size"], values["languages"], values["skipped"]
        return cls(steps, lengths, *numbers, results)


def count(numbers: dict[Any, int], key: Any, more: int = 1) -> None:
    """Adds to the number of a key."""
    numbers[key] = numbers.get(key, 0) + more


def text_size(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def note(samples: dict[str, list[ShownDocument]], document: Document, result: Dropped) -> None:
    """Keeps a document as an example, if it is one of those with the least hashes."""
    own = samples.setdefault(result.reason, [])
    keep_least(own, document, result.measured, EXAMPLES)


def keep_least(
    own: list[ShownDocument], document: Document, measured: int | float | str, most: int
) -> None:
    """Adds a document to examples that are those with the least hashes."""
    rank = zlib.crc32(document.identity.encode("utf-8", "surrogatepass"))
    if len(own) < most or rank < own[-1].rank:
        words = f"{measured:.4g}" if isinstance(measured, float) else str(measured)
        own.append(ShownDocument(rank, document.identity, words, document.text[:EXCERPT]))
        own.sort()
        del own[most:]


def stricter(step: Step) -> Step | None:
    """The step with all thresholds moved by a share, so that it drops a little more; None: it has
    none.

    Thresholds are the numbers whose names begin with `least` and `most`.
    """
    changes = {}
    for name in fields(type(step)):
        value, factor = getattr(step, name), 1 + NEAR if name.startswith("least") else 1 - NEAR
        if not name.startswith(("least", "most")):
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            changes[name] = round(value * factor)
        elif isinstance(value, float):
            changes[name] = value * factor
        elif isinstance(value, tuple) and all(isinstance(one, float) for one in value):
            changes[name] = tuple(one * factor for one in value)
    return replace(step, **changes) if changes else None


class Border:
    """Looks for examples of what a step has just kept."""

    def __init__(self, step: Step) -> None:
        """The step, whose thresholds are moved."""
        self._step, self._left = stricter(step), MOST_TRIED

    def look(self, document: Document, counts: StepCounts) -> None:
        """Notes a document that came in and was kept, if the stricter step would drop it."""
        if self._step is None or not self._left:
            return
        if zlib.crc32(document.identity.encode("utf-8", "surrogatepass")) % TRIED == 0:
            self._left -= 1
            result = self._step(document)
            if isinstance(result, Dropped):
                note(counts.border, document, result)
