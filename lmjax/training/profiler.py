"""A trace of some training steps by JAX's profiler."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lmjax.files import errors_told


class Profiler:
    """Traces the steps from `first` to `last`, each under its number, into a folder.

    Use as a context manager round the loop, which may end before the last of them. The folder has
    traces for TensorBoard's profiler and, of this process, for https://ui.perfetto.dev.
    """

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self.folder, self.first, self.last = folder, first, last
        self._tracing = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error) -> None:
        self._stop()

    def traced(self, advance: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
        """`advance(state, step)` with the steps in question traced; see `Loop.advance`.

        The last one returns when it has been computed.

        Raises:
          UserError: the folder cannot be written.
        """

        def advance_traced(state: Any, step: int) -> Any:
            if self.first <= step <= self.last and not self._tracing:
                self._start()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                result = advance(state, step)
            if step == self.last:
                jax.block_until_ready(result)
                self._stop()
            return result

        return advance_traced

    def _start(self) -> None:
        with errors_told(f"cannot write in {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
        jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
        self._tracing = True

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
