"""One form of the model of `benchmarks.export`, run by the program that it is for: a worker."""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import keep_to_cores, serve

CONTEXT = 2048  # most tokens of a row


class Side:
    """A loaded model."""

    def prepare(self, path: str, kind: str, prompt: int, tokens: int, cores: int) -> dict[str, Any]:
        """Loads a file or folder and warms up."""
        threads = keep_to_cores(cores)
        self.before = peak()
        tokens_of = np.arange(5, 5 + prompt).tolist()
        load = {"gguf": gguf, "onnx": onnx, "stablehlo": stablehlo}[kind]
        begin = time.perf_counter()
        self.run = load(Path(path), tokens_of, tokens, threads)
        self.run()
        seconds = time.perf_counter() - begin
        return {"bytes": size(Path(path)), "threads": threads, "load_seconds": seconds}

    def decode(self) -> float:
        """Seconds of one turn."""
        begin = time.perf_counter()
        self.run()
        return time.perf_counter() - begin

    def memory(self) -> dict[str, int]:
        """Most bytes that this process had, and how many of them came with the model."""
        return {"peak": peak(), "model": peak() - self.before}


def gguf(path: Path, prompt: list[int], tokens: int, threads: int) -> Callable[[], Any]:
    """llama.cpp."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel = CONTEXT, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.verbosity = 0
    server = xllamacpp.Server(settings)
    asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "ignore_eos": True}
    return lambda: server.handle_completions(asked | {"cache_prompt": False})


def onnx(path: Path, prompt: list[int], tokens: int, threads: int) -> Callable[[], Any]:
    """onnxruntime."""
    from lmjax.interop.onnx_run import OnnxModel

    model = OnnxModel(path, threads)
    return lambda: model.greedy([prompt], tokens)


def stablehlo(path: Path, prompt: list[int], tokens: int, threads: int) -> Callable[[], Any]:
    """jax alone, the cache given up at each step so that it is not copied."""
    import jax
    import jax.numpy as jnp
    from safetensors.numpy import load_file

    manifest = json.loads((path / "manifest.json").read_text())
    weights: dict[str, Any] = {}
    for file in path.glob("*.safetensors"):
        weights |= jax.device_put(load_file(file))
    calls = {
        name: jax.jit(
            jax.export.deserialize(bytearray((path / one["file"]).read_bytes())).call,
            donate_argnums=1,
        )
        for name, one in manifest["programs"].items()
    }
    sizes = {"batch": 1, "room": len(prompt) + tokens + 1}
    count = len(prompt)
    given = {
        "tokens": np.array([prompt], np.int32),
        "positions": np.arange(count, dtype=np.int32)[None],
        "segments": np.ones((1, count), np.int32),
    }

    def run() -> None:
        cache = {
            name: jnp.zeros([sizes.get(n, n) for n in array["shape"]], array["dtype"])
            for name, array in manifest["programs"]["prefill"]["cache"].items()
        }
        logits, cache = calls["prefill"](weights, cache, given)
        for _ in range(tokens - 1):
            token = logits.argmax(-1).astype(jnp.int32)
            inputs = {"tokens": token, "going": np.ones(1, bool)}
            logits, cache = calls["step"](weights, cache, inputs)
        logits.block_until_ready()

    return run


def peak() -> int:
    """Most bytes of memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def size(path: Path) -> int:
    """Bytes of a file and of what belongs to it, or of a folder."""
    files = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.stem}.*")
    return sum(file.stat().st_size for file in files if file.is_file())


if __name__ == "__main__":
    side = Side()
    serve({"prepare": side.prepare, "decode": side.decode, "memory": side.memory})
