"""The lmjax side of `benchmarks.decode`: a worker, which also measures the memory's bandwidth."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import keep_to_cores, seconds_of, serve

READ = 1 << 30  # bytes, far more than any cache holds
MAIN = "main"  # the model that both sides have


class Side:
    """The model and its generator."""

    def prepare(
        self,
        folder: str,
        cores: int,
        batches: list[int],
        prompt: int,
        tokens: int,
        weights: str,
        **shape: Any,
    ) -> dict[str, Any]:
        """Compiles; leaves the model and the prompts in `folder` for the other sides."""
        self.threads = keep_to_cores(cores)  # before XLA counts them
        import jax

        from lmjax.generation import Generator
        from lmjax.generation.weights import layers_apart
        from lmjax.interop import gguf_source, huggingface
        from lmjax.models import initialize
        from lmjax.parallel import Mesh, generation_layout

        jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1]))
        config = model(**shape)
        _, params = initialize(config, generation_layout(), jax.random.key(0))
        self.prompts = random_prompts(shape["vocabulary"], max(batches), prompt)
        np.save(Path(folder, "prompts.npy"), self.prompts)
        file = write_file(Path(folder), config, params, weights)
        if weights == "q8_0":  # the very file that llama.cpp reads
            how = {"apart": layers_apart(), "few_bits": True}
            config, _, params = gguf_source.read(file, generation_layout(), **how)
        else:
            huggingface.write(Path(folder, "model"), config, params)
        named = huggingface.by_path(params)
        begin = time.perf_counter()
        self.generators = {MAIN: Generator(config, params)}
        for batch in batches:
            self.decode(batch, 1)
            self.decode(batch, tokens)
        # Of the table of positions and, where the head has one of its own, of the tokens', a
        # token reads one row.
        rows_only = ("positions.table",) + ("embedding.table",) * (not config.tied_head)
        return {
            "version": f"jax {jax.__version__}",
            "threads": self.threads,
            "parameters": sum(a.size for n, a in named.items() if not n.endswith(".scales")),
            "bytes_per_token": sum(
                a.nbytes for n, a in named.items() if not n.startswith(rows_only)
            ),
            "compile_seconds": time.perf_counter() - begin,
        }

    def prepare_pair(self, batch: int, prompt: int, tokens: int) -> dict[str, dict[str, int]]:
        """Compiles a small ChatGLM2 with a key head for each query head, and with its own two.

        From now on prompts are as long as asked for here.

        Returns:
          Bytes of cache a token and bytes of parameters, by the name of the model.
        """
        import jax

        from lmjax.config import replace
        from lmjax.generation import Generator
        from lmjax.models import chatglm2, initialize
        from lmjax.parallel import generation_layout
        from lmjax.scaling.flops import cache_bytes_per_token

        config = chatglm2()
        small = replace(
            config,
            vocab_size=8192,
            hidden=1024,
            num_layers=4,
            attention=replace(config.attention, head_dim=32),
            feed_forward=replace(config.feed_forward, size=3424),
        )
        self.prompts = random_prompts(small.vocab_size, batch, prompt)
        facts = {}
        for name, kv_heads in (("32 key heads, as ChatGLM-6B", 32), ("2, as ChatGLM2-6B", 2)):
            config = replace(small, attention=replace(small.attention, num_kv_heads=kv_heads))
            _, params = initialize(config, generation_layout(), jax.random.key(0))
            self.generators[name] = Generator(config, params)
            self.decode(batch, 1, name)
            self.decode(batch, tokens, name)
            facts[name] = {
                "cache_bytes_per_token": cache_bytes_per_token(config),
                "parameter_bytes": sum(a.nbytes for a in jax.tree.leaves(params)),
            }
        return facts

    def decode(self, batch: int, tokens: int, model: str = MAIN) -> dict[str, Any]:
        """Seconds to continue so many prompts, prefill included, and their tokens."""
        from lmjax.generation import Sampling

        prompts, greedy = self.prompts[:batch].tolist(), Sampling(temperature=0.0)
        begin = time.perf_counter()
        rows = self.generators[model].generate(prompts, greedy, tokens)
        return {"seconds": time.perf_counter() - begin, "tokens": rows}

    def bandwidth(self, count: int) -> list[float]:
        """Bytes a second of `count` streaming reads with all threads."""
        parts = np.split(np.ones(READ // 4, np.float32), self.threads)
        with ThreadPoolExecutor(self.threads) as pool:
            return [
                READ / seconds for seconds in seconds_of(lambda: [*pool.map(np.max, parts)], count)
            ]


def model(family: str, layers: int, hidden: int, heads: int, length: int, vocabulary: int) -> Any:
    """A GPT-2 or a LLaMA of these sizes; the LLaMA's feed-forward is 8/3 as wide as its stream."""
    from lmjax.config import replace
    from lmjax.models import gpt2, llama

    config = {"gpt2": gpt2, "llama": llama}[family]()
    wide = {"gpt2": 4 * hidden, "llama": 8 * hidden // 3}[family]
    kv_heads = None if config.attention.num_kv_heads is None else heads
    return replace(
        config,
        vocab_size=vocabulary,
        hidden=hidden,
        num_layers=layers,
        max_length=length,
        attention=replace(
            config.attention, num_heads=heads, num_kv_heads=kv_heads, head_dim=hidden // heads
        ),
        feed_forward=replace(config.feed_forward, size=wide),
    )


def write_file(folder: Path, config: Any, params: dict, weights: str) -> Path | None:
    """Writes a GGUF file for llama.cpp; None without the package, which float32 does not need."""
    from lmjax.config import UserError
    from lmjax.interop import gguf_file

    path = folder / "model.gguf"
    try:
        gguf_file.write(path, config, params, kind={"float32": "f32"}.get(weights, weights))
    except UserError:
        if weights != "float32":
            raise
        return None
    return path


def random_prompts(vocabulary: int, batch: int, length: int) -> np.ndarray:
    """Token ids, [batch, length]."""
    return np.random.default_rng(0).integers(0, vocabulary, (batch, length), np.int32)


if __name__ == "__main__":
    side = Side()
    serve(
        {
            "prepare": side.prepare,
            "prepare_pair": side.prepare_pair,
            "decode": side.decode,
            "bandwidth": side.bandwidth,
        }
    )
