"""The llama.cpp side of `benchmarks.decode`: a worker, with a float32 cache.

It needs numpy, gguf and xllamacpp (llama.cpp as a library).
"""

import importlib.metadata
import math
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import keep_to_cores, serve

try:
    import gguf
    import numpy as np
    import xllamacpp
except ImportError:
    xllamacpp = None


class Side:
    """llama.cpp's server, asked in this process."""

    def prepare(
        self, folder: str, cores: int, batches: list[int], prompt: int, tokens: int, **shape: Any
    ) -> dict[str, Any]:
        """Loads the file that the lmjax side left in `folder`, and warms up."""
        threads = keep_to_cores(cores)
        if xllamacpp is None:
            raise ImportError("this Python lacks numpy, gguf or xllamacpp")
        if not (source := Path(folder, "model.gguf")).exists():
            raise ImportError("the lmjax side has no package gguf, which writes the file")
        self.prompts = np.load(Path(folder, "prompts.npy")).tolist()
        path = Path(folder, "spelt.gguf")
        count = spell_tokens(source, path)
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = shape["length"] * max(batches)
        settings.n_parallel = max(batches)
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # Flash attention would read the cache in half precision, and give other tokens.
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.verbosity = 0
        begin = time.perf_counter()
        self.server = xllamacpp.Server(settings)
        for batch in batches:
            self.decode(batch, tokens)
        return {
            "version": f"xllamacpp {importlib.metadata.version('xllamacpp')}",
            "threads": threads,
            "parameters": count,
            "compile_seconds": time.perf_counter() - begin,
        }

    def decode(self, batch: int, tokens: int) -> dict[str, Any]:
        """Seconds to continue so many prompts, prefill included, and their tokens."""
        request = {
            "prompt": self.prompts[:batch] if batch > 1 else self.prompts[0],
            "n_predict": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        begin = time.perf_counter()
        found = self.server.handle_completions(request)
        seconds = time.perf_counter() - begin
        if "error" in found:
            raise ValueError(str(found["error"]))
        texts = [choice["text"] for choice in found["choices"]]
        rows = [[int(token) for token in text[1:-1].split("><")] for text in texts]
        return {"seconds": seconds, "tokens": rows}


def spell_tokens(source: Path, path: Path) -> int:
    """Writes a file whose token 7 is spelt <7>; counts its parameters."""
    reader, count = gguf.GGUFReader(source), 0
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "tokenizer.")):
            writer.add_key_value(name, field.contents(), field.types[0])
    (size,) = (int(t.shape[-1]) for t in reader.tensors if t.name == "token_embd.weight")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>" for number in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * size)
    for tensor in reader.tensors:
        count += math.prod(map(int, tensor.shape))
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return count


if __name__ == "__main__":
    side = Side()
    serve({"prepare": side.prepare, "decode": side.decode})
