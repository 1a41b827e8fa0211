"""Decode attention over pages for `benchmarks.kernel_cost`: lmjax's, and jax's ragged paged one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from pallas_kernels import schedules, topologies


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """One new token a row over a full cache of pages, in bfloat16."""

    batch: int
    tokens: int = 4096
    page: int = 16
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def pages(self) -> int:
        """Pages of a row."""
        return self.tokens // self.page

    @property
    def table(self) -> np.ndarray:
        """Numbers of each row's pages, in no order."""
        count = self.batch * self.pages
        return np.random.default_rng(0).permutation(count).astype(np.int32).reshape(self.batch, -1)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values, which must be read."""
        return 2 * 2 * self.batch * self.tokens * self.kv_heads * self.head_dim


def ours(case: DecodeCase) -> tuple[Callable, tuple]:
    """Decode attention of lmjax, and its arguments."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.decode_attention import PagedCache, decode_attention

    def apply(q, keys, values, table, lengths):
        cache = PagedCache(keys, values, table, lengths)
        return decode_attention(q, cache, implementation="tpu")

    size = case.kv_heads * case.head_dim
    q = jax.ShapeDtypeStruct((case.batch, 1, case.heads, case.head_dim), jnp.bfloat16)
    pages = jax.ShapeDtypeStruct((case.batch * case.pages, case.page, size), jnp.bfloat16)
    lengths = np.full(case.batch, case.tokens, np.int32)
    return apply, (q, pages, pages, case.table, lengths)


def ragged(case: DecodeCase, blocks: tuple[int, int]) -> tuple[Callable, tuple]:
    """The library's, with pages and queries a block."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

    def apply(q, pages, lengths, table, starts, rows):
        return kernel.ragged_paged_attention(
            q,
            pages,
            lengths,
            table,
            starts,
            rows,
            sm_scale=case.head_dim**-0.5,
            num_kv_pages_per_block=blocks[0],
            num_queries_per_block=blocks[1],
            vmem_limit_bytes=64 * 2**20,
        )

    q = jax.ShapeDtypeStruct((case.batch, case.heads, case.head_dim), jnp.bfloat16)
    shape = (case.batch * case.pages, case.page, 2 * case.kv_heads, case.head_dim)
    pages = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    lengths = np.full(case.batch, case.tokens, np.int32)
    starts = np.arange(case.batch + 1, dtype=np.int32)
    return apply, (q, pages, lengths, case.table, starts, np.array([case.batch], np.int32))


def decode_cost(
    chip: str, case: dict[str, int], blocks: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Cycles of a call beside those in which the memory gives the cache.

    Args:
        blocks: of the library's kernel: pages, queries; None is lmjax's.
    """
    problem = DecodeCase(**case)
    if blocks is not None:
        _describe_chip_to_library(chip)
    apply, arguments = ours(problem) if blocks is None else ragged(problem, tuple(blocks))
    try:
        program = schedules.record(apply, *arguments, chip=chip)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".partition("\n")[0][:200]}
    rates = schedules.CHIPS[chip]
    cycles = sum(kernel.cycles for kernel in program.pallas)
    memory = problem.cache_bytes / rates.bandwidth * rates.clock
    return {
        "cycles": cycles,
        "us": 1e6 * cycles / rates.clock,
        "memory_us": 1e6 * memory / rates.clock,
        "of_memory": cycles / memory,
        "moved_of_cache": sum(kernel.moved for kernel in program.pallas) / problem.cache_bytes,
        "spills": sum(kernel.use.slots["SPILL"] for kernel in program.pallas),
        "vmem": max((kernel.listing.vmem for kernel in program.pallas), default=0),
        "guesses": sum(kernel.guesses for kernel in program.pallas),
    }


def _describe_chip_to_library(chip: str) -> None:
    """Tells the library's kernel of the chip, which it asks the process' own device for."""
    from jax._src.pallas.mosaic import tpu_info

    device = topologies.tpu(chip)[0]
    tpu_info.get_device_kind = lambda: device.device_kind
    tpu_info.get_num_device_cores = lambda: schedules.CHIPS[chip].cores
