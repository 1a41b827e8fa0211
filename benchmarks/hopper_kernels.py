"""Resources of compiled attention kernels for Hopper: registers, spills, shared memory, products.

python -m benchmarks.hopper_kernels [json=FILE]

Compiles for an H100 that need not be there, which takes the packages that
`pallas_kernels.topologies.hopper` names. Tensor-core instructions are those of the two loops over
tiles, for full and for partial ones, of each kernel; `least` is what their products need. The
causal variants of tokamax are compiled too where it is installed.
"""

import dataclasses
import glob
import os
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import save, table
from lmjax.config import config
from lmjax.launch import exit_on_user_error, from_command_line
from pallas_kernels.attention import BucketBias, Dropout, LinearBias, Mask, attention
from pallas_kernels.attention.hopper.plan import columns, default_blocks, padded
from pallas_kernels.topologies import hopper

BATCH, LENGTH, HEADS = 2, 1024, 8
ONES = np.ones((BATCH, LENGTH), np.int32)
PACKED = Mask(causal=True, query_segments=ONES, key_segments=ONES)
PREFIX = dataclasses.replace(PACKED, query_ranks=ONES, key_ranks=ONES)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A call of attention; arrays of its mask stand for their shapes."""

    head_dim: int = 128
    value_dim: int | None = None
    kv_heads: int = HEADS
    mask: Mask = dataclasses.field(default_factory=lambda: Mask(causal=True))
    bias: Callable[[], Any] = lambda: None
    softcap: float | None = None
    dropout: Callable[[], Any] = lambda: None
    dtype: str = "bfloat16"


def dropout() -> Dropout:
    """Dropout with a seed for each query of each head."""
    return Dropout(jnp.ones((BATCH, HEADS, LENGTH), jnp.uint32), 0.1)


def linear() -> LinearBias:
    """ALiBi's bias."""
    return LinearBias(jnp.ones(HEADS))


def buckets() -> BucketBias:
    """T5's bias."""
    return BucketBias(jnp.ones((HEADS, 32)), 128, False)


# Everything that a kernel computes beside the products.
EVERYTHING = {
    "mask": dataclasses.replace(PREFIX, window=256),
    "bias": linear,
    "softcap": 30.0,
    "dropout": dropout,
}
VARIANTS = {
    "causal 64": Variant(64),
    "causal 128": Variant(),
    "causal 256": Variant(256),
    "causal 192, values 128": Variant(192, 128),
    "packed, 4 heads to 1": Variant(kv_heads=2, mask=PACKED),
    "packed, 4 heads to 1, 256": Variant(256, kv_heads=2, mask=PACKED),
    "window": Variant(mask=Mask(causal=True, window=256)),
    "prefix, float16": Variant(mask=PREFIX, dtype="float16"),
    "softcap": Variant(softcap=30.0),
    "dropout": Variant(dropout=dropout),
    "dropout 256": Variant(256, dropout=dropout),
    "linear bias": Variant(bias=linear),
    "bucket bias 64": Variant(64, mask=Mask(), bias=buckets),
    "bucket bias 256": Variant(256, mask=Mask(), bias=buckets),
    "dense bias 64": Variant(64, mask=Mask(), bias=lambda: jnp.ones((1, HEADS, LENGTH, LENGTH))),
    "everything": Variant(**EVERYTHING),
    "everything 256": Variant(256, **EVERYTHING),
}
TOKAMAX = ("causal 64", "causal 128", "causal 256")  # compiled beside tokamax's


@config
class HopperKernels:
    """Settings of the report."""

    variants: tuple[str, ...] = tuple(VARIANTS)  # which to compile
    json: str = ""  # file for the results


def main() -> None:
    """Compiles and prints."""
    settings = from_command_line(HopperKernels())
    rows = []
    for side, reported in sides().items():
        for name in settings.variants:
            for kernel in reported(VARIANTS[name]):
                rows.append({"side": side, "variant": name, **kernel})
                print(rows[-1], flush=True)
    print("\n" + table(list(rows[0]), [list(row.values()) for row in rows]))
    save(settings.json, "hopper_kernels", kernels=rows)


def sides() -> dict[str, Callable[[Variant], list[dict[str, Any]]]]:
    """Functions that report a variant's kernels, by the package that they are from."""
    found = {"lmjax": report}
    try:
        import tokamax  # noqa: F401
    except ImportError as error:
        print(f"without tokamax: {error}")
    else:
        found["tokamax"] = report_tokamax
    return found


def report(variant: Variant) -> list[dict[str, Any]]:
    """One entry for each kernel of the forward and backward passes."""
    mesh = jax.sharding.Mesh(np.array([hopper()[0]]), ("one",))
    bias, dropout = jax.eval_shape(variant.bias), jax.eval_shape(variant.dropout)
    options = described((variant.mask, bias, dropout), mesh)

    def forward(q, k, v, mask, bias, dropout):
        more = {"softcap": variant.softcap, "dropout": dropout, "implementation": "hopper"}
        return attention(q, k, v, mask, bias, **more)

    def gradients(q, k, v, *options):
        out, pull = jax.vjp(lambda *inputs: forward(*inputs, *options), q, k, v)
        return pull(out)

    found = {}
    with jax.set_mesh(mesh):
        for function in (forward, gradients):
            mapped = jax.shard_map(function, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
            found |= compiled_kernels(mapped, (*inputs(variant, mesh), *options))
    least = least_products(variant.head_dim, variant.value_dim or variant.head_dim)
    return [
        {"kernel": name, **found[f"attention_{name}"], "least": count}
        for name, count in least.items()
    ]


def report_tokamax(variant: Variant) -> list[dict[str, Any]]:
    """The same of tokamax's kernels, for the variants of `TOKAMAX`."""
    from benchmarks import hopper_kernels_tokamax

    if all(variant is not VARIANTS[name] for name in TOKAMAX):
        return []
    mesh = jax.sharding.Mesh(np.array([hopper()[0]]), ("one",))
    return hopper_kernels_tokamax.report(variant.head_dim, inputs(variant, mesh), compiled_kernels)


def described(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """The shapes of arrays, on the device of the mesh."""
    sharding = jax.sharding.NamedSharding(mesh, jax.P())
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def inputs(variant: Variant, mesh: jax.sharding.Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of queries, keys and values."""
    sizes = [(HEADS, variant.head_dim), (variant.kv_heads, variant.head_dim)]
    sizes.append((variant.kv_heads, variant.value_dim or variant.head_dim))
    arrays = (np.empty((BATCH, LENGTH, *size), jnp.dtype(variant.dtype)) for size in sizes)
    return described(tuple(arrays), mesh)


def compiled_kernels(function: Callable, arguments: tuple) -> dict[str, dict[str, Any]]:
    """Registers, spilled bytes, shared memory and tensor-core instructions of kernels by name.

    Of those that no earlier program of this process has.
    """
    with tempfile.TemporaryDirectory() as folder:
        variables = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTXAS": "1"}
        variables |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_MLIR_PASSES": "1"}
        os.environ.update(variables)
        try:
            jax.jit(function).lower(*arguments).compile()
        finally:
            for name in variables:
                del os.environ[name]
        files = sorted(glob.glob(f"{folder}/*.ptx"))
        names = (re.fullmatch(r"(\w+)_\d+\.ptx", os.path.basename(f)) for f in files)
        return {name[1]: _kernel(file) for name, file in zip(names, files, strict=True)}


def _kernel(program: str) -> dict[str, Any]:
    stem = program.removesuffix(".ptx")
    with open(program) as file:
        instructions = file.read()
    with open(f"{stem}.ptxas") as file:
        assembler = file.read()
    with open(f"{stem}.mlir-passes.log") as file:
        shared = re.search(r"dynamic_shared_memory_size %c(\d+)_i32", file.read())
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", assembler)
    return {
        "registers": int(re.search(r"Used (\d+) registers", assembler)[1]),
        "spilled": int(spilled[1]) + int(spilled[2]),
        "shared_memory": int(shared[1]) if shared else None,
        "products": instructions.count("wgmma.mma_async"),
    }


def least_products(head_dim: int, value_dim: int) -> dict[str, int]:
    """Tensor-core instructions of two tiles in each kernel, each 16 deep and 64 rows high."""
    head_dim, value_dim = padded(head_dim, 64), padded(value_dim, 64)
    blocks, parts = default_blocks(head_dim, value_dim), columns(head_dim, value_dim)
    deep = padded(head_dim, 64 * parts) + padded(value_dim, 64 * parts)
    depths = {
        "forward": head_dim + blocks.forward_keys,
        "query_gradients": head_dim + value_dim + blocks.query_gradient_keys,
        "key_gradients": deep + 2 * blocks.key_gradient_queries,
    }
    return {name: 2 * depth // 16 for name, depth in depths.items()}


if __name__ == "__main__":
    with exit_on_user_error():
        main()
