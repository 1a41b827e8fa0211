"""Ctrl-C and SIGTERM as a wish to stop after the step, not as an exception in the middle of one."""

import os
import signal
from types import FrameType, TracebackType

import jax

AGREE_EVERY = 10  # steps between the moments at which several processes ask each other


class Interruption:
    """Context manager: inside, the first Ctrl-C or SIGTERM only sets `wished`.

    A second Ctrl-C ends the process at once; the last complete checkpoint stays.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wished(self, step: int) -> bool:
        """Returns whether to save and stop after this step: the same answer in every process.

        A signal reaches the processes of a run at different steps. They must stop at one step, so
        with more than one of them a wish counts from the next step that is a multiple of 10.
        """
        if jax.process_count() == 1:
            return self.signal is not None
        if step % AGREE_EVERY:
            return False
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(self.signal is not None).any())

    @property
    def exit_code(self) -> int:
        """128 plus the number of the signal, as a shell reports it."""
        return 128 + (self.signal or signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            # Not by an exception: that would wait for the steps that are under way.
            os.write(2, b"\nStopped at once; the last complete checkpoint stays.\n")
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        os.write(2, b"\nStopping after this step, and saving (Ctrl-C again: at once) ...\n")
