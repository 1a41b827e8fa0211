"""Several processes that form one run: the hosts of a pod, the tasks of a cluster.

They are one run when the environment says that there are several (`lmjax.launch.cluster`): TPU
pods, Slurm, Open MPI and Kubernetes by themselves; anywhere else set JAX_COORDINATOR_ADDRESS
(host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID. They watch over each other
at the port after that one (`lmjax.launch.watch`).

JAX reads its own settings from the environment as always, for instance JAX_PLATFORMS, or
JAX_NUM_CPU_DEVICES=8 for eight simulated devices.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TextIO

from lmjax.config import UserError
from lmjax.launch.cluster import find_cluster
from lmjax.launch.together import begin_watch
from lmjax.launch.watch import COMING, SILENCE

if TYPE_CHECKING:
    import numpy as np

THREADS = 8  # for each CPU device; each program that is under way holds one at most


def join_processes(environment: Mapping[str, str]) -> None:
    """Connects this process with the others of the run, if the environment says there are any.

    Also gives XLA the threads that several CPU devices need (`give_threads`).

    Raises:
        UserError: what the environment says of them is incomplete, or no number.
    """
    cluster = find_cluster(environment)
    give_threads(environment)
    if cluster is None:
        return
    import jax  # not needed for --help or a mistyped setting, so not imported before

    _keep_stdout_clean()
    watch = begin_watch(cluster) if cluster.count > 1 else None
    jax.distributed.initialize(
        coordinator_address=cluster.address,
        num_processes=cluster.count,
        process_id=cluster.index,
        local_device_ids=cluster.devices,
        cluster_detection_method="deactivate",
        # JAX's own ends say nothing of who: the watch shall be first, in both cases.
        initialization_timeout=round(COMING) + 30,
        heartbeat_timeout_seconds=round(SILENCE) + 15,
    )
    if watch is not None:
        watch.join()


def give_threads(environment: Mapping[str, str]) -> None:
    """Has XLA use more threads than there are cores where there are many CPU devices for them.

    XLA starts and runs the programs of all of its CPU devices with the same threads, as many as
    there are cores or devices. Behind a collective, starts of later programs, of which 32 may wait
    for each device, can hold them all; the collective then waits for ever for a device that gets
    no thread.
    """
    flag = "--xla_force_host_platform_device_count="
    words = environment.get("XLA_FLAGS", "").split()
    given = [word.removeprefix(flag) for word in words if word.startswith(flag)]
    counts = [int(n) for n in (*given, environment.get("JAX_NUM_CPU_DEVICES", "1")) if n.isdigit()]
    threads = THREADS * max(counts, default=1)
    if threads > (os.cpu_count() or 1):
        os.environ.setdefault("PJRT_NPROC", str(threads))


def is_first() -> bool:
    """Returns whether this is the process that writes and prints for all of the run."""
    import jax

    return jax.process_index() == 0


def on_first(action: Callable[[], object]) -> None:
    """Calls `action` in the first process, while the others wait for its end.

    Raises:
        UserError: of the action; in the others one that says so.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    failure = None
    if is_first():
        try:
            action()
        except UserError as error:
            failure = error
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.int32(failure is not None))
        if failed and failure is None:
            failure = UserError("the first process has ended; it says why")
    if failure is not None:
        raise failure


def from_first(values: np.ndarray) -> np.ndarray:
    """An array of the first process, bit for bit, in all of them.

    Args:
        values: of this process, with the same shape and dtype in all of them.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return values
    # As bytes: what has 64 bits would be rounded on the devices.
    data = np.frombuffer(values.tobytes(), np.uint8)
    found = np.asarray(multihost_utils.broadcast_one_to_all(data)).astype(np.uint8)
    return np.frombuffer(found.tobytes(), values.dtype).reshape(values.shape)


def _keep_stdout_clean() -> None:
    """Sends to stderr what libraries in C++ print, so that stdout has what Python prints alone.

    XLA's Gloo announces the connections between processes on stdout, among the text of a model.
    """
    if not _is_file_1(sys.stdout):
        return  # a notebook, or a test that captures it
    python = os.fdopen(os.dup(1), "wb")
    sys.stdout.flush()
    os.dup2(2, 1)
    sys.stdout = io.TextIOWrapper(
        python, sys.stdout.encoding, sys.stdout.errors, line_buffering=sys.stdout.line_buffering
    )


def _is_file_1(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 1
    except (OSError, ValueError, AttributeError):
        return False
