"""The base of jobs: configs that do a piece of work in a folder of their own."""

from __future__ import annotations

import abc

from lmjax.config import config


@config
class Job(abc.ABC):
    """Base of what a command runs, and of what a chain runs one after another (`Chain`).

    A job that was interrupted goes on when it is run again, and one that is finished does nothing.
    """

    output: str  # folder of what it makes; the same command continues there

    def may_change(self, setting: str) -> bool:
        """Returns whether the job may go on with another value of a setting (a dotted name).

        By default its folder may be moved, and all else makes another job.
        """
        return setting == "output"

    @abc.abstractmethod
    def run(self) -> None:
        """Does the work, or what is left of it.

        Raises:
          UserError: the settings do not fit each other, the data, or the folder.
          SystemExit: after Ctrl-C or SIGTERM, with the code that shells expect.
        """
