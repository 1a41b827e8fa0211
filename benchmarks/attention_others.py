"""Attention of other packages on the arrays of `benchmarks.attention`, where they are installed.

Each function gives two: one starts the forward pass, the other both passes; what they return waits
until the work is done. A mask that a package has no fast path for raises NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

Run = Callable[[], Callable[[], object]]
Runs = tuple[Run, Run]


def starting(function: Callable, arguments: tuple) -> Run:
    """Starts a function of JAX."""

    def run():
        out = function(*arguments)
        return lambda: jax.block_until_ready(out)

    return run


def tokamax(inputs, cotangent, name: str, window: int) -> Runs:
    """tokamax's kernel for the GPU, or its preferred one elsewhere."""
    import tokamax as package

    if name not in ("causal", "full", "window"):
        raise NotImplementedError(f"no call of tokamax for the mask {name} is written here")
    options = {"is_causal": name != "full"}
    if name == "window":
        options["local_window_size"] = (window - 1, 0)
    if jax.default_backend() == "gpu":
        options["implementation"] = "mosaic_gpu"

    def attend(q, k, v):
        return package.dot_product_attention(q, k, v, **options)

    def both(q, k, v, cotangent):
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(cotangent)

    return starting(jax.jit(attend), inputs), starting(jax.jit(both), (*inputs, cotangent))


def torch(inputs, cotangent, name: str, window: int) -> Runs:
    """PyTorch's flash attention on a GPU, its fused one on a CPU."""
    import torch as package
    from torch.nn import attention, functional

    if name not in ("causal", "full"):
        raise NotImplementedError(f"PyTorch's flash attention has no mask {name}")
    on_gpu = package.cuda.is_available()
    if jax.default_backend() != "cpu" and not on_gpu:
        raise NotImplementedError("this PyTorch sees no GPU")
    device, half = ("cuda" if on_gpu else "cpu"), inputs[0].dtype.itemsize == 2

    def converted(array):
        tensor = package.from_numpy(np.asarray(array, np.float32)).to(device).transpose(1, 2)
        return tensor.to(package.bfloat16 if half else package.float32)

    q, k, v = (converted(a).requires_grad_() for a in inputs)
    gradient = converted(cotangent)
    options = {"is_causal": name == "causal", "enable_gqa": q.shape[1] != k.shape[1]}

    def attend():
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            return functional.scaled_dot_product_attention(q, k, v, **options)

    def wait():
        if on_gpu:
            package.cuda.synchronize()

    def forward():
        with package.no_grad():
            attend()
        return wait

    def both():
        package.autograd.grad(attend(), (q, k, v), gradient)
        return wait

    return forward, both


OTHERS = {"tokamax": tokamax, "torch": torch}
