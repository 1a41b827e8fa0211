"""The transformers side of `benchmarks.decode`: a worker that needs torch, numpy, transformers."""

import time
from pathlib import Path
from typing import Any

from benchmarks.harness import keep_to_cores, serve

try:
    import numpy as np
    import torch
    import transformers
except ImportError:
    transformers = None


class Side:
    """transformers' model with its own cache and `generate`."""

    def prepare(
        self, folder: str, cores: int, batches: list[int], prompt: int, tokens: int, **shape: Any
    ) -> dict[str, Any]:
        """Loads what the lmjax side left in `folder`, and warms up."""
        threads = keep_to_cores(cores)
        if transformers is None:
            raise ImportError("this Python lacks torch, numpy or transformers")
        torch.set_num_threads(threads)
        self.prompts = torch.from_numpy(np.load(Path(folder, "prompts.npy"))).long()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(Path(folder, "model"))
        self.model.generation_config.eos_token_id = None  # all rows go on to the last token
        self.model.generation_config.pad_token_id = 0
        begin = time.perf_counter()
        for batch in batches:
            self.decode(batch, 1)
            self.decode(batch, tokens)
        return {
            "version": f"torch {torch.__version__}, transformers {transformers.__version__}",
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "compile_seconds": time.perf_counter() - begin,
        }

    def decode(self, batch: int, tokens: int) -> dict[str, Any]:
        """Seconds to continue so many prompts, prefill included, and their tokens."""
        prompts = self.prompts[:batch]
        begin = time.perf_counter()
        with torch.inference_mode():
            rows = self.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                use_cache=True,
                max_new_tokens=tokens,
            )
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "tokens": rows[:, prompts.shape[1] :].tolist()}


if __name__ == "__main__":
    side = Side()
    serve({"prepare": side.prepare, "decode": side.decode})
