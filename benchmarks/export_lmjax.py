"""Writes the model of `benchmarks.export` in all forms: a worker."""

from pathlib import Path

import jax

from benchmarks.harness import serve
from lmjax.config import replace
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.interop import gguf_file, huggingface
from lmjax.interop.export import convert_to_gguf, convert_to_onnx, convert_to_stablehlo
from lmjax.models import initialize, llama
from lmjax.parallel import Mesh, training_layout


class Maker:
    """Makes a model, and files of it."""

    def make(self, folder: str, source: str, layers: int, hidden: int, vocabulary: int) -> None:
        """Writes a random LLaMA as a model folder, unless there is a source."""
        jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1]))
        self.source = source or str(Path(folder, "model"))
        if source:
            return
        base = llama("7B")
        config = replace(
            base,
            vocab_size=vocabulary,
            hidden=hidden,
            num_layers=layers,
            max_length=2048,
            attention=replace(
                base.attention, num_heads=hidden // 64, num_kv_heads=None, head_dim=64
            ),
            feed_forward=replace(base.feed_forward, size=hidden * 8 // 3 // 64 * 64),
        )
        _, params = initialize(config, training_layout(), jax.random.key(0))
        huggingface.write(self.source, config, params)
        self.random = config, params

    def write(self, folder: str, ending: str, weights: str) -> str:
        """Writes a form of the model; its path."""
        path = Path(folder, f"model-{weights}.{ending}")
        if ending == "onnx":
            convert_to_onnx(self.source, path, weights)
        elif ending == "stablehlo":
            convert_to_stablehlo(self.source, path)
        elif hasattr(self, "random"):  # which llama.cpp runs with any tokenizer
            gguf_file.write(path, *self.random, ByteTokenizer(), weights)
        else:
            convert_to_gguf(self.source, path, weights)
        return str(path)


if __name__ == "__main__":
    maker = Maker()
    serve({"make": maker.make, "write": maker.write})
