"""The llama.cpp side of `benchmarks.decode`: a worker for LLaMAs, in float32 with a float32 cache.

It needs numpy, safetensors, gguf and xllamacpp (llama.cpp as a library).
"""

import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import keep_to_cores, serve

try:
    import gguf
    import numpy as np
    import xllamacpp
    from safetensors.numpy import load_file
except ImportError:
    xllamacpp = None

# Of a layer: our neighbours' name for each tensor, and llama.cpp's.
TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class Side:
    """llama.cpp's server, asked in this process."""

    def prepare(
        self, folder: str, cores: int, batches: list[int], prompt: int, tokens: int, **shape: Any
    ) -> dict[str, Any]:
        """Converts the model that the lmjax side left in `folder`, loads it and warms up."""
        threads = keep_to_cores(cores)
        if xllamacpp is None:
            raise ImportError("this Python lacks numpy, safetensors, gguf or xllamacpp")
        self.prompts = np.load(Path(folder, "prompts.npy")).tolist()
        path = Path(folder, "model.gguf")
        count = write(Path(folder, "model"), path)
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


def write(folder: Path, path: Path) -> int:
    """Writes a folder's LLaMA as GGUF in float32; token 7 is spelt <7>. Counts its parameters."""
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    tensors = load_file(folder / "model.safetensors")
    heads, size = settings["num_attention_heads"], settings["vocab_size"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_dimension_count(settings["head_dim"])
    writer.add_rope_freq_base(settings["rope_theta"])
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>" for number in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * size)
    for name, tensor in tensors.items():
        writer.add_tensor(renamed(name), arranged(name, tensor, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(tensor.size for tensor in tensors.values())


def renamed(name: str) -> str:
    """llama.cpp's name of a tensor."""
    title = name.removesuffix(".weight")
    if title in WHOLE:
        return f"{WHOLE[title]}.weight"
    layer, _, inner = title.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{TENSORS[inner]}.weight"


def arranged(name: str, tensor: Any, heads: int) -> Any:
    """A tensor as llama.cpp has it, which rotates neighbouring pairs of each head."""
    if "q_proj" not in name and "k_proj" not in name:
        return tensor
    rows, columns = tensor.shape
    halves = tensor.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


if __name__ == "__main__":
    side = Side()
    serve({"prepare": side.prepare, "decode": side.decode})
