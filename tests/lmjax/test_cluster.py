"""Where a process stands among the others of its run, by what each scheduler says."""

import http.server
import threading

import pytest

from lmjax.config import UserError
from lmjax.launch import join_processes
from lmjax.launch.cluster import ProcessGroup, find_cluster, first_node

PLAIN = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "JAX_COORDINATOR_PORT": "61500",
}
EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "JAX_COORDINATOR_PORT": "61500"}
URI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
SLICES = {
    "TPU_WORKER_HOSTNAMES": "s1-0,s1-1",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "s0-0:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (PLAIN, ProcessGroup("a:1", 2, 0)),
        (PLAIN | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, ProcessGroup("a:1", 2, 0, (0, 1))),
        (PLAIN | {"LMJAX_MULTIHOST": "0"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # a shell in an allocation
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        (SLURM | EIGHT, ProcessGroup("gpu07:61500", 16, 9, (1,))),
        # Slurm shows each task a device of its own, or a node has one task: all that it sees.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, ProcessGroup("gpu07:61500", 16, 9)),
        (
            SLURM | EIGHT | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)"},
            ProcessGroup("gpu07:61500", 16, 9),
        ),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "b:5"}, ProcessGroup("b:5", 16, 9)),
        (MPI | URI, ProcessGroup("10.96.0.1:61500", 4, 3)),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, ProcessGroup("localhost:61500", 4, 3)),
        (MPI | {"JAX_COORDINATOR_ADDRESS": "b:5"}, ProcessGroup("b:5", 4, 3)),
        (PLAIN | {"JOB_COMPLETION_INDEX": "1"}, ProcessGroup("a:1", 2, 0)),
        (
            {k: v for k, v in PLAIN.items() if k != "JAX_PROCESS_ID"}
            | {"JOB_COMPLETION_INDEX": "1"},
            ProcessGroup("a:1", 2, 1),
        ),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, ProcessGroup("a:8482", 2, 1)),
        (SLICES, ProcessGroup("s0-0:8482", 4, 3)),
    ],
)
def test_schedulers_say_where_a_process_stands(environment, expected):
    assert find_cluster(environment) == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[007-015],host2", "node007"),
        ("node[1,4-5]", "node1"),
        ("host2,node[007-015]", "host2"),
        ("rack[1-2]-ib", "rack1-ib"),
    ],
)
def test_first_node_of_a_list_of_slurm(nodes, first):
    assert first_node(nodes) == first


def test_jobs_of_slurm_take_ports_of_their_own():
    """The same in all tasks of a step, and another one in the next job."""
    ports = set()
    for job in ("77", "78", "79"):
        environment = {**SLURM, "SLURM_JOB_ID": job}
        del environment["JAX_COORDINATOR_PORT"]
        found = {
            find_cluster(environment | {"SLURM_PROCID": str(index)}).address for index in range(16)
        }
        ports |= found
        assert len(found) == 1
    assert len(ports) == 3


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES must be a whole number; it is not"),
        (PLAIN | {"JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID must be a whole number; it is 'x'"),
        (PLAIN | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2: with 2 processes it is 0 to 1"),
        (PLAIN | {"JAX_COORDINATOR_ADDRESS": "a"}, "ADDRESS=a: give the host and a free port"),
        (MPI, "process 3 of 4, and nothing says where the first one is"),
        (SLICES | {"MEGASCALE_SLICE_ID": "b"}, "MEGASCALE_SLICE_ID=b"),
    ],
)
def test_an_environment_that_cannot_be_is_told(environment, message):
    with pytest.raises(UserError, match=message):
        find_cluster(environment)


@pytest.fixture
def metadata():
    """A metadata server as a Cloud TPU VM has one: its address, and the attributes that it has."""
    attributes = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = attributes.get(self.path.rpartition("/")[2])
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"GCE_METADATA_HOST": f"localhost:{server.server_port}"}, attributes
    server.shutdown()
    server.server_close()


@pytest.fixture
def tpu(monkeypatch):
    monkeypatch.setattr("lmjax.launch.cluster._sees_tpu", lambda: True)


def test_tpu_pods_join_by_themselves(metadata, tpu):
    """By the hosts that the machine's metadata name, in both of the forms they have had."""
    environment, attributes = metadata
    assert find_cluster(environment) is None  # a machine that the server knows no pod of
    attributes |= {"agent-worker-number": "1", "tpu-env": "ACCELERATOR_TYPE: 'v4-16'\n"}
    attributes["worker-network-endpoints"] = "x:0:10.0.0.2"
    assert find_cluster(environment) is None  # one host
    attributes["worker-network-endpoints"] = "x:0:10.0.0.2,y:1:10.0.0.3"
    assert find_cluster(environment) == ProcessGroup("10.0.0.2:8482", 2, 1)
    attributes["worker-network-endpoints"] = "10.0.0.2,10.0.0.3"
    assert find_cluster(environment) == ProcessGroup("10.0.0.2:8482", 2, 1)
    assert find_cluster(environment | {"JAX_PLATFORMS": "cpu"}) is None
    attributes["tpu-env"] = (
        "MEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '2'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9:8080'\n"
    )
    assert find_cluster(environment) == ProcessGroup("10.0.0.9:8482", 6, 5)


def test_metadata_are_asked_for_where_the_user_says_so(metadata):
    environment, attributes = metadata
    with pytest.raises(UserError, match="LMJAX_MULTIHOST=1: no metadata server"):
        find_cluster(environment | {"LMJAX_MULTIHOST": "1"})
    attributes |= {"agent-worker-number": "0", "tpu-env": "", "worker-network-endpoints": "a,b"}
    assert find_cluster(environment | {"LMJAX_MULTIHOST": "1"}) == ProcessGroup("a:8482", 2, 0)


def test_jax_is_told_what_was_found(monkeypatch):
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **given: calls.append(given))
    join_processes({})
    assert calls == []
    join_processes(PLAIN | {"JAX_NUM_PROCESSES": "1", "JAX_LOCAL_DEVICE_IDS": "0"})
    [given] = calls
    assert given["coordinator_address"] == "a:1"
    assert (given["num_processes"], given["process_id"]) == (1, 0)
    assert given["local_device_ids"] == (0,)
    # JAX would give each task of Slurm the device of its number, also where it sees one alone.
    assert given["cluster_detection_method"] == "deactivate"
