"""lmjax's side of `benchmarks.tokenizer`: a worker."""

import time
from pathlib import Path
from typing import Any

from benchmarks.harness import documents_of, keep_to_cores, serve
from lmjax.data import read_tokenizer


class Side:
    """A folder's tokenizer as lmjax reads it."""

    def prepare(self, folder: str, documents: str, cores: int) -> dict[str, Any]:
        """Reads the documents."""
        self.folder, self.documents = Path(folder), documents_of(documents)
        return {"version": "lmjax", "threads": keep_to_cores(cores)}

    def encode(self) -> dict[str, Any]:
        """Reads the tokenizer anew and encodes everything."""
        begin, used = time.perf_counter(), time.process_time()
        tokenizer = read_tokenizer(self.folder)
        loaded = time.perf_counter()
        encoded = tokenizer.encode_batch(self.documents)
        end, used = time.perf_counter(), time.process_time() - used
        return {
            "seconds": end - begin,
            "load_seconds": loaded - begin,
            "processor_seconds": used,
            "tokens": sum(map(len, encoded)),
        }

    def sample(self, count: int) -> list[list[int]]:
        """The tokens of some documents."""
        return read_tokenizer(self.folder).encode_batch(self.documents[:count])


if __name__ == "__main__":
    side = Side()
    serve({"prepare": side.prepare, "encode": side.encode, "sample": side.sample})
