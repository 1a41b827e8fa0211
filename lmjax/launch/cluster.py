"""The processes of a run, as the environment of one of them tells: where the first is, how many.

| started by | what is read |
|---|---|
| anything | JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES, JAX_PROCESS_ID |
| Slurm's `srun` | SLURM_... of the job step |
| Open MPI's `mpirun` | OMPI_COMM_WORLD_..., and where `mpirun` itself is (version 4) |
| Kubernetes, indexed jobs | JOB_COMPLETION_INDEX, beside the first two of the first line |
| GKE, on TPUs | TPU_WORKER_HOSTNAMES, TPU_WORKER_ID; MEGASCALE_... of several slices |
| Cloud TPU VMs | the metadata server of the machine |

A variable of the first line goes before what the scheduler says. LMJAX_MULTIHOST=0 keeps a process
alone, and LMJAX_MULTIHOST=1 asks the metadata server where no TPU was seen.
"""

from __future__ import annotations

import dataclasses
import re
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from lmjax.config import UserError

PORT = 8482  # of the first process on TPUs
PORTS = range(61440, 65534)  # from which jobs that share machines take theirs
METADATA_PATIENCE = 3.0  # seconds; it is a link-local address
Environment = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """Position of a process among those of its run.

    Attributes:
      address: host:port of the first process.
      count: number of processes.
      index: of this one, from 0.
      devices: numbers of the devices on this machine that are this process's; None: all of them.
    """

    address: str
    count: int
    index: int
    devices: tuple[int, ...] | None = None


def find_cluster(environment: Environment) -> ProcessGroup | None:
    """The processes of the run; None where this one is alone.

    Raises:
      UserError: what the environment says is incomplete, or no number, or out of range.
    """
    if environment.get("LMJAX_MULTIHOST") == "0":
        return None
    found = None
    for find in (_slurm, _open_mpi, _kubernetes, _gke_tpu, _cloud_tpu):
        found = found or find(environment)
    found = {**(found or {}), **_given(environment)}
    if "address" not in found and int(found.get("count", 1)) == 1:
        return None
    return _checked(found)


def _given(environment: Environment) -> dict:
    """Settings in JAX's own variables."""
    found = {}
    if address := environment.get("JAX_COORDINATOR_ADDRESS"):
        found["address"] = address
        for name, key in (("JAX_NUM_PROCESSES", "count"), ("JAX_PROCESS_ID", "index")):
            if name in environment:
                found[key] = environment[name]
    if devices := environment.get("JAX_LOCAL_DEVICE_IDS"):
        found["devices"] = tuple(map(int, devices.split(",")))
    return found if "address" in found else {}


def _checked(found: dict) -> ProcessGroup:
    """The cluster of what was found; UserError where something is missing or cannot be."""
    names = {"count": "JAX_NUM_PROCESSES", "index": "JAX_PROCESS_ID"}
    for key, name in names.items():
        given = found.get(key)
        if given is None or not str(given).isdecimal():
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS is set, so {name} must be a whole number; it is "
                + ("not set" if given is None else repr(given))
            )
    address, count, index = found.get("address"), int(found["count"]), int(found["index"])
    if address is None:
        raise UserError(
            f"this is process {index} of {count}, and nothing says where the first one is: set "
            "JAX_COORDINATOR_ADDRESS to its host:port, as in mpirun -x "
            "JAX_COORDINATOR_ADDRESS=$(hostname):61500"
        )
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={address}: give the host and a free port of the first "
            "process, as in node1:61500"
        )
    if not 0 <= index < count:
        raise UserError(f"JAX_PROCESS_ID={index}: with {count} processes it is 0 to {count - 1}")
    return ProcessGroup(address, count, index, found.get("devices"))


def _port(environment: Environment, job: str) -> int:
    """The port of a job: the same in all its processes, and most likely not another job's."""
    if given := environment.get("JAX_COORDINATOR_PORT"):
        return int(given)
    return PORTS[zlib.crc32(job.encode()) % len(PORTS)]


def _slurm(environment: Environment) -> dict | None:
    """The job step of `srun`; a shell in an allocation is alone, and so is a step of one task."""
    count = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if count == "1":
        return None
    job = f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}"
    found = {"count": count, "index": environment.get("SLURM_PROCID")}
    if nodes := environment.get("SLURM_STEP_NODELIST"):
        found["address"] = f"{first_node(nodes)}:{_port(environment, job)}"
    # With several tasks on a node each has one device, unless Slurm shows each its own alone.
    alone = environment.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1"
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if not alone and "," in visible and "SLURM_LOCALID" in environment:
        found["devices"] = (int(environment["SLURM_LOCALID"]),)
    return found


def first_node(nodes: str) -> str:
    """The first host of Slurm's list, such as node1 of node1,node2 and node007 of node[007-009]."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return head.partition(",")[0]
    inside, _, tail = rest.partition("]")
    return head + re.split("[,-]", inside, maxsplit=1)[0] + tail.partition(",")[0]


def _open_mpi(environment: Environment) -> dict | None:
    """The processes of `mpirun`."""
    count = environment.get("OMPI_COMM_WORLD_SIZE", "1")
    if count == "1":
        return None
    found = {"count": count, "index": environment.get("OMPI_COMM_WORLD_RANK")}
    here = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    job = uri.partition(";")[0] or environment.get("PMIX_NAMESPACE", "")
    if here == count:
        found["address"] = f"localhost:{_port(environment, job)}"
    elif where := re.search(r"tcp://([^,:]+)", uri):
        # `mpirun` is where the first process is, unless its list of hosts leaves its own out.
        found["address"] = f"{where[1]}:{_port(environment, job)}"
    if here != "1" and "," in environment.get("CUDA_VISIBLE_DEVICES", ""):
        found["devices"] = (int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")),)
    return found


def _kubernetes(environment: Environment) -> dict | None:
    """A pod of an indexed job whose file says where its first pod is, as `lmjax.launch` writes."""
    if "JOB_COMPLETION_INDEX" not in environment or "TPU_WORKER_HOSTNAMES" in environment:
        return None
    return {"index": environment["JOB_COMPLETION_INDEX"]}


def _gke_tpu(environment: Environment) -> dict | None:
    """A pod on TPUs, of one slice or several."""
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    slices = environment.get("MEGASCALE_NUM_SLICES", "1")
    if hosts == [""] or (len(hosts) == 1 and slices == "1"):
        return None
    return _of_slices(hosts, environment.get("TPU_WORKER_ID"), environment.get)


def _of_slices(hosts: list[str], worker: str | None, value: Callable[[str], str | None]) -> dict:
    """The processes of all slices, those of the first slice first.

    Args:
      hosts: of this slice.
      worker: number of this host in it.
      value: name -> variable of Megascale, which joins slices.
    """
    slices, number = value("MEGASCALE_NUM_SLICES") or "1", value("MEGASCALE_SLICE_ID") or "0"
    first = (value("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).partition(":")[0]
    if not (slices.isdecimal() and number.isdecimal() and (worker or "0").isdecimal()):
        raise UserError(
            f"MEGASCALE_NUM_SLICES={slices}, MEGASCALE_SLICE_ID={number}, TPU_WORKER_ID={worker}: "
            "they must be whole numbers"
        )
    index = int(number) * len(hosts) + int(worker or 0)
    return {
        "address": f"{first}:{value('JAX_COORDINATOR_PORT') or PORT}",
        "count": int(slices) * len(hosts),
        "index": index,
    }


def _cloud_tpu(environment: Environment) -> dict | None:
    """A host of a Cloud TPU pod, as the metadata server knows it."""
    asked = environment.get("LMJAX_MULTIHOST", "0") != "0"
    if not asked:
        if environment.get("JAX_PLATFORMS", "tpu").partition(",")[0] not in ("", "tpu"):
            return None
        if "TPU_SKIP_MDS_QUERY" in environment or "TPU_WORKER_HOSTNAMES" in environment:
            return None
        if "JAX_COORDINATOR_ADDRESS" in environment or not _sees_tpu():
            return None
    try:
        workers = _metadata(environment, "worker-network-endpoints")
        worker = _metadata(environment, "agent-worker-number")
        lines = _metadata(environment, "tpu-env").split("\n")
    except OSError as error:
        if asked:
            raise UserError(
                f"LMJAX_MULTIHOST=1: no metadata server of a Cloud TPU VM answers ({error})"
            ) from None
        return None  # a TPU that is no Cloud TPU VM, such as that of a notebook's host
    # Either a list of hosts, or one of name:number:address.
    hosts = [entry.strip().split(":")[-1] for entry in workers.split(",")]
    settings = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {name.strip(): value.strip(" '\r") for name, value in settings.items()}
    if len(hosts) == 1 and values.get("MEGASCALE_NUM_SLICES", "1") == "1":
        return None
    return _of_slices(hosts, worker.strip(), lambda name: environment.get(name) or values.get(name))


def _sees_tpu() -> bool:
    """Returns whether the system shows TPU chips, as all Cloud TPU VMs do."""
    return Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()


def _metadata(environment: Environment, name: str) -> str:
    """An attribute of this machine; OSError where there is none."""
    host = environment.get("GCE_METADATA_HOST", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=METADATA_PATIENCE) as answer:
        return answer.read().decode()
