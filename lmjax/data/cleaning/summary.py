"""Results of a cleaning, as its output keeps them."""

from __future__ import annotations

from typing import Any, NamedTuple

from lmjax.data.cleaning.ledger import Ledger

SUMMARY = "summary.json"  # of a finished cleaning


class Summary(NamedTuple):
    """Results of a cleaning.

    Attributes:
        ledgers: of each collection, by name.
        pairs: examples of duplicates: step, and of both documents identity and text.
        findings: leaks that were told.
        empty: files of the sources without a byte.
    """

    ledgers: dict[str, Ledger]
    pairs: list[dict[str, str]]
    findings: int
    empty: list[str]

    def total(self) -> Ledger:
        """The ledger of all collections."""
        whole = Ledger()
        for ledger in self.ledgers.values():
            whole.merge(ledger)
        # What collections do for themselves is first, and has the collection in its name.
        own = {name: found for name, found in whole.steps.items() if name.endswith(")")}
        whole.steps = own | whole.steps
        return whole

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON values."""
        ledgers = {name: ledger.to_json() for name, ledger in self.ledgers.items()}
        return self._asdict() | {"ledgers": ledgers}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Summary:
        """The summary that `to_json` gave."""
        ledgers = {name: Ledger.from_json(found) for name, found in values["ledgers"].items()}
        return cls(**values | {"ledgers": ledgers})
