"""Pallas' GPU interpreter, which compiles a kernel once where it would for each of its threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import jax

from pallas_kernels.attention.hopper.compat import interpreter_params
from pallas_kernels.target import interpreted


@contextlib.contextmanager
def hopper_interpreted(monkeypatch, **parameters):
    """Kernels that are traced inside are those for an H100 and run on the CPU."""
    from jax._src.pallas.mosaic.interpret import thread_map

    # Both versions compile for every thread of every point of the grid: ten seconds, not one tenth.
    monkeypatch.setattr(thread_map, "_run_jaxpr", _Runner().run)
    with interpreted("NVIDIA H100 80GB HBM3", interpreter_params(**parameters)):
        yield


def races_found(run: Callable[[], object]) -> bool:
    """Returns whether `run`, interpreted to detect races, has accesses that nothing orders."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call

    try:
        run()
    except jax.errors.JaxRuntimeError as error:  # jax 0.12 stops at the first one
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        if "race" not in str(error).lower():
            raise
        return True
    return gpu_callbacks.get_races().races_found


class _Runner:
    def __init__(self) -> None:
        self._compiled, self._lock = {}, threading.Lock()

    def run(self, jaxpr, consts, *arguments) -> None:
        with self._lock:
            if id(jaxpr) not in self._compiled:

                def evaluate(consts, *arguments):
                    jax.core.eval_jaxpr(jaxpr, consts, *arguments)

                program = jax.jit(evaluate).lower(consts, *arguments).compile()
                self._compiled[id(jaxpr)] = jaxpr, program  # the jaxpr keeps its id
        self._compiled[id(jaxpr)][1](consts, *arguments)
