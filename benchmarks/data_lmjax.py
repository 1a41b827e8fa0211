"""lmjax's side of `benchmarks.data`: a worker; and a whole cleaning, as a command.

python -m benchmarks.data_lmjax CORPUS OUTPUT WORKERS
"""

import json
import pathlib
import sys
import time
from typing import Any

from benchmarks.data_sides import by_step
from benchmarks.harness import keep_to_cores, serve
from lmjax.data import JsonLines
from lmjax.data.cleaning import (
    C4Lines,
    Collection,
    Dropped,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    JsonLinesOutput,
    MainText,
    MinHash,
    NearDuplicates,
)
from lmjax.data.cleaning.pipeline import CleaningPipeline
from lmjax.data.documents import Document

MINHASH = MinHash(ngram=5, bands=14, rows=8)
STEPS = {
    "GopherQuality": GopherQuality(),
    "GopherRepetition": GopherRepetition(),
    "C4": C4Lines(terminal=False, least_words=1, least_sentences=5),
    "FineWeb": FineWebQuality(),
}
TOGETHER = 256  # documents that are signed together


def apply(name: str, texts: list[str]) -> int:
    """Applies a step to texts; returns how many are kept."""
    if name == "MinHash":
        return len(_signed(texts))
    if name == "extraction":
        return sum(not isinstance(one, Dropped) for one in map(MainText(), _documents(texts)))
    if name == "whole":
        kept = []
        for document in _documents(texts):
            for step in (MainText(), *STEPS.values()):
                document = step(document)
                if isinstance(document, Dropped):
                    break
            else:
                kept.append(document.text)
        _signed(kept)
        return len(kept)
    return sum(not isinstance(one, Dropped) for one in map(STEPS[name], _documents(texts)))


def _documents(texts: list[str]) -> list[Document]:
    return [Document(text, str(number)) for number, text in enumerate(texts)]


def _signed(texts: list[str]) -> list[Any]:
    """Signatures with their bands."""
    found = []
    for first in range(0, len(texts), TOGETHER):
        signatures = MINHASH.signatures(texts[first : first + TOGETHER])
        found += MINHASH.keys(signatures).tolist()
    return found


def signed_pairs(texts: list[str]) -> list[list[int]]:
    """Pairs of texts that share a band."""
    return by_step(_signed(texts))


def clean(corpus: str, output: str, workers: int) -> dict[str, Any]:
    """A cleaning of JSON lines with all steps: seconds, and this process's largest memory in MB."""
    folder = pathlib.Path(output)
    folder.mkdir(parents=True)
    steps = (*STEPS.values(), NearDuplicates(minhash=MINHASH))
    collection = Collection(name="all", source=JsonLines(path=corpus))
    begin = time.perf_counter()
    pipeline = CleaningPipeline((collection,), steps, JsonLinesOutput(), folder)
    summary = pipeline.run(workers)
    seconds = time.perf_counter() - begin
    # The system's own count begins with the process that has started this one.
    status = pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1]
    used = int(status.split()[0]) / 1024
    return {"seconds": seconds, "megabytes": used, "kept": summary.total().documents}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(clean(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
    else:
        keep_to_cores(1)
        from benchmarks.data_sides import Side

        side = Side(apply, signed_pairs)
        serve({"prepare": side.prepare, "run": side.run, "pairs": side.pairs})
