"""Pretraining text in domains, as the experiments with papers' recipes read it."""

from lmjax.config import replace
from lmjax.data import Data, Domain, JsonLines, Stage, TrainedBPE, WithTokens


def text(vocabulary: int, stages: tuple[Stage, ...] = (), **weights: float | int) -> Data:
    """Domains by name and weight, each read from text/NAME/*.jsonl.zst ("text" on every line).

    The tokenizer is trained on them, to `vocabulary` tokens. To take a public one:
    data.tokenizer=TokenizerFolder data.tokenizer.path=FOLDER.
    """
    return Data(
        train=tuple(
            Domain(name=name, source=JsonLines(path=f"text/{name}/*.jsonl.zst"), weight=weight)
            for name, weight in weights.items()
        ),
        stages=stages,
        tokenizer=TrainedBPE(vocab_size=vocabulary, sample_bytes=2_000_000_000),
        held_out=1e-4,
        workers=8,
        tokenize_workers=32,
    )


def with_tokens(data: Data, *names: str) -> Data:
    """The same text; special tokens stand behind the vocabulary."""
    return replace(data, tokenizer=WithTokens(tokenizer=data.tokenizer, tokens=names))
