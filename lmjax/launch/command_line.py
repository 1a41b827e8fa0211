"""A config as the command line of a program: its settings, its help, its exit codes.

with exit_on_user_error():
    settings = from_command_line(Settings(), positional="run")
    ...
"""

import contextlib
import importlib
import os
import select
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from lmjax import files
from lmjax.config import UserError, fields, help_text, is_config, parse
from lmjax.config.declare import module_of


def from_command_line(
    config: Any, argv: Sequence[str] | None = None, positional: str | Sequence[str] = ()
) -> Any:
    """`config` with the settings of this process's command line; with `--help`, prints and exits.

    The docstring of the program's file heads the help.

    Args:
        config: the values to start from.
        argv: the arguments, less the program's name; None takes those of this process.
        positional: the field, or the fields in order, that arguments without `=` set.

    Raises:
        UserError: see `parse`.
        SystemExit: after `--help`.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        description = sys.modules["__main__"].__doc__
        # Flushed here, so that a reader who left early is noticed where it is handled.
        print(help_text(config, command_name(), description, positional), end="", flush=True)
        raise SystemExit(0)
    return parse(config, argv, positional)


def import_modules(names: Sequence[str]) -> None:
    """Imports modules that the user named with `imports=`, which declare configs of theirs.

    Raises:
        UserError: there is no such module.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(
                f"imports={name}: {error}; give a module as Python imports it (squared, not "
                f"squared.py) from {os.getcwd()}, $PYTHONPATH or what is installed"
            ) from None


def user_modules(config: Any) -> tuple[str, ...]:
    """The modules outside this package that declare classes of a config: `import_modules` them.

    What was typed in a notebook is in none.
    """
    found: dict[str, None] = {}

    def look(value: Any) -> None:
        if is_config(value):
            found[module_of(type(value))] = None
            for name in fields(type(value)):
                look(getattr(value, name))
        elif isinstance(value, tuple):
            for element in value:
                look(element)

    look(config)
    package = __name__.partition(".")[0]
    return tuple(name for name in found if name.partition(".")[0] not in (package, "__main__"))


def command_name() -> str:
    """Command that runs this program again: `python -m experiments.quickstart`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return f"python {sys.argv[0]}"
    return f"python -m {spec.name.removesuffix('.__main__')}"


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns foreseeable failures of the block into one clear message and an exit code.

    `UserError`, and a disk that is full or cannot be used: exit code 2. Ctrl-C, after the block's
    own handling: 130. A reader of our output that has gone (`... --help | head`): 141, silently.
    Anything else is a bug of ours and keeps its traceback. Every command line of the package goes
    through here.

    Raises:
        SystemExit: instead of the exceptions above.
    """
    try:
        yield
        sys.stdout.flush()  # so that a broken pipe shows here and not while Python shuts down
    except UserError as error:
        _say(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        _say("Interrupted.")
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone(sys.stdout):
            # Python flushes stdout once more at exit, which would fail again, loudly.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        words = _disk_words(error)
        if words is None:
            raise
        _say(words)
        sys.exit(2)


def _say(message: str) -> None:
    """Writes to stderr, in red when a person is looking."""
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        message = f"\033[31m{message}\033[0m"
    print(message, file=sys.stderr, flush=True)


def _reader_has_gone(stream: TextIO) -> bool:
    """Returns whether nobody reads `stream` any more; a broken pipe to a worker is no such case."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), select.POLLOUT)
    except OSError:  # a notebook's stdout is no file
        return False
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _disk_words(error: BaseException) -> str | None:
    """The message for a full disk, or one that cannot be used, if that lies behind `error`."""
    found = files.os_error(error)
    if found is None or found.errno not in files.MACHINE:
        return None
    rest = "What was complete before is still there."
    if found.errno in files.FULL:
        where = f" while writing {found.filename}" if found.filename else ""
        return (
            f"The disk is full{where}: free some space, or choose another place with "
            f"output=FOLDER. {rest}"
        )
    return f"{files.reason(error)}. {rest}"
