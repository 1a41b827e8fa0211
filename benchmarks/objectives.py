"""Speed at which objectives make examples of stored tokens, on one core: the work of a loader.

python -m benchmarks.objectives [length=512] [rows=16] [documents=(30,300,3000)] [json=FILE]

Tokens a second are those that the model reads, padding included. The bound is 20,000: four workers
then feed a model of 1B parameters on one H200.
"""

import sys
from typing import Any

import numpy as np

from benchmarks.harness import keep_to_cores, save, seconds_of, spread, table
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line
from lmjax.objectives import (
    BlankInfilling,
    CausalLM,
    DocumentBlank,
    MaskedLM,
    PermutationLM,
    PrefixLM,
    SentenceBlanks,
    SpanCorruption,
    TextObjective,
    TokenBlanks,
    TokenTable,
)
from lmjax.objectives.glm import glm_130b_objective, glm_objective

BOUND = 20_000  # tokens a second
VOCABULARY = 50_000
NAMES = ("[MASK]", "[sMASK]", "[gMASK]", "[dBLOCK]", "<|startofpiece|>", "<|endofpiece|>")
NAMES = (*NAMES, "<sop>", "<eop>", "[CLS]", "[SEP]", "<pad>")
OBJECTIVES: dict[str, TextObjective] = {
    "CausalLM": CausalLM(),
    "PrefixLM": PrefixLM(),
    "BlankInfilling, tokens": BlankInfilling(),
    "BlankInfilling, whole words": BlankInfilling(blanks=TokenBlanks(whole_words=True)),
    "BlankInfilling, sentences": BlankInfilling(blanks=SentenceBlanks()),
    "BlankInfilling, documents": BlankInfilling(blanks=DocumentBlank()),
    "GLM 10B": glm_objective("10B"),
    "GLM-130B": glm_130b_objective(),
    "MaskedLM": MaskedLM(),
    "MaskedLM, whole words": MaskedLM(whole_words=True),
    "MaskedLM, next sentence": MaskedLM(pair="next sentence"),
    "MaskedLM, sentence order": MaskedLM(pair="sentence order"),
    "SpanCorruption": SpanCorruption(),
    "SpanCorruption, documents": SpanCorruption(cross_documents=False),
    "PermutationLM": PermutationLM(),
}


@config
class ObjectivesBenchmark:
    """Random words in documents of about equal length."""

    length: int = 512  # tokens that the model reads in a row
    rows: int = 16  # in an example
    documents: tuple[int, ...] = (30, 300, 3000)  # mean tokens of a document; each is measured
    count: int = 10  # examples that are timed, after one that is not
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for numbers that measure nothing."""
        if min(self.length, self.rows, self.count, *self.documents) < 1 or not self.documents:
            raise UserError("length, rows, count and documents are at least 1")


def make_lexicon() -> TokenTable:
    """One token in 20 ends a sentence, two in three begin a word, one in 30 is white space."""
    ids = np.arange(VOCABULARY)
    special = {name: number for number, name in enumerate(NAMES, 2)}
    special |= {f"<extra_id_{number}>": VOCABULARY - 1 - number for number in range(1000)}
    return TokenTable(
        special=special,
        begin=0,
        end=1,
        words=ids[100:-1000],
        ends_sentence=ids % 20 == 0,
        begins_word=ids % 3 > 0,
        ends_word=ids < 100,
        is_space=ids % 30 == 7,
    )


def make_rows(settings: ObjectivesBenchmark, mean: int, row_length: int) -> tuple[np.ndarray, ...]:
    """Tokens, segments and seeds of an example; the lengths of documents differ by up to a half."""
    rng = np.random.default_rng(0)
    shape = (settings.rows, row_length)
    tokens = rng.integers(100, VOCABULARY - 1000, shape).astype(np.int32)
    segments = np.ones(shape, np.int32)
    for row in range(settings.rows):
        sizes = rng.integers(mean // 2, mean + mean // 2 + 1, 2 + 2 * row_length // mean)
        edges = np.cumsum(np.maximum(sizes, 3)) - rng.integers(0, mean)
        edges = edges[(edges > 1) & (edges < row_length)]
        tokens[row, edges], tokens[row, edges - 1] = 0, 1
        segments[row] += np.searchsorted(edges, np.arange(row_length), side="right")
    return tokens, segments, rng.integers(0, 2**63, settings.rows).astype(np.uint64)


def measure(settings: ObjectivesBenchmark) -> dict[str, dict[str, Any]]:
    """Tokens a second and the share of padding, by objective and length of documents."""
    lexicon, found = make_lexicon(), {}
    for name, objective in OBJECTIVES.items():
        prepare = objective.preparation(lexicon, settings.length)
        found[name] = {}
        for mean in settings.documents:
            rows = make_rows(settings, mean, objective.row_length(settings.length))
            example = prepare(*rows)
            seconds = spread(
                seconds_of(lambda prepare=prepare, rows=rows: prepare(*rows), settings.count)
            )
            found[name][str(mean)] = {
                "tokens_per_second": settings.rows * settings.length / seconds["median"],
                "padding": float((example.inputs.segments == 0).mean()),
                "targets": float((example.targets.weights > 0).mean()),
            }
    return found


def main() -> None:
    """Measures, prints, and says whether the bound holds."""
    settings = from_command_line(ObjectivesBenchmark())
    keep_to_cores(1)
    found = measure(settings)
    columns = ["tokens/s, by tokens of a document", *map(str, settings.documents)]
    rows = [
        [name, *(round(entry["tokens_per_second"]) for entry in entries.values())]
        for name, entries in found.items()
    ]
    print(table(columns, rows))
    slowest = min(entry["tokens_per_second"] for e in found.values() for entry in e.values())
    print(f"\nthe bound of {BOUND:,} tokens/s {'holds' if slowest >= BOUND else 'DOES NOT HOLD'}")
    save(settings.json, "objectives", bound=BOUND, found=found)
    if slowest < BOUND:
        sys.exit(1)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
