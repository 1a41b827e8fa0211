"""The one way in: from the command line to `config.run()`."""

import gc
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from lmjax.config import UserError
from lmjax.launch.command_line import exit_on_user_error, from_command_line
from lmjax.launch.memory import keep_memory
from lmjax.launch.processes import join_processes
from lmjax.launch.together import ending_together

EXPLAIN = "explain=true"


@runtime_checkable
class Runnable(Protocol):
    """A config that can be run."""

    def run(self) -> Any:
        """Does the work."""


def run(
    experiment: Runnable, argv: Sequence[str] | None = None, positional: str | Sequence[str] = ()
) -> None:
    """Runs `experiment` with the settings of the command line, or prints its help.

    With `explain=true` among them its method `explain` is called instead, which prints what would
    be run. A mistake of the user ends with a message and exit code 2, Ctrl-C with 130 (see
    `exit_on_user_error`).

    Args:
        experiment: a config with a method `run`.
        argv: settings such as `steps=100`; None takes those of this process.
        positional: the field, or the fields in order, that arguments without `=` set.
    """
    with ending_together(), exit_on_user_error():
        words = sys.argv[1:] if argv is None else list(argv)
        settings = [word for word in words if word != EXPLAIN]
        experiment = from_command_line(experiment, settings, positional)
        if settings != words:
            if not hasattr(experiment, "explain"):
                raise UserError(f"{EXPLAIN}: this command makes no model that could be explained")
            experiment.explain()
            return
        if argv is None:
            keep_memory()
            gc.freeze()  # what is imported stays: the collector need not look at it again
        join_processes(os.environ)
        experiment.run()
