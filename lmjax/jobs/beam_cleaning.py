"""Cleaning on many machines, by Apache Beam."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmjax.config import UserError, config
from lmjax.data.cleaning.beam import BeamRun
from lmjax.data.cleaning.pipeline import CleaningPipeline
from lmjax.data.cleaning.summary import Summary
from lmjax.data.documents import Progress
from lmjax.jobs.cleaning import Cleaning
from lmjax.remote import check_path

if TYPE_CHECKING:
    from lmjax.runs.folder import RunFolder


@config
class CleaningOnBeam(Cleaning):
    """A `Cleaning` whose shards a runner of Apache Beam spreads over machines.

    The documents are those of a `Cleaning` with the same settings, byte for byte. They lie in
    `storage`, and the report in `output`. The same command goes on after the loss of a machine or
    of the runner.
    """

    # Beam's own default tries to download another engine: "FnApiRunner" is for this machine,
    # "DataflowRunner", "FlinkRunner" and "SparkRunner" for many
    runner: str
    storage: str  # URL of a bucket, or a folder that all machines see
    options: tuple[str, ...] = ()  # of the runner: ("--project=mine", "--region=europe-west4")

    def validate(self) -> None:
        """Raises UserError for a runner without a name, or a place that cannot be written."""
        super().validate()
        if not self.runner:
            raise UserError("runner is empty: name one, such as FnApiRunner or DataflowRunner")
        check_path(self.storage, "storage", write=True)

    def may_change(self, setting: str) -> bool:
        """See `Job.may_change`."""
        return super().may_change(setting) or setting in ("runner", "options")

    def _clean(self, pipeline: CleaningPipeline, progress: Progress) -> Summary:
        """Cleans on the machines of the runner."""
        progress(f"{self.runner} cleans", 0, 1)
        return BeamRun(pipeline, self.storage).run(self.runner, self.options)

    def _location(self, folder: RunFolder) -> object:
        """See `Cleaning._location`."""
        return self.storage
