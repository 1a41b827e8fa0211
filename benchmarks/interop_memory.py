"""Host memory of reading and writing model folders, beside the parameters themselves.

python -m benchmarks.interop_memory [layers=16] [folder=FOLDER] [json=FILE]

A LLaMA of random numbers is written as bfloat16, read into float32 parameters, and written again;
then the folder is copied file to file. On a CPU the parameters lie in the host's memory too: what
counts is the most anonymous memory of the process, less the parameters. Pages of the mapped files
are not counted: the system takes them back whenever it wants.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from benchmarks.harness import Worker, save, serve, table
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line

MODULE = "benchmarks.interop_memory"
ALLOWED = 2_000_000_000  # bytes beside the parameters, and twice the largest tensor
EVERY = 0.002  # seconds between two looks at the memory
WORKER = "LMJAX_INTEROP_MEMORY_WORKER"  # says to a process that it is one


@config
class InteropMemory:
    """A LLaMA as wide as the 7B, with fewer layers."""

    layers: int = 16  # blocks, of 0.4 GB each in bfloat16
    hidden: int = 4096  # width
    mlp: int = 11_008  # hidden units of the feed-forward layers
    vocabulary: int = 32_000  # tokens
    folder: str = ""  # for the models, on a disk with four times the model free; empty: temporary
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for a model that is none."""
        if self.layers < 1 or self.hidden % 128:
            raise UserError("layers is 1 or more, and hidden a multiple of 128")


def main() -> None:
    """Measures, prints, and says whether the bound holds."""
    settings = from_command_line(InteropMemory())
    os.environ[WORKER] = "1"
    shape = {name: getattr(settings, name) for name in ("layers", "hidden", "mlp", "vocabulary")}
    with tempfile.TemporaryDirectory(dir=settings.folder or None) as folder:
        with Worker(MODULE) as worker:
            model = worker.ask("make", folder=folder, **shape)
        bound = ALLOWED + 2 * model["largest_bytes"]
        print(
            f"{model['bytes'] / 1e9:.2f} GB of bfloat16 in {model['files']} files, the largest"
            f" tensor {model['largest_bytes'] / 1e9:.2f} GB: allowed are {bound / 1e9:.2f} GB\n"
        )
        found = {}
        with Worker(MODULE) as worker:
            found["read"] = worker.ask("read", folder=folder)
            for dtype in ("bfloat16", "float32"):
                found[f"write {dtype}"] = worker.ask("write", folder=folder, dtype=dtype)
        with Worker(MODULE) as worker:
            found["file to file, float32"] = worker.ask("rewrite", folder=folder)
    columns = ["", "parameters (GB)", "peak beside them (GB)", "at the start (GB)", "seconds"]
    names = ("parameters", "beside", "start")
    print(
        table(
            columns,
            [[what, *(f[n] / 1e9 for n in names), f["seconds"]] for what, f in found.items()],
        )
    )
    worst = max(f["beside"] for f in found.values())
    print(f"\nthe bound of {bound / 1e9:.2f} GB {'holds' if worst <= bound else 'DOES NOT HOLD'}")
    save(settings.json, "interop_memory", model=model, bound=bound, found=found)


# ---- in the workers ----------------------------------------------------------------------------


def make(folder: str, layers: int, hidden: int, mlp: int, vocabulary: int) -> dict[str, int]:
    """Writes the model, tensor by tensor; its sizes."""
    import jax
    import numpy as np

    from lmjax.config import replace
    from lmjax.interop import huggingface
    from lmjax.interop.tensor_files import size_of, write_json, write_tensors
    from lmjax.models import abstract, llama
    from lmjax.parallel import training_layout

    base = llama()
    heads = hidden // 128
    config = replace(
        base,
        vocab_size=vocabulary,
        hidden=hidden,
        num_layers=layers,
        attention=replace(base.attention, num_heads=heads, num_kv_heads=heads, head_dim=128),
        feed_forward=replace(base.feed_forward, size=mlp),
    )
    with jax.set_mesh(_mesh()):
        family, settings = huggingface.family_of(config)
        paths = huggingface.by_path(abstract(config, training_layout())[1])
        shapes = {}
        for name, layer in huggingface.entries_of(family, config, paths):
            parts = [paths[path].shape[layer is not None :] for path in name.ours]
            title = huggingface.theirs(name, layer, config)
            shapes[title] = jax.ShapeDtypeStruct(name.transform.shape(parts, config), "bfloat16")
    source = Path(folder, "model")
    source.mkdir()
    rng = np.random.default_rng(0)
    tensors = (rng.random(shape.shape, np.float32) for shape in shapes.values())
    write_tensors(source, shapes, tensors, largest_file=2_000_000_000)
    write_json(source / "config.json", settings)
    sizes = [size_of(shape) for shape in shapes.values()]
    files = len(list(source.glob("*.safetensors")))
    return {"bytes": sum(sizes), "largest_bytes": max(sizes), "files": files}


held: dict = {}  # what one request leaves for the next


def read(folder: str) -> dict[str, float]:
    """Reads the model and keeps it."""
    import jax

    from lmjax.interop import huggingface
    from lmjax.parallel import training_layout

    with measured() as result, jax.set_mesh(_mesh()):
        config, _, params = huggingface.read(Path(folder, "model"), training_layout())
    held.update(config=config, params=params)
    return result


def write(folder: str, dtype: str) -> dict[str, float]:
    """Writes the model that was read."""
    import jax

    from lmjax.interop import huggingface

    path = Path(folder, "written")
    with measured() as result, jax.set_mesh(_mesh()):
        huggingface.write(path, held["config"], held["params"], dtype)
    shutil.rmtree(path)
    return result


def rewrite(folder: str) -> dict[str, float]:
    """Copies the folder in float32."""
    import jax

    from lmjax.interop import huggingface

    path = Path(folder, "written")
    with measured() as result, jax.set_mesh(_mesh()):
        huggingface.rewrite(Path(folder, "model"), path, "float32")
    shutil.rmtree(path)
    return result


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Fills in the most anonymous memory of the process in the block, less parameters, and more."""
    import jax

    result = {"start": anonymous()}
    peak, stop = [result["start"]], Event()

    def watch() -> None:
        while not stop.wait(EVERY):
            peak[0] = max(peak[0], anonymous())

    thread = Thread(target=watch)
    begin = time.perf_counter()
    thread.start()
    yield result
    stop.set()
    thread.join()
    arrays = held.get("params")
    if arrays is None:
        arrays = [a for a in jax.live_arrays() if a.nbytes > 1 << 20]
    result["seconds"] = time.perf_counter() - begin
    result["parameters"] = sum(a.nbytes for a in jax.tree.leaves(arrays))
    result["beside"] = peak[0] - result["parameters"]


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
    raise UserError("this system does not tell how much memory of a process is anonymous")


def _mesh():
    """One device."""
    import jax

    from lmjax.parallel import Mesh

    return Mesh(fsdp=1).build(jax.devices()[:1])


if __name__ == "__main__":
    if WORKER in os.environ:
        serve({"make": make, "read": read, "write": write, "rewrite": rewrite})
    else:
        with exit_on_user_error():
            main()
