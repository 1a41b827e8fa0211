"""Schedules of TPU kernels: counted from a recorded dump, and of kernels that are compiled here.

The kernel has a grid of 2 x 3 whose classes (0, 1, 2) and numbers of turns it reads of two
operands: class 1 runs one branch, class 2 another with a loop of that column's turns.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pallas_kernels import topologies
from pallas_kernels.schedules import CHIPS, read
from pallas_kernels.schedules.bundles import read_listings
from pallas_kernels.schedules.scalar_memory import (
    operand_index,
    operand_offset,
    operand_pointer,
    words,
)
from pallas_kernels.schedules.scalar_unit import Unknown, run, wrap

ROOT = Path(__file__).parents[2]
DUMP = ROOT / "tests" / "data" / "tpu_schedule"
CLASSES = np.array([[0, 1, 2], [2, 2, 1]], np.int8)
TURNS = np.array([3, 4, 5], np.int32)
LOOP, PARTIAL, FULL, START = (0x71, 0x74), (0x5F, 0x61), (0x76, 0x79), (0x48, 0x4A)


@pytest.fixture(scope="module")
def listing():
    """The kernel as it was compiled for v4, whose two cores share the rows of the grid."""
    (found,) = read_listings(DUMP)
    return found


def test_the_listing_is_read_whole(listing):
    assert listing.name == "counted.1"
    assert len(listing.bundles) == len(listing.slots) == 0x96
    assert listing.operands[0] == "s8[2,3]"
    assert listing.operands[2] == "f32[16,384]"
    assert listing.capacity["MXU"] == 4
    assert listing.vmem == 4 * 8 * 128 * 4  # two windows of [8, 128], each twice


@pytest.mark.parametrize("core", [0, 1])
def test_every_block_runs_as_often_as_the_scalars_say(listing, core):
    counts = run(listing, CHIPS["v4"], {0: CLASSES, 1: TURNS}, core=core)
    row = CLASSES[core]
    assert counts.guesses == 0 and not counts.unknown
    assert counts.runs[PARTIAL] == (row == 1).sum()
    assert counts.runs[FULL] == (row == 2).sum()
    assert counts.runs[LOOP] == TURNS[row == 2].sum()
    assert counts.cycles == sum(n * (end - first) for (first, end), n in counts.runs.items())
    # Three blocks of queries come, one goes.
    assert (counts.read, counts.written) == (3 * 8 * 128 * 4, 8 * 128 * 4)


@pytest.mark.parametrize("seed", range(5))
def test_other_classes_give_other_counts(listing, seed):
    random = np.random.default_rng(seed)
    classes = random.integers(0, 3, (2, 3)).astype(np.int8)
    turns = random.integers(1, 9, 3).astype(np.int32)
    for core in (0, 1):
        counts = run(listing, CHIPS["v4"], {0: classes, 1: turns}, core=core)
        assert counts.runs[PARTIAL] == (classes[core] == 1).sum()
        assert counts.runs[LOOP] == turns[classes[core] == 2].sum()


def test_scalars_that_are_not_given_are_told(listing):
    counts = run(listing, CHIPS["v4"])
    assert counts.guesses > 0


def test_a_folder_is_read_without_scalars(listing):
    (kernel,) = read(DUMP, "v4")
    assert kernel.guesses > 0
    assert kernel.cycles >= len(listing.bundles)
    assert 0 < kernel.shares["SALU"] <= 1


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
@pytest.mark.parametrize("shape", [(3,), (300,), (5, 7), (9, 130), (2, 6, 3)])
def test_words_of_scalar_memory(dtype, shape):
    """The address by which the compiler's code finds an element, written out."""
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    memory, size = words(array), array.dtype.itemsize
    packed = 4 // size
    for index in np.ndindex(shape):
        if len(shape) == 1:
            tile, inside = divmod(index[0], 128 * packed)
            row, lane = divmod(inside, 128)
        else:
            *_, rows, columns = shape
            row_tiles, column_tiles = -(-rows // packed), -(-columns // 128)
            tile_row, row = divmod(index[-2], packed)
            tile_column, lane = divmod(index[-1], 128)
            plane = index[0] if len(shape) == 3 else 0
            tile = (plane * row_tiles + tile_row) * column_tiles + tile_column
        word = int(memory[128 * tile + lane])
        byte = (word >> (8 * size * row)) & (2 ** (8 * size) - 1)
        assert byte == int(array[index]) % 2 ** (8 * size)


@pytest.mark.parametrize("shift", [0, 4])
@pytest.mark.parametrize("index", [0, 1, 7, 30])
def test_operands_are_told_by_their_addresses(index, shift):
    address = (operand_pointer(index) << shift) + 5
    assert (operand_index(address), operand_offset(address)) == (index, 5)


def test_numbers_are_of_32_bits():
    assert wrap(2**31) == -(2**31)
    assert wrap(-1 & 0xFFFFFFFF) == -1


def test_what_hangs_on_the_unknown_is_unknown():
    unknown = Unknown()
    assert wrap(3 + unknown * 2) is unknown
    assert (unknown > 3) is unknown
    assert (True & (unknown ^ True)) is unknown


def test_a_chip_without_a_description():
    with pytest.raises(ValueError, match=r"v9.*v4, v5e, v5p, v6e"):
        topologies.tpu("v9")


LIVE = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from pallas_kernels.schedules import record, start_recording

start_recording()

def kernel(classes, a, b, o):
    i, j = pl.program_id(0), pl.program_id(1)

    @pl.when(j == 0)
    def start():
        o[...] = jnp.zeros_like(o)

    @pl.when(classes[3 * i + j] == 2)
    def full():
        o[...] += jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

def products(classes, a, b):
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(2, 3),
        in_specs=[
            pl.BlockSpec((128, 128), lambda i, j, _: (i, j)),
            pl.BlockSpec((128, 128), lambda i, j, _: (j, 0)),
        ],
        out_specs=pl.BlockSpec((128, 128), lambda i, j, _: (i, 0)),
    )
    shape = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    # The classes are computed in the program, from a number that is given.
    return pl.pallas_call(kernel, out_shape=shape, grid_spec=spec, name="products")(
        jnp.where(jnp.arange(6) < classes, 2, 0), a, b
    )

shape = jax.ShapeDtypeStruct
arguments = shape((256, 384), jnp.bfloat16), shape((384, 128), jnp.bfloat16)
for number in (2, 5):
    program = record(products, np.int32(number), *arguments, chip="v5e")
    (found,) = program.pallas
    print(found.name, found.guesses, found.use.rows, found.cycles > 100)
"""


def test_a_kernel_that_is_compiled_here():
    """In a process of its own: the compiler is told once where to write."""
    if not topologies.has_tpu_compiler():
        pytest.skip("libtpu is not installed: pip install 'lmjax[tpu]'")
    done = subprocess.run(
        [sys.executable, "-c", LIVE], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # A product sends 128 rows through the matrix units.
    assert done.stdout.splitlines() == ["products.1 0 256 True", "products.1 0 640 True"]
