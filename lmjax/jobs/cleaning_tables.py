"""The tables of a cleaning's report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lmjax.console import Table, duration
from lmjax.data.cleaning.ledger import NEAR, Ledger, ShownDocument, StepCounts
from lmjax.data.cleaning.shard_pass import READING
from lmjax.data.cleaning.summary import Summary
from lmjax.jobs.results import Results

MOST_ROWS = 40  # of reasons
SHOWN = 40  # examples of each kind
EACH = 3  # of a reason
BEGINNING = 400  # characters of an example
MEGABYTE = 1e6


def results_of(summary: Summary, seconds: float, curves: Sequence[Table] = ()) -> Results:
    """All tables of a cleaning, and the numbers at the head of its report.

    Args:
        summary: of the cleaning.
        seconds: that the command took, the last time.
        curves: tables of the errors of its steps.
    """
    total = summary.total()
    tables = [
        _by_step(total),
        _bytes_by_step(total),
        _by_collection(summary),
        _reasons(total),
        _lengths(total),
        *_languages(total),
        _throughput(total),
        *_examples(total),
        *_pairs(summary),
        *curves,
    ]
    size = sum(counts.size for counts in _read(total))
    documents = sum(counts.documents for counts in _read(total))
    kept = total.documents
    tiles = (
        ("documents read", f"{documents:,}"),
        ("documents kept", f"{kept:,}"),
        ("share kept", f"{kept / documents:.1%}" if documents else "–"),
        ("text read", f"{size / MEGABYTE:,.1f} MB"),
        ("text kept", f"{total.size / MEGABYTE:,.1f} MB"),
        ("leaks of evaluation sets", f"{summary.findings:,}"),
        ("the last command took", duration(seconds)),
    )
    return Results(step=1, tables=tuple(tables), seconds=seconds, tiles=tiles)


def _read(ledger: Ledger) -> list[StepCounts]:
    """The counts of the sources."""
    return [counts for name, counts in ledger.steps.items() if name.startswith(READING)]


def _by_step(ledger: Ledger) -> Table:
    rows = tuple((name, c.documents, c.changed, c.kept) for name, c in ledger.steps.items())
    columns = ("step", "documents in", "changed", "documents out")
    return Table("Documents by step", columns, rows, "In the order of the steps.")


def _bytes_by_step(ledger: Ledger) -> Table:
    rows = tuple(
        (name, c.size / MEGABYTE, c.kept_size / MEGABYTE) for name, c in ledger.steps.items()
    )
    caption = "Megabytes of UTF-8."
    return Table("Text by step", ("step", "MB in", "MB out"), rows, caption)


def _by_collection(summary: Summary) -> Table:
    rows, notes = [], []
    for name, ledger in summary.ledgers.items():
        documents = sum(counts.documents for counts in _read(ledger))
        kept = ledger.documents
        rows.append((name, kept / documents if documents else None))
        if not kept:
            notes.append(f"Nothing of {name} is kept, of {documents:,} documents.")
        if ledger.skipped:
            notes.append(f"{ledger.skipped:,} pieces of {name} could not be read; they are listed.")
    if summary.empty:
        few = ", ".join(summary.empty[:5]) + (" and others" if len(summary.empty) > 5 else "")
        notes.append(f"{len(summary.empty):,} files are empty: {few}")
    caption = "Share of the documents of each collection that is kept."
    columns = ("collection", "share kept")
    return Table("Kept by collection", columns, tuple(rows), caption, notes=tuple(notes))


def _reasons(ledger: Ledger) -> Table:
    found = sorted(
        (
            (count, f"{name}: {reason}")
            for name, counts in ledger.steps.items()
            for reason, count in counts.reasons.items()
        ),
        reverse=True,
    )
    rows = tuple((words, count) for count, words in found[:MOST_ROWS])
    notes = (f"{len(found) - MOST_ROWS} rarer reasons are left out.",) if found[MOST_ROWS:] else ()
    caption = "Documents that a step has dropped, by reason."
    return Table("Reasons", ("reason", "documents"), rows, caption, notes=notes)


def _lengths(ledger: Ledger) -> Table:
    rows = tuple(
        (f"{1 << digits - 1:,} to {(1 << digits) - 1:,}" if digits else "0", count)
        for digits, count in sorted(ledger.lengths.items())
    )
    caption = "Documents that are kept, by their characters."
    return Table("Lengths", ("characters", "documents"), rows, caption)


def _languages(ledger: Ledger) -> Iterator[Table]:
    """Documents by language, where a step has noted it."""
    found = sorted(ledger.languages.items(), key=lambda item: (-item[1], item[0]))
    if found:
        caption = "Documents that are kept, by their language."
        yield Table("Languages", ("language", "documents"), tuple(found[:MOST_ROWS]), caption)


def _throughput(ledger: Ledger) -> Table:
    rows = tuple(
        (name, round(c.documents / c.seconds), c.size / MEGABYTE / c.seconds)
        for name, c in ledger.steps.items()
        if c.seconds
    )
    columns = ("step", "documents a second", "MB a second")
    return Table("Throughput", columns, rows, "Of one core, on this machine.")


def _examples(ledger: Ledger) -> Iterator[Table]:
    """Examples of what was dropped, and of what was kept at the border."""
    dropped, border = [], []
    for name, counts in ledger.steps.items():
        for found, rows in ((counts.dropped, dropped), (counts.border, border)):
            for reason, samples in sorted(found.items()):
                rows += [_shown(f"{name}: {reason}", one) for one in samples[:EACH]]
    columns = ("reason", "text")
    if dropped:
        yield Table("Dropped", columns, tuple(_spread(dropped)), "Beginnings of documents.")
    if border:
        caption = f"Kept, and dropped if the threshold were stricter by {NEAR:.0%}."
        yield Table("Kept at the border", columns, tuple(_spread(border)), caption)


def _spread(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Some rows, from all over them."""
    return rows[:: -(-len(rows) // SHOWN)]


def _shown(words: str, sample: ShownDocument) -> tuple[str, str]:
    measured = f" ({sample.measured})" if sample.measured else ""
    return f"{words}{measured}", f"\n{sample.identity}\n{_in_few_lines(sample.text[:BEGINNING])}"


def _in_few_lines(text: str) -> str:
    """The text with a sign in place of its line breaks."""
    return " \u23ce ".join(filter(None, map(str.strip, text.split("\n"))))


def _pairs(summary: Summary) -> Iterator[Table]:
    """Documents that were dropped, beside those that they repeat."""
    rows = tuple(
        (
            pair["step"],
            f"\nkept: {pair['kept']}\n{_in_few_lines(pair['kept_text'][:BEGINNING])}",
            f"\n\ndropped: {pair['dropped']}\n{_in_few_lines(pair['dropped_text'][:BEGINNING])}",
        )
        for pair in summary.pairs
    )
    if rows:
        columns = ("step", "kept", "dropped")
        yield Table("Duplicates", columns, rows, "The kept one is the first.", picture="pairs")
