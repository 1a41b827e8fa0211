"""Jobs that are run one after another, each of which can begin with what earlier ones made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lmjax.config import UserError, config, fields, is_config, replace
from lmjax.console import RunLog, Table, make_console
from lmjax.files import errors_told
from lmjax.jobs.job import Job
from lmjax.jobs.report import OUTPUT, write_report
from lmjax.launch import on_first
from lmjax.remote import check_path, is_url
from lmjax.runs.folder import CONFIG, RunFolder


@config
class Chain(Job):
    """Run jobs one after another, and report on all of them.

    In the jobs' settings "{output}" stands for the chain's own folder: a job with
    output="{output}/sft" is one that a later job can begin with, as begin_with="{output}/sft".
    After an interruption the same command goes on; each job says itself which of its settings may
    have changed.
    """

    jobs: tuple[Job, ...]  # in their order
    about: str = ""  # words about the whole, at the head of the report

    def validate(self) -> None:
        """Raises UserError for jobs that do not go together."""
        check_path(self.output, "output")
        if is_url(self.output):
            raise UserError(
                f"output={self.output}: the folder of a chain is on this machine; the outputs of "
                "its jobs may be URLs"
            )
        if not self.jobs:
            raise UserError("jobs: give at least one")
        known: list[str] = []
        for number, job in enumerate(self.jobs):
            if job.output in known:
                raise UserError(f"jobs.{number}.output={job.output}: an earlier job has it too")
            for path, text in _texts(job, f"jobs.{number}"):
                if text != job.output and OUTPUT in text and not _is_below(text, known):
                    raise UserError(
                        f"{path}={text}: no earlier job has this output; those before it have "
                        + (", ".join(known) or "none")
                    )
            known.append(job.output)

    def run(self) -> None:
        """See `Job.run`."""
        folder, log = RunFolder(self.output), RunLog(make_console())
        on_first(lambda: self._enter(folder))
        for number, job in enumerate(self.resolved_jobs(), 1):
            log.heading(f"Job {number} of {len(self.jobs)}", type(job).__name__)
            job.run()
            jax.clear_caches()  # no later job runs the same programs
            on_first(lambda: write_report(folder))
        log.files(folder.path, [("the report on all jobs", str(folder.report))])

    def explain(self) -> None:
        """Prints what each job makes, and what it begins with; makes nothing."""
        rows = []
        for number, job in enumerate(self.resolved_jobs(), 1):
            reads = getattr(job, "begin_with", None)
            words = f"{job.output}" + (f", begins with {reads}" if reads else "")
            rows.append((f"{number}. {type(job).__name__}", f"\n{words}"))
        RunLog(make_console()).table(Table("Jobs", ("job", "output"), tuple(rows)))

    def resolved_jobs(self) -> tuple[Job, ...]:
        """The jobs, with the chain's folder in their settings."""
        folder = os.fspath(self.output).rstrip("/")
        return tuple(
            _with_texts(job, lambda text: text.replace(OUTPUT, folder)) for job in self.jobs
        )

    def _enter(self, folder: RunFolder) -> None:
        """Makes the folder, with the chain's settings in it; UserError: it holds something else."""
        with errors_told(f"cannot write in output={folder.location}"):
            found = os.listdir(folder.path) if folder.path.is_dir() else []
            if CONFIG in found:
                before = folder.read_json(CONFIG).get("class")
                if before != type(self).__name__:
                    raise UserError(f"output={self.output} holds a run of {before}, not a chain")
            elif any(not name.startswith(".") for name in found):
                raise UserError(
                    f"output={self.output} exists and holds no chain (there is no {CONFIG}): "
                    "choose another output"
                )
            folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_config(self)


def _is_below(path: str, folders: list[str]) -> bool:
    """Returns whether a path is one of the folders, or is in one."""
    return any(path == one or path.startswith(one.rstrip("/") + "/") for one in folders)


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every text among the settings of a config, with the name of the setting."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, tuple):
        for number, element in enumerate(value):
            yield from _texts(element, f"{path}.{number}")
    elif is_config(value):
        for name in fields(type(value)):
            yield from _texts(getattr(value, name), f"{path}.{name}")


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A config with each text among its settings changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_with_texts(element, change) for element in value)
    if not is_config(value):
        return value
    old = {name: getattr(value, name) for name in fields(type(value))}
    new = {name: _with_texts(part, change) for name, part in old.items()}
    return value if new == old else replace(value, **new)
