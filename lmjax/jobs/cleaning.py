"""Cleaning: from raw pages and texts to deduplicated, clean documents, and a report."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Literal

from lmjax.config import UserError, config
from lmjax.data.cleaning.corpus_step import CorpusStep
from lmjax.data.cleaning.formats import JsonLinesOutput, OutputFormat
from lmjax.data.cleaning.pipeline import CleaningPipeline, CleaningRecipe, flat
from lmjax.data.cleaning.shard_pass import DOCUMENTS, FINDINGS, LEFT_OUT, Collection
from lmjax.data.cleaning.step import Step
from lmjax.data.cleaning.summary import Summary
from lmjax.data.documents import Progress
from lmjax.files import local_path
from lmjax.jobs.job import Job
from lmjax.launch import import_modules

if TYPE_CHECKING:
    from lmjax.runs.folder import RunFolder

FEWEST = 8 << 20  # bytes of source for which a process, which takes a second to begin, is worth it
NAME = re.compile(r"[\w-]+")
OUTPUT = (  # names, and what they are
    (f"{DOCUMENTS}/*", "the documents, for CleanedDocuments"),
    (LEFT_OUT, "a line for each document that was left out, and the reason"),
    (FINDINGS, "a line for each leak of an evaluation set"),
)


@config
class Cleaning(Job):
    """Clean the documents of sources: extract, filter, deduplicate, decontaminate, write.

    Sources are read shard by shard on all cores, and the corpus is never held in memory. The same
    command goes on after any interruption, and makes the same bytes with any number of workers. The
    output has documents/COLLECTION/*, read by `CleanedDocuments`, a line for all that was left out,
    and report.html.
    """

    sources: tuple[Collection, ...]  # of two equal documents that of the earlier one is kept
    # a document in, a document or a reason out; some need all documents: duplicates, leaks
    steps: tuple[Step | CorpusStep | CleaningRecipe, ...] = ()
    written: OutputFormat = JsonLinesOutput()  # format of the documents
    workers: int = 0  # processes; 0: one for each core, where there is enough text
    on_error: Literal["raise", "skip"] = "raise"  # what to do where a step fails on a document
    most_bytes: int = 64 << 20  # of a document; longer ones are left out
    imports: tuple[str, ...] = ()  # modules of your own whose classes the run has

    def validate(self) -> None:
        """Raises UserError for settings that do not go together."""
        local_path(self.output, "output")
        names = [one.name for one in self.sources]
        if not names or len({*names}) < len(names):
            raise UserError(f"sources: give collections of different names, got {names}")
        for name in names:
            if not NAME.fullmatch(name):
                raise UserError(f"sources: {name!r} is a folder's name: letters, digits, - and _")
        if self.workers < 0 or self.most_bytes < 1:
            raise UserError(
                f"workers={self.workers}, most_bytes={self.most_bytes}: must be 0 or more, and 1 or"
                " more"
            )

    def may_change(self, setting: str) -> bool:
        """See `Job.may_change`; what was finished had no error, whatever was to be done with it."""
        kept = setting in ("output", "workers", "imports") or setting.startswith("imports.")
        return kept or setting.rpartition(".")[2] == "on_error"

    def run(self) -> None:
        """See `Job.run`."""
        # Processes that clean import this module, and need none of these.
        from lmjax.console import ByteBar, RunLog, Stopwatch, make_console
        from lmjax.jobs.cleaning_tables import results_of
        from lmjax.jobs.error_curves import curve_tables
        from lmjax.jobs.report import write_report
        from lmjax.runs.folder import RESULTS
        from lmjax.runs.lock import lock_run_folder

        import_modules(self.imports)
        log, watch = RunLog(make_console()), Stopwatch()
        with lock_run_folder(self) as folder:
            log.title(folder.path.name, folder.location)
            if not folder.results():
                pipeline = CleaningPipeline(
                    self.sources,
                    flat(self.steps),
                    self.written,
                    folder.path,
                    self.on_error,
                    self.most_bytes,
                )
                with _Bars(ByteBar, log) as progress:
                    summary = self._clean(pipeline, progress)
                curves = tuple(curve_tables(flat(self.steps)))
                results = results_of(summary, watch.seconds(), curves)
                folder.write_json(RESULTS, results.to_json())
                write_report(folder)
                for table in results.tables:
                    if not table.is_text and table.picture is None:
                        log.table(table)
            log.files(self._location(folder), [*OUTPUT, ("report.html", str(folder.report))])

    def _clean(self, pipeline: CleaningPipeline, progress: Progress) -> Summary:
        """Cleans on all cores of this machine."""
        return pipeline.run(self._processes(pipeline.size), progress)

    def _location(self, folder: RunFolder) -> object:
        """The place of the documents."""
        return folder.path

    def _processes(self, size: int) -> int:
        """Number of worker processes for bytes of source; 0 does the work in this one."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = self.workers or min(cores or 1, size // FEWEST)
        return 0 if workers <= 1 else workers


class _Bars:
    """A bar for each pass, one after another; a `Progress`."""

    def __init__(self, bar: type, log: object) -> None:
        self._make, self._log = bar, log
        self._what, self._bar = None, None

    def __enter__(self) -> _Bars:
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._close()
            self._what, self._bar = what, self._make(what, self._log.console)
            self._bar.__enter__()
        self._bar(done, max(total, 1))

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
