"""Attention of lmjax and of jax over the same masks, for `benchmarks.kernel_cost` to compile.

A worker process of it compiles for one chip: `python -m benchmarks.kernel_cost_cases`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness import serve
from benchmarks.kernel_cost_decode import decode_cost
from benchmarks.tpu_schedule import busiest
from pallas_kernels import schedules

WINDOW = 1024
DOCUMENTS = 8  # of a row of "packed"
TILE = 128  # rows and columns of the tiles that cycles are told of


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Attention of one row of a batch in bfloat16."""

    mask: str
    length: int = 4096
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def segments(self) -> np.ndarray | None:
        """Number of the document of each token."""
        documents = {"packed": DOCUMENTS, "blanks": 4}.get(self.mask)
        if documents is None:
            return None
        # Uneven, and no multiples of any block.
        shares = np.linspace(1, 2, documents)
        ends = (self.length * shares.cumsum() / shares.sum()).round()
        return 1 + np.searchsorted(ends, np.arange(self.length), side="right").astype(np.int32)

    @property
    def ranks(self) -> np.ndarray | None:
        """Numbers that causal masks compare, alike in a part that sees itself whole."""
        position = np.arange(self.length, dtype=np.int32)
        if self.mask == "prefix":
            return np.where(position < self.length // 4, 0, position)
        if self.mask != "blanks":
            return None
        starts = np.searchsorted(self.segments, self.segments)
        sizes = np.bincount(self.segments)[self.segments]
        inside = position - starts
        return np.where(inside < 3 * sizes // 4, starts, position).astype(np.int32)

    @property
    def window(self) -> int | None:
        """The number of keys that a query sees."""
        return WINDOW if self.mask == "window" else None

    @property
    def causal(self) -> bool:
        """Returns whether no query sees a later key."""
        return self.mask != "full"

    @functools.cached_property
    def allowed(self) -> np.ndarray:
        """Pairs of query and key that see each other."""
        position = np.arange(self.length)
        order = position if self.ranks is None else self.ranks
        pairs = order[:, None] >= order if self.causal else np.ones((self.length,) * 2, bool)
        if self.window is not None:
            pairs &= position[:, None] - position < self.window
        if self.segments is not None:
            pairs &= self.segments[:, None] == self.segments
        return pairs

    @property
    def tiles(self) -> float:
        """Allowed pairs of all heads, in tiles' worth."""
        return self.heads * float(self.allowed.sum()) / TILE**2

    def tiles_not_empty(self, rows: int, columns: int) -> int:
        """Tiles of a size with an allowed pair, of all heads, in tiles of 128 x 128."""
        cut = self.allowed.reshape(self.length // rows, rows, self.length // columns, columns)
        return self.heads * int(cut.any(axis=(1, 3)).sum()) * (rows // TILE) * (columns // TILE)

    @property
    def least_bytes(self) -> dict[str, int]:
        """Bytes that must be read or written: each operand and result once."""
        row = 2 * self.length * self.head_dim
        queries, keys, lse = self.heads * row, self.kv_heads * row, 4 * self.heads * self.length
        forward = 2 * queries + 2 * keys + lse
        return {"forward": forward, "backward": 4 * queries + 4 * keys + lse}


def ours(case: AttentionCase) -> tuple[Callable, tuple]:
    """The function of queries, keys, values and more to be compiled, and what it takes beyond."""
    from pallas_kernels.attention import Mask, attention

    def apply(q, k, v, arrays):
        fields = {
            f"{side}_{name}": array for name, array in arrays.items() for side in ("query", "key")
        }
        mask = Mask(causal=case.causal, window=case.window, **fields)
        return attention(q, k, v, mask, implementation="tpu")

    arrays = {"segments": case.segments, "ranks": case.ranks}
    return apply, ({name: a[None] for name, a in arrays.items() if a is not None},)


def splash(case: AttentionCase, blocks: tuple[int, int, int], fused: bool):
    """jax's library attention, likewise: q, k and v [batch, length, heads, head_dim]."""
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    q, kv, compute = blocks
    separate = {} if fused else {"block_q_dq": q, "block_kv_dq": kv}
    sizes = kernels.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=compute,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=fused,
        **separate,
    )
    shape = (case.length, case.length)
    by_name = {
        "full": lambda: masks.FullMask(shape),
        "window": lambda: masks.LocalMask(shape, (case.window - 1, 0), 0),
        "prefix": lambda: masks.NumpyMask(case.allowed),
        "blanks": lambda: masks.NumpyMask(case.allowed),
    }
    mask = by_name.get(case.mask, lambda: masks.CausalMask(shape))()
    group = case.heads // case.kv_heads
    of_heads = masks.MultiHeadMask([mask] * (group if group > 1 else case.heads))
    make = kernels.make_splash_mqa if group > 1 else kernels.make_splash_mha
    kernel = make(of_heads, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def apply(q, k, v, segments):
        ids = None if segments is None else kernels.SegmentIds(segments, segments)

        def row(q, k, v):
            q, k, v = (x.swapaxes(0, 1) for x in (q * case.head_dim**-0.5, k, v))
            if group == 1:
                return kernel(q, k, v, ids).swapaxes(0, 1)
            grouped = q.reshape(case.kv_heads, group, *q.shape[1:])
            out = jax.vmap(lambda q, k, v: kernel(q, k, v, ids))(grouped, k, v)
            return out.reshape(q.shape).swapaxes(0, 1)

        return jax.vmap(row)(q, k, v)

    return apply, (case.segments if case.mask == "packed" else None,)


def cost(
    chip: str, case: dict[str, Any], blocks: tuple[int, int, int] | None = None, fused: bool = False
) -> dict[str, Any]:
    """Compiles forward and backward; cycles and more of each kernel.

    Args:
        blocks: of splash: queries, keys, keys a step; None is lmjax's attention.
        fused: whether splash's backward is one kernel, with parts of the gradient of the queries
            that are summed after it.
    """
    import jax
    import jax.numpy as jnp

    problem = AttentionCase(**case)
    apply, rest = ours(problem) if blocks is None else splash(problem, tuple(blocks), fused)

    def both(q, k, v, d_output, *rest):
        output, pull = jax.vjp(lambda q, k, v: apply(q, k, v, *rest), q, k, v)
        return output, *pull(d_output)

    def shape(heads):
        return jax.ShapeDtypeStruct((1, problem.length, heads, problem.head_dim), jnp.bfloat16)

    q, k = shape(problem.heads), shape(problem.kv_heads)
    try:
        program = schedules.record(both, q, k, k, q, *rest, chip=chip)
    except Exception as error:  # blocks that the compiler refuses, and requests not served
        return {"error": f"{type(error).__name__}: {error}".partition("\n")[0][:200]}
    kernels = [described(kernel) for kernel in program.pallas]
    if fused:
        parts = problem.length // blocks[1] * 2 * math.prod(q.shape)
        kernels.append(sum_of_parts(parts, schedules.CHIPS[chip]))
    others = [k for k in program.kernels if not k.is_pallas and k.name != "TLP"]
    return {"kernels": kernels, "around_us": 1e6 * sum(kernel.seconds for kernel in others)}


def described(kernel: schedules.ScheduledKernel) -> dict[str, Any]:
    """The numbers of a kernel."""
    return {
        "name": kernel.name,
        "pass": "forward" if "fwd" in kernel.name or "forward" in kernel.name else "backward",
        "cycles": kernel.cycles,
        "us": 1e6 * kernel.cycles / kernel.chip.clock,
        "us_with_waits": 1e6 * kernel.seconds,
        "busiest": busiest(kernel.shares),
        "spills": kernel.use.slots["SPILL"],
        "vmem": kernel.listing.vmem,
        "moved": kernel.moved,
        "rows": kernel.use.rows,
        "guesses": kernel.guesses,
        "bundles": len(kernel.listing.bundles),
    }


def sum_of_parts(size: int, chip: schedules.TpuChip) -> dict[str, Any]:
    """The sum over parts of the queries' gradient, at the rate at which memory gives them."""
    seconds = size / chip.bandwidth
    nothing = dict.fromkeys(("spills", "vmem", "rows", "guesses", "bundles"), 0)
    return nothing | {
        "name": "sum of parts",
        "pass": "backward",
        "cycles": round(seconds * chip.clock),
        "us": 1e6 * seconds,
        "us_with_waits": 1e6 * seconds,
        "busiest": "memory",
        "moved": size,
    }


if __name__ == "__main__":
    schedules.start_recording()
    serve({"cost": cost, "decode_cost": decode_cost})
