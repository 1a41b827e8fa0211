"""Files that start a run on a cluster: made here, and given to the cluster's own tool.

Each has the environment from which the processes find each other (`lmjax.launch.cluster`), and
starts anew what another process has taken with it: the same command goes on from the last
checkpoint. A mistake in the settings (exit code 2) is not tried again.
"""

from __future__ import annotations

import abc
import math
import re
import shlex
from collections.abc import Sequence
from typing import Any

from lmjax.config import UserError, config
from lmjax.launch.yaml_text import yaml_text

PORT = 61500  # of the first process
MISTAKE = 2  # exit code of a user's mistake, which no restart mends
STOPPED = "130|143"  # those of Ctrl-C and SIGTERM, after which a run has saved
TPUS = {  # of Kubernetes on Google's cloud
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
CHIPS = 4  # of a host in a slice of several


@config
class JobFile(abc.ABC):
    """Settings of all files. Further settings are the experiment's."""

    experiment: str = ""  # module that is run, such as experiments.gpt2_124m
    name: str = ""  # of the job; none: the experiment's
    restarts: int = 20  # how often the run is started anew after a failure
    python: str = "python"  # command that has lmjax installed

    def validate(self) -> None:
        """Raises UserError for a name or a number that cannot be."""
        if self.name and not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise UserError(
                f"name={self.name}: up to 40 small letters, digits and hyphens, a letter first"
            )
        for setting in ("restarts", "hosts", "slices"):
            lowest = 0 if setting == "restarts" else 1
            if getattr(self, setting, 1) < lowest:
                raise UserError(f"{setting}={getattr(self, setting)}: it must be {lowest} or more")

    @property
    def job(self) -> str:
        """Name of the job."""
        short = self.experiment.rpartition(".")[2].lower().replace("_", "-")
        return self.name or re.sub(r"[^a-z0-9-]", "", short)[:40].strip("-") or "lmjax"

    @abc.abstractmethod
    def text(self, words: Sequence[str]) -> str:
        """The file.

        Args:
          words: settings of the experiment.

        Raises:
          UserError: a setting that is needed was not given.
        """

    def command(self, words: Sequence[str]) -> list[str]:
        """The command of each process."""
        return [*shlex.split(self.python), "-m", self.experiment, *words]

    def need(self, *names: str) -> None:
        """Raises UserError where one of these settings is empty."""
        for name in names:
            if not getattr(self, name):
                raise UserError(f"{name}: give it, as in {name}={self.examples()[name]}")

    def examples(self) -> dict[str, str]:
        """Values that settings may have."""
        return {"image": "europe-docker.pkg.dev/PROJECT/lmjax/lmjax:1", "zone": "us-central2-b"}


@config
class SlurmFile(JobFile):
    """A batch script for Slurm: `sbatch FILE`. One process on each node, with all of its GPUs."""

    hosts: int = 1  # nodes
    gpus: int = 8  # of each node; 0: a CPU run
    cpus: int | None = None  # cores of each node for the run; none: Slurm's default
    time: str = "24:00:00"  # limit of the job; five minutes before it the run saves and stops
    partition: str = ""  # of the cluster
    account: str = ""  # that pays
    folder: str = ""  # in which the command is run; none: that of sbatch

    def text(self, words: Sequence[str]) -> str:
        """See `JobFile.text`."""
        options = {
            "job-name": self.job,
            "nodes": self.hosts,
            "ntasks-per-node": 1,
            "gpus-per-node": self.gpus or None,
            "cpus-per-task": self.cpus,
            "time": self.time,
            "partition": self.partition or None,
            "account": self.account or None,
            "output": "%x-%j.out",
            "open-mode": "append",
            "signal": "TERM@300",
        }
        lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value]
        folder = [f"cd {shlex.quote(self.folder)}"] if self.folder else []
        command = f"srun --kill-on-bad-exit=0 {shlex.join(self.command(words))}"
        body = [*folder, *attempts(command, self.restarts, requeue=True)]
        return "\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue", "", "set -u", *body, ""])


@config
class JobSetFile(JobFile):
    """A JobSet for Kubernetes: `kubectl apply -f FILE`. One pod on each host."""

    image: str = ""  # container with lmjax and the experiments
    hosts: int = 1  # pods, of a cluster of GPUs or CPUs
    gpus: int = 8  # of each pod; 0: none
    tpu: str = ""  # instead of GPUs: kind and shape of a slice, such as v4:2x2x4
    slices: int = 1  # of TPUs
    namespace: str = ""  # of the cluster; none: kubectl's
    cpu: str = ""  # cores that a pod asks for
    memory: str = ""  # that a pod asks for, such as 200Gi

    def text(self, words: Sequence[str]) -> str:
        """See `JobFile.text`."""
        self.need("image")
        chips, selector = self.chips()
        hosts = max(1, math.prod(chips) // CHIPS) if chips else self.hosts
        annotations = {}
        if chips:
            annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = (
                "cloud.google.com/gke-nodepool"
            )
        template = {
            "parallelism": hosts,
            "completions": hosts,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [MISTAKE]}}
                ]
            },
            "template": {"spec": self.pod(words, chips, selector, hosts)},
        }
        whole = {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": _given(
                {"name": self.job, "namespace": self.namespace, "annotations": annotations}
            ),
            "spec": {
                "network": {"enableDNSHostnames": True, "subdomain": self.job},
                "failurePolicy": {
                    "maxRestarts": self.restarts,
                    "rules": [
                        {
                            "name": "mistakes",
                            "action": "FailJobSet",
                            "onJobFailureReasons": ["PodFailurePolicy"],
                        }
                    ],
                },
                "replicatedJobs": [
                    {
                        "name": "workers",
                        "replicas": self.slices if chips else 1,
                        "template": {"spec": template},
                    }
                ],
            },
        }
        return yaml_text(whole)

    def chips(self) -> tuple[tuple[int, ...], dict[str, str]]:
        """Shape of a slice, empty where there are no TPUs, and labels of its nodes."""
        if not self.tpu:
            if self.slices > 1:
                raise UserError(f"slices={self.slices}: only TPUs have slices (tpu=v4:2x2x4)")
            return (), {}
        kind, _, shape = self.tpu.partition(":")
        if kind not in TPUS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
            raise UserError(
                f"tpu={self.tpu}: give one of {', '.join(TPUS)} and the shape of a slice, as in "
                "v4:2x2x4"
            )
        labels = {
            "cloud.google.com/gke-tpu-accelerator": TPUS[kind],
            "cloud.google.com/gke-tpu-topology": shape,
        }
        return tuple(map(int, shape.split("x"))), labels

    def pod(
        self, words: Sequence[str], chips: Sequence[int], selector: dict[str, str], hosts: int
    ) -> dict[str, Any]:
        """The pod of each host."""
        # TPUs' pods are told by the cluster who the others are.
        first = f"{self.job}-workers-0-0.{self.job}:{PORT}"
        several = {"JAX_COORDINATOR_ADDRESS": first, "JAX_NUM_PROCESSES": str(hosts)}
        environment = {} if chips or hosts == 1 else several
        devices = {"google.com/tpu": min(CHIPS, math.prod(chips))} if chips else {}
        if not chips and self.gpus:
            devices = {"nvidia.com/gpu": self.gpus}
        container = {
            "name": "lmjax",
            "image": self.image,
            "command": self.command(words),
            "env": [{"name": name, "value": value} for name, value in environment.items()],
            "ports": [{"containerPort": port} for port in (PORT, PORT + 1)] if environment else [],
            "resources": _given(
                {
                    "requests": _given({"cpu": self.cpu, "memory": self.memory}),
                    "limits": devices,
                }
            ),
        }
        return _given(
            {"restartPolicy": "Never", "nodeSelector": selector, "containers": [_given(container)]}
        )


@config
class TpuVmFile(JobFile):
    """A script for Cloud TPU VMs, run where gcloud is: `bash FILE`. It makes them if need be."""

    type: str = "v4-32"  # of the TPU, as Google names it
    slices: int = 1  # of it
    zone: str = ""  # of the data centre
    version: str = "tpu-ubuntu2204-base"  # of the machines' software
    spot: bool = False  # cheaper machines that may be taken away

    def text(self, words: Sequence[str]) -> str:
        """See `JobFile.text`."""
        self.need("zone")
        run = shlex.join(["env", *self.command(words)])
        uv = "~/.local/bin/uv"  # which brings a newer Python than the machines have
        install = (
            f"cd lmjax && pip install -q uv && {uv} venv -q --python 3.12 .venv && "
            f"{uv} pip install -q -e '.[tpu,gcs]'"
        )
        inside = f'cd lmjax && PATH="$PWD/.venv/bin:$PATH" {run}'
        where = f"{self.job} --zone={shlex.quote(self.zone)}"
        group = "queued-resources" if self.slices > 1 else "tpu-vm"
        tool = f"gcloud{' alpha' if self.slices > 1 else ''} compute tpus {group}"
        every = "--worker=all" + (" --node=all" if self.slices > 1 else "")
        return "\n".join(
            [
                "#!/bin/bash",
                "# Run it in the folder of lmjax, which is copied to the machines.",
                "set -u",
                f"{tool} describe {where} > /dev/null 2>&1 || {self.creation(tool, where)} || exit",
                f"{tool} scp --recurse . {self.job}:lmjax {every} "
                f"--zone={shlex.quote(self.zone)} || exit",
                f"{tool} ssh {where} {every} --command={shlex.quote(install)} || exit",
                *attempts(
                    f"{tool} ssh {where} {every} --command={shlex.quote(inside)}", self.restarts
                ),
                "",
            ]
        )

    def creation(self, tool: str, where: str) -> str:
        """The command that makes the machines."""
        spot = " --spot" if self.spot else ""
        kind, version = shlex.quote(self.type), shlex.quote(self.version)
        common = f"--accelerator-type={kind}{spot}"
        if self.slices == 1:
            return f"{tool} create {where} {common} --version={version}"
        return (
            f"{tool} create {where} {common} --runtime-version={version} "
            f"--node-count={self.slices} --node-prefix={self.job}"
        )


FILES = {"slurm": SlurmFile, "jobset": JobSetFile, "tpu_vm": TpuVmFile}


def attempts(command: str, restarts: int, requeue: bool = False) -> list[str]:
    """Lines that run a command, and run it again where it failed and that may help.

    Args:
      command: of bash.
      restarts: how often at most.
      requeue: whether the job goes back into Slurm's queue where the time is up.
    """
    stopped = 'scontrol requeue "$SLURM_JOB_ID"; exit' if requeue else 'exit "$code"'
    return [
        f"for attempt in $(seq 0 {restarts}); do",
        f"    {command}",
        "    code=$?",
        '    case "$code" in',
        f'        0|{MISTAKE}) exit "$code" ;;',
        f"        {STOPPED}) {stopped} ;;  # it has saved",
        "    esac",
        '    echo "Exit code $code: starting again from the last checkpoint." >&2',
        "    sleep 10",
        "done",
        'exit "$code"',
    ]


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Those that are not empty."""
    return {name: value for name, value in settings.items() if value}
