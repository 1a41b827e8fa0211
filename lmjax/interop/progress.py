"""The bar of a conversion: how many bytes are read or written."""

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINES = 4  # lines of a phase where there is no terminal


class ByteBar:
    """A live line, or a few plain ones where there is no terminal.

    Use as a context manager round one phase, and call it with the bytes done and all bytes.
    """

    def __init__(self, what: str, console: Console) -> None:
        """`what` is being done."""
        self._what, self._console = what, console
        self._told = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28, style="grey37", complete_style="cyan"),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> "ByteBar":
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Shows how far the phase is."""
        part = PLAIN_LINES * done // total
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, total=total)
        elif part > self._told:
            self._told = part
            self._console.print(f"{self._what}  {decimal(done)} of {decimal(total)}")
