"""From the command line to a running experiment.

An experiment file ends with

    if __name__ == "__main__":
        run(experiment)

Several processes (the hosts of a pod, the tasks of a cluster) form one run when the environment
says that there are several: Slurm's `srun`, Open MPI's `mpirun`, and Kubernetes and multi-slice
TPUs say so by themselves; anywhere else set JAX_COORDINATOR_ADDRESS (host:port of the first
process), JAX_NUM_PROCESSES and JAX_PROCESS_ID. On a plain Cloud TPU pod, whose hosts only the
metadata server knows, set LMJAX_MULTIHOST=1.

JAX reads its own settings from the environment as always, for instance JAX_PLATFORMS, or
JAX_NUM_CPU_DEVICES=8 for eight simulated devices.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lmjax.config import UserError, exit_on_user_error, from_command_line
from lmjax.config.memory import keep_memory


@runtime_checkable
class Experiment(Protocol):
    """A config that can be run."""

    def run(self) -> Any:
        """Does the work."""


def run(experiment: Experiment, argv: Sequence[str] | None = None) -> None:
    """Runs `experiment` with the settings of the command line, or prints its help.

    A mistake of the user ends with a message and exit code 2, Ctrl-C with 130 (see
    `lmjax.config.exit_on_user_error`).

    Args:
        experiment: a config with a method `run`.
        argv: settings such as `steps=100`; None takes those of this process.
    """
    with exit_on_user_error():
        experiment = from_command_line(experiment, argv)
        if argv is None:
            keep_memory()
        join_processes(os.environ)
        experiment.run()


def join_processes(environment: Mapping[str, str]) -> None:
    """Connects this process with the others of the run, if the environment says there are any.

    Raises:
        UserError: the JAX_... variables are incomplete or no numbers.
    """
    if "JAX_COORDINATOR_ADDRESS" in environment:
        arguments = {
            "coordinator_address": environment["JAX_COORDINATOR_ADDRESS"],
            "num_processes": _number(environment, "JAX_NUM_PROCESSES"),
            "process_id": _number(environment, "JAX_PROCESS_ID"),
        }
    elif _in_cluster(environment):
        arguments = {}  # JAX knows where this cluster keeps them
    else:
        return
    import jax  # not needed for --help or a mistyped setting, so not imported before

    jax.distributed.initialize(**arguments)


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several processes that a cluster started."""
    return (
        # Counts of the job step: an interactive shell in an allocation is alone.
        environment.get("SLURM_STEP_NUM_TASKS", "1") != "1"
        or environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1"
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
        or environment.get("LMJAX_MULTIHOST", "0") != "0"
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    given = environment.get(name)
    if given is None or not given.isdecimal():
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS is set, so {name} must be a whole number; it is "
            + ("not set" if given is None else repr(given))
        )
    return int(given)
