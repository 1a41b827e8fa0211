"""The transformers side of `benchmarks.tokenizer`: a worker that needs transformers."""

import time
from pathlib import Path
from typing import Any

from benchmarks.harness import documents_of, keep_to_cores, serve

try:
    import transformers
except ImportError:
    transformers = None


class Side:
    """A folder's tokenizer as transformers reads it."""

    def prepare(self, folder: str, documents: str, cores: int) -> dict[str, Any]:
        """Reads the documents."""
        if transformers is None:
            raise ImportError("this Python lacks transformers")
        transformers.logging.set_verbosity_error()  # about texts longer than the model's
        self.folder, self.documents = Path(folder), documents_of(documents)
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        version = f"transformers {transformers.__version__}, {type(tokenizer).__name__}"
        return {"version": version, "threads": keep_to_cores(cores)}

    def encode(self) -> dict[str, Any]:
        """Reads the tokenizer anew and encodes everything."""
        begin, used = time.perf_counter(), time.process_time()
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        loaded = time.perf_counter()
        encoded = tokenizer(self.documents)["input_ids"]
        end, used = time.perf_counter(), time.process_time() - used
        return {
            "seconds": end - begin,
            "load_seconds": loaded - begin,
            "processor_seconds": used,
            "tokens": sum(map(len, encoded)),
        }

    def sample(self, count: int) -> list[list[int]]:
        """The tokens of some documents, without those that stand around a text."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        return tokenizer(self.documents[:count], add_special_tokens=False)["input_ids"]


if __name__ == "__main__":
    side = Side()
    serve({"prepare": side.prepare, "encode": side.encode, "sample": side.sample})
