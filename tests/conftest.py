"""What all tests share: eight simulated devices, checked shapes, a cache of compiled programs."""

import contextlib
import gc
import importlib.metadata
import os

# Tracing and importing make many objects that stay: looking for garbage finds little, and takes
# a tenth of the time of all tests.
gc.set_threshold(50_000, 20, 20)
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("PJRT_NPROC", "64")  # threads, see `lmjax.launch.processes.give_threads`
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Any value keeps `lmjax.launch` from changing the settings of malloc in the tests.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
# Tests compile far longer than they run.
FLAGS = " --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Takes a third off their time; newer ones have no such choice and stop at an unknown flag.
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS

from pathlib import Path

import jaxtyping

from tests import checked

# Configs check the types of their fields themselves, and have no arrays; checking their functions
# as well takes a tenth of the time of all tests.
PARTS = [path.name for path in Path(__file__).parents[1].glob("lmjax/*/") if path.name != "config"]
CHECKED = ["pallas_kernels", *(f"lmjax.{part}" for part in PARTS)]
jaxtyping.install_import_hook(CHECKED, None)
jaxtyping.jaxtyped = lambda typechecker: checked.checked  # what the hook decorates with

import jax
import orbax.checkpoint
import pytest
from hypothesis import settings

from lmjax.training import learner

# A test that compiles takes long once, and any does on a busy machine.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
jax.config.update("jax_default_matmul_precision", "highest")
# Lines of Python in compiled programs, which nothing here reads, take a tenth of compiling them.
jax.config.update("jax_traceback_in_locations_limit", 0)
# Copies of an array on several devices would each be written in part, cut by a program of its own.
orbax.checkpoint.type_handlers.get_type_handler(jax.Array)._use_replica_parallel = False
# What runs once is compiled as everything is here, which is quicker still.
learner.QUICK, learner._drawn = None, jax.jit(learner._draw, static_argnums=(0, 1))


LARGEST = 6 << 30  # bytes that a process of the suite keeps from file to file
# Mappings of memory: each program has some, and with 65,530 of them Linux ends the process.
MOST_MAPPINGS = 40_000


# Files of slow tests that take minutes: they begin first, so that no worker waits for one.
LONG = ("test_assistant", "test_compiled", "test_notebooks", "test_deviceless", "test_pipelines")


def pytest_collection_modifyitems(items):
    """Puts the longest files first; the others keep their order."""
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


def pytest_collection_finish():
    """Keeps what was imported from the garbage collector."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Frees what jax has compiled after a file of tests, where it fills the memory or its map."""
    yield
    from lmjax.scaling.hardware import memory_in_use

    maps = Path("/proc/self/maps")
    mappings = maps.read_bytes().count(b"\n") if maps.exists() else 0
    if memory_in_use() > LARGEST or mappings > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def one_device():
    """A mesh of one device, set for the test."""
    from lmjax.parallel import Mesh

    mesh = Mesh(fsdp=1).build(jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture
def described_tpu():
    """Returns a function from "v4", "v5e", "v5p" or "v6e" to a set mesh of such chips.

    For tests that compile and run nothing; they are skipped where libtpu is not installed.
    """
    from pallas_kernels import topologies

    with contextlib.ExitStack() as stack:

        def described(chip, devices=1):
            try:
                mesh = topologies.mesh(topologies.tpu(chip)[:devices])
            except topologies.NoCompiler as missing:
                pytest.skip(str(missing))
            stack.enter_context(jax.set_mesh(mesh))
            return mesh

        yield described
