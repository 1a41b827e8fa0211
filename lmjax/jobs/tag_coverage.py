"""Tags of the training data, in the log and in the report."""

from __future__ import annotations

from lmjax.config import config
from lmjax.console import RunLog, Table
from lmjax.data import Data, PreparedData
from lmjax.evaluation.evaluator import Context, Evaluate, Evaluator
from lmjax.launch import is_first

LARGEST = 40  # most rows of a table
COLUMNS = ("tag, documents", "of the documents", "of what is read")
CAPTION = (
    "Training documents by tag, their share, and the share of an epoch's readings; a document with "
    "several tags counts in parts."
)


@config
class TagCoverage(Evaluator):
    """Tags of the training data that are balanced, and what an epoch reads of each."""

    def prepare(self, context: Context) -> Evaluate:
        """See `Evaluator.prepare`; the feed is a `TextFeed`."""
        tables = tables_of(context.feed.prepared)
        return lambda step, params: tables if is_first() else ()


def coverage_of(data: Data) -> tuple[Evaluator, ...]:
    """The evaluator, where there is something to tell."""
    return (TagCoverage(),) if any(domain.balance is not None for domain in data.train) else ()


def tables_of(prepared: PreparedData) -> tuple[Table, ...]:
    """A table for each level of each balanced domain's tags, the deepest last."""
    tables = []
    for name, coverage in prepared.coverage.items():
        for level in range(1, coverage.depth + 1):
            rows, title = coverage.rows(level), f"Tags of {name}"
            total, read = (sum(row[column] for row in rows) or 1 for column in (1, 2))
            shown = [
                (f"{tag}, {count:,.6g}", count / total, reads / read)
                for tag, count, reads in rows[:LARGEST]
            ]
            more, notes = len(rows) - LARGEST, []
            if more > 0:
                notes.append(f"{more} smaller ones are left out.")
            if empty := sum(not count for _, count, _ in rows):
                notes.append(f"{empty} of {len(rows)} have no document.")
            title += f", level {level}" if coverage.depth > 1 else ""
            tables.append(Table(title, COLUMNS, tuple(shown), CAPTION, notes=tuple(notes)))
    return tuple(tables)


def tell_coverage(log: RunLog, prepared: PreparedData) -> None:
    """Logs what an epoch reads of the largest tags, and which leaves no document has."""
    for name, coverage in prepared.coverage.items():
        log.fact("tags", f"{name}: {coverage.words}")
        if missing := ["/".join(leaf) for leaf in coverage.missing()]:
            more = ", ..." if len(missing) > 5 else ""
            log.warn(
                f"{name}: {len(missing)} of {len(coverage.leaves)} leaves of the taxonomy have no"
                f" document: {', '.join(missing[:5])}{more}"
            )
