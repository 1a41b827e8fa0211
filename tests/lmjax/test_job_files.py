"""Files that start a run on a cluster: what they say, and what bash and YAML make of it."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from lmjax.config import UserError
from lmjax.launch.__main__ import job_file
from lmjax.launch.cluster import ProcessGroup, find_cluster
from lmjax.launch.job_files import MISTAKE, attempts
from lmjax.launch.watch import LOST
from lmjax.launch.yaml_text import yaml_text

EXPERIMENT = ["experiments.debug", "steps=9", "output=/shared/a run"]
RUN = ["python", "-m", *EXPERIMENT]
GPUS = ["jobset", *EXPERIMENT, "image=registry/lmjax:1", "hosts=4"]
TPUS = ["jobset", *EXPERIMENT, "image=registry/lmjax:1", "tpu=v4:2x2x4", "slices=2"]


def check_with_bash(text: str) -> None:
    found = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert (found.returncode, found.stderr) == (0, "")


def test_slurm():
    """One task on each node with all of its devices; the command is that of the experiment."""
    text = job_file(["slurm", *EXPERIMENT, "hosts=4", "gpus=8", "partition=a100", "time=2:00:00"])
    check_with_bash(text)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.M))
    assert text.startswith("#!/bin/bash\n#SBATCH")
    assert options == {
        "job-name": "debug",
        "nodes": "4",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "time": "2:00:00",
        "partition": "a100",
        "output": "%x-%j.out",
        "open-mode": "append",
        "signal": "TERM@300",
    }
    [line] = re.findall(r"^ *(srun .*)$", text, re.M)
    assert shlex.split(line) == ["srun", "--kill-on-bad-exit=0", *RUN]


@pytest.mark.parametrize(
    ("codes", "runs", "end"),
    [
        ([0], 1, 0),
        ([MISTAKE], 1, MISTAKE),
        ([LOST, 137, 0], 3, 0),
        ([1, 1, 1, 1, 1], 4, 1),  # three restarts
        ([143], 1, 143),
    ],
)
def test_a_run_is_started_again_where_that_may_help(tmp_path, codes, runs, end):
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    (tmp_path / "sleep").write_text("#!/bin/bash\n")
    (tmp_path / "run").write_text(
        '#!/bin/bash\necho run >> done\ncode=$(head -1 codes)\nsed -i 1d codes\nexit "$code"\n'
    )
    for name in ("sleep", "run"):
        (tmp_path / name).chmod(0o755)
    found = subprocess.run(
        ["bash"],
        input="\n".join(attempts("run", 3)),
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stderr=subprocess.DEVNULL,
    )
    assert (found.returncode, len((tmp_path / "done").read_text().split())) == (end, runs)


def workers(text: str) -> tuple[dict, dict, dict]:
    """A JobSet, its replicated job, and its container."""
    made = yaml.safe_load(text)
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [replicated] = made["spec"]["replicatedJobs"]
    [container] = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return made, replicated, container


def test_jobset_of_gpus():
    """Its pods find each other by the variables that it sets and the index that Kubernetes does."""
    made, replicated, container = workers(job_file(GPUS))
    job = replicated["template"]["spec"]
    assert made["metadata"] == {"name": "debug"}
    assert made["spec"]["network"] == {"enableDNSHostnames": True, "subdomain": "debug"}
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (1, 4, 4)
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    assert container["command"] == RUN
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    environment = {one["name"]: one["value"] for one in container["env"]}
    stands = find_cluster(environment | {"JOB_COMPLETION_INDEX": "3"})
    # A pod of a JobSet is JOBSET-REPLICATED-JOB-POD, under the subdomain.
    assert stands == ProcessGroup("debug-workers-0-0.debug:61500", 4, 3)
    assert [port["containerPort"] for port in container["ports"]] == [61500, 61501]


def test_jobset_of_tpus():
    """A job for each slice; its pods are told by the cluster who they are."""
    made, replicated, container = workers(job_file(TPUS))
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"]) == (2, 4)  # four chips a host
    assert job["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v4-podslice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert "env" not in container
    assert list(made["metadata"]["annotations"].values()) == ["cloud.google.com/gke-nodepool"]


def test_mistakes_end_a_jobset_and_other_failures_restart_it():
    made, replicated, _ = workers(job_file([*GPUS, "restarts=7"]))
    policy = made["spec"]["failurePolicy"]
    [rule] = replicated["template"]["spec"]["podFailurePolicy"]["rules"]
    assert policy["maxRestarts"] == 7
    assert rule == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


@pytest.mark.parametrize("slices", [1, 2])
def test_tpu_vms(slices, tmp_path):
    """With a gcloud that notes its calls: machines are made, lmjax is brought there and run."""
    words = ["tpu_vm", *EXPERIMENT, "type=v4-32", "zone=us-central2-b", f"slices={slices}"]
    text = job_file(words)
    check_with_bash(text)
    tool = tmp_path / "gcloud"
    tool.write_text(
        '#!/bin/bash\nprintf \'%s\\n\' "$*" >> calls\ncase "$*" in *describe*) exit 1 ;; esac\n'
    )
    tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    found = subprocess.run(["bash"], input=text, text=True, cwd=tmp_path, env=environment)
    assert found.returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    group = "alpha compute tpus queued-resources" if slices > 1 else "compute tpus tpu-vm"
    assert [call.removeprefix(f"{group} ").split()[0] for call in calls] == [
        *("describe", "create", "scp", "ssh", "ssh")
    ]
    assert ("--node-count=2" in calls[1]) == (slices == 2) and "--type=v4-32" not in calls[1]
    inside = shlex.split(calls[-1].partition("--command=")[2])
    assert inside[-len(RUN) :] == RUN


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the first word is the kind of file, one of slurm, jobset, tpu_vm"),
        (["slurms", "experiments.debug"], "it is 'slurms'"),
        (["slurm"], "Which experiment"),
        (["slurm", "experiments.debugg"], "near are experiments.debug"),
        (["slurm", "experiments.debug", "hosts=0"], "hosts=0: it must be 1 or more"),
        (["slurm", "experiments.debug", "stepz=3"], "there is no setting stepz"),
        (["slurm", "experiments.debug", "name=A b"], "name=A b: up to 40 small letters"),
        (["jobset", "experiments.debug"], "image: give it"),
        ([*GPUS, "slices=2"], "only TPUs have slices"),
        ([*GPUS, "tpu=v9:2x2"], "tpu=v9:2x2: give one of v4, v5e"),
        (["tpu_vm", "experiments.debug"], "zone: give it, as in zone=us-central2-b"),
    ],
)
def test_mistakes_are_told(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        job_file(words)


def test_the_command(capsys):
    found = subprocess.run(
        [sys.executable, "-m", "lmjax.launch", "--help"], capture_output=True, text=True
    )
    assert found.returncode == 0 and "Kinds of files: slurm, jobset, tpu_vm" in found.stdout


@pytest.mark.parametrize(
    "value",
    [
        {"a": {"b": [1, 2.5, True, None, "x"], "c": []}, "d": [{"e": "f", "g": ["h"]}, [["i"]]]},
        {"words": ["yes", "null", "1", "1.5", "- a", "a: b", "a#b", "", " a", "é", "a\nb", "0x1"]},
        {"on": "off", "1": "~", "steps=9": "*.py", "!a": "&b"},
    ],
)
def test_yaml_is_read_back_as_it_was(value):
    assert yaml.safe_load(yaml_text(value)) == value
