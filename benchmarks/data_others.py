"""The other side of `benchmarks.data`: datatrove, rensa and datasketch. Imports nothing of ours."""

import re

from benchmarks.data_sides import Side, by_step
from benchmarks.harness import keep_to_cores, serve

BANDS, ROWS, NGRAM = 14, 8, 5
WORD = re.compile(r"\w+")


def _filters() -> dict:
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    return {
        "GopherQuality": GopherQualityFilter(),
        "GopherRepetition": GopherRepetitionFilter(),
        "C4": C4QualityFilter(filter_no_terminal_punct=False, min_words_per_line=-1),
        "FineWeb": FineWebQualityFilter(),
    }


def apply(name: str, texts: list[str]) -> int:
    """Applies a step to texts; returns how many are kept."""
    if name.startswith("signing"):
        return len(_signed(texts, name))
    if name == "MinHash":
        signer = _signer()
        return sum(1 for text in texts if signer.get_signature(signer.get_shingles(text)))
    if name == "extraction":
        extract = _extractor()
        return sum(1 for text in texts if extract(text))
    if name == "whole":
        return _whole(texts)
    step = _known("filters", _filters)[name]
    return sum(step.filter(document) is True for document in map(_document, texts))


def _whole(texts: list[str]) -> int:
    extract, signer, filters = _extractor(), _signer(), _known("filters", _filters)
    kept = 0
    for page in texts:
        document = _document(extract(page) or "")
        if document.text and all(step.filter(document) is True for step in filters.values()):
            signer.get_signature(signer.get_shingles(document.text))
            kept += 1
    return kept


_made: dict = {}


def _known(name: str, make):
    """An input that is made once: it is not timed."""
    if name not in _made:
        _made[name] = make()
    return _made[name]


def _document(text: str):
    from datatrove.data import Document

    return Document(text=text, id="0")


def _extractor():
    from datatrove.pipeline.extractors import Trafilatura

    return _known("extractor", Trafilatura).extract


def _signer():
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature

    def make():
        config = MinhashConfig(n_grams=NGRAM, num_buckets=BANDS, hashes_per_bucket=ROWS)
        return MinhashDedupSignature(output_folder="/tmp/none", config=config)

    return _known("signer", make)


def _ngrams(text: str) -> list[str]:
    words = WORD.findall(text.lower())
    return [" ".join(words[n : n + NGRAM]) for n in range(max(len(words) - NGRAM + 1, 1))]


def _signed(texts: list[str], name: str) -> list[list[bytes]]:
    """Bands of signatures by rensa or datasketch."""
    import numpy as np

    found = []
    for text in texts:
        ngrams = _ngrams(text)
        if name == "signing rensa":
            from rensa import RMinHash

            minhash = RMinHash(num_perm=BANDS * ROWS, seed=1)
            minhash.update(ngrams)
            values = np.asarray(minhash.digest(), np.uint64)
        else:
            from datasketch import MinHash

            minhash = MinHash(num_perm=BANDS * ROWS, seed=1, scheme="affine32")
            minhash.update_batch([ngram.encode() for ngram in ngrams])
            values = np.asarray(minhash.hashvalues)
        found.append([band.tobytes() for band in values.reshape(BANDS, ROWS)])
    return found


def pairs(texts: list[str]) -> list[list[int]]:
    """Pairs that share a band of rensa's signatures."""
    return by_step(_signed(texts, "signing rensa"))


if __name__ == "__main__":
    keep_to_cores(1)
    side = Side(apply, pairs)
    serve({"prepare": side.prepare, "run": side.run, "pairs": side.pairs})
