"""From the command line to a running experiment: exit codes, messages, help, several processes.

The toy program runs in processes of its own, as a user would start it.
"""

import errno
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lmjax.launch import exit_on_user_error

ROOT = Path(__file__).parents[2]
NOT_INHERITED = {"XLA_FLAGS", "NO_COLOR", "GLIBC_TUNABLES", "JAX_NUM_CPU_DEVICES", "PJRT_NPROC"}
PROGRAM = '''"""A toy program.

It costs nothing.
"""

import errno
import os
import resource
import sys
import types

from lmjax.config import UserError, config
from lmjax.launch import run

sys.modules["IPython"] = types.ModuleType("IPython")  # libraries import it where it is installed


@config
class Program:
    """What the toy does."""

    do: str = "nothing"  # what to do
    times: int = 1  # how often

    def run(self) -> None:
        if self.do == "import":
            print("jax" in sys.modules)
        if self.do == "memory":
            def faults():
                return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

            for _ in range(2):
                before = faults()
                for _ in range(20):
                    b"x" * (64 << 20)
            print(faults() - before, os.getpid())
        if self.do == "mistake":
            raise UserError("the corpus is empty")
        if self.do == "bug":
            raise ValueError("a bug")
        if self.do == "interrupt":
            raise KeyboardInterrupt
        if self.do == "full":
            raise OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")
        if self.do == "print":
            for _ in range(self.times):
                print("x" * 1000)
        if self.do == "devices":
            import jax

            print(jax.process_index(), jax.process_count(), jax.local_device_count())
        if self.do == "programs":
            print(float(many_programs(self.times)))


def many_programs(times):
    """Two programs that sum over two devices, and small ones that are dispatched meanwhile."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec as P

    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("x"))

    def sums(x):
        return jax.lax.fori_loop(0, 100, lambda _, x: jax.lax.psum(x @ x, "x") / 512, x)

    sums = jax.shard_map(sums, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    sums = jax.jit(sums)
    mean = jax.jit(lambda x: x.mean(), out_shardings=whole)
    add = jax.jit(lambda x: x + 1)
    ones = jax.device_put(jax.numpy.ones((512, 256)), rows)
    for _ in range(10):
        x = mean(sums(ones))
        for _ in range(times):
            x = add(x)
        x.block_until_ready()
    return x


experiment = Program()

if __name__ == "__main__":
    run(experiment)
'''


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts `python -m toy_program ARGUMENTS` and returns the process."""
    folder = tmp_path_factory.mktemp("program")
    (folder / "toy_program.py").write_text(PROGRAM)

    def start(*arguments: str, **environment: str) -> subprocess.Popen:
        inherited = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
        return subprocess.Popen(
            [sys.executable, "-m", "toy_program", *arguments],
            cwd=folder,
            env=inherited | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def outcome(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_a_run_with_a_setting_does_not_need_jax_before_the_experiment_does(start):
    assert outcome(start("do=import")) == (0, "False\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no glibc to tell")
def test_memory_is_kept_unless_the_user_says_otherwise(start):
    """A buffer of 64 MiB that is made again and again costs page faults once; in one process."""
    process = start("do=memory")
    code, out, _ = outcome(process)
    faults, process_id = map(int, out.split())
    assert (code, process_id) == (0, process.pid) and faults < 1000
    faults, _ = map(
        int, outcome(start("do=memory", GLIBC_TUNABLES="glibc.malloc.tcache_count=7"))[1].split()
    )
    assert faults > 20 * 1000  # as ever: each time all of its pages, if not huge ones


def test_help(start):
    code, out, err = outcome(start("--help", "do=bug"))
    assert (code, err) == (0, "")
    assert out.startswith("A toy program.\n\nIt costs nothing.\n\nUsage: python -m toy_program [")
    assert re.search(r"^  times: int = 1 +how often$", out, re.M)


@pytest.mark.parametrize(
    ("argument", "code", "message"),
    [
        ("dou=3", 2, "there is no setting dou; did you mean do?\n"),
        ("do=mistake", 2, "the corpus is empty\n"),
        ("do=interrupt", 130, "Interrupted.\n"),
        ("do=full", 2, "The disk is full while writing runs/x/metrics.jsonl: free some space"),
    ],
)
def test_foreseeable_ends_have_a_message_and_no_traceback(start, argument, code, message):
    found, out, err = outcome(start(argument))
    assert found == code and out == ""
    assert err.startswith(message) and err.count("\n") == 1


def test_a_bug_keeps_its_traceback(start):
    code, _, err = outcome(start("do=bug"))
    assert code == 1 and err.startswith("Traceback") and "ValueError: a bug" in err


def test_a_reader_who_leaves_is_no_error(start):
    process = start("do=print", "times=10000")
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""


def test_simulated_devices(start):
    assert outcome(start("do=devices", JAX_NUM_CPU_DEVICES="3"))[:2] == (0, "0 1 3\n")


@pytest.mark.parametrize(
    "devices",
    [
        {"JAX_NUM_CPU_DEVICES": "2"},
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    ],
    ids=["setting", "flag"],
)
def test_small_programs_behind_a_collective_do_not_keep_it_from_its_threads(start, devices):
    """More than XLA holds for a device: with two threads the collective never ends."""
    assert outcome(start("do=programs", "times=100", **devices))[:2] == (0, "101.0\n")


def test_two_processes_are_one_run(start):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    processes = [
        start(
            "do=devices",
            JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(number),
            JAX_NUM_CPU_DEVICES="1",
        )
        for number in range(2)
    ]
    assert [outcome(process)[:2] for process in processes] == [(0, "0 2 1\n"), (0, "1 2 1\n")]


def test_a_full_disk_is_recognised_below_other_errors(capsys):
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("the checkpoint could not be written") from error
    assert caught.value.code == 2 and "The disk is full: free" in capsys.readouterr().err


def test_a_broken_pipe_to_something_else_is_no_quiet_end():
    with pytest.raises(BrokenPipeError), exit_on_user_error():
        raise BrokenPipeError  # a worker's pipe, while our own reader is still there
