"""Trains a model of n-grams of one language, for the step `Perplexity`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from lmjax.config import UserError, config
from lmjax.data.cleaning.ngram_model import train_ngrams
from lmjax.data.cleaning.perplexity import MODEL, TOKENIZER, PieceModel, part_of
from lmjax.data.documents import Source, is_held_out
from lmjax.data.tokenizers import TokenizerConfig, TrainedBPE
from lmjax.data.tokenizers.listed_texts import ListedTexts
from lmjax.jobs.job import Job
from lmjax.launch import run

STEPS = 100  # of the quantiles that are kept


@config
class TrainPerplexity(Job):
    """Train a model of n-grams on good text of a language, and tell the perplexity of documents.

    CCNet (Wenzek et al. 2020, arXiv:1911.00359) takes articles of Wikipedia for the model, pieces
    of SentencePiece, and for the thirds the documents that are to be cleaned. The output is read by
    `Perplexity(models="runs/perplexity/{}", languages=("en",))`.
    """

    output: str = "runs/perplexity/en"  # folder of the model and its report
    texts: tuple[Source, ...] = ()  # good text of one language
    # Documents whose perplexities are divided into thirds, such as pages; none: those of `texts`
    # that are held out.
    compared: tuple[Source, ...] = ()
    tokenizer: TokenizerConfig = TrainedBPE(vocab_size=8192)  # of the pieces
    order: int = 5  # pieces of the longest n-gram
    least: int = 1  # times that an n-gram of three or more pieces occurs
    most: int = 100_000  # documents of both kinds, the first ones
    held_out: float = 0.05  # share of the documents of `texts` that the report is about

    def validate(self) -> None:
        """Raises UserError for settings that cannot be meant."""
        if self.order < 1 or self.least < 1 or self.most < 1 or not 0 < self.held_out < 1:
            raise UserError(
                f"order={self.order}, least={self.least}, most={self.most}, held_out="
                f"{self.held_out}: must be 1 or more, and between 0 and 1"
            )

    def run(self) -> None:
        """See `Job.run`. UserError: there is no text."""
        from lmjax.console import RunLog, make_console
        from lmjax.jobs.report import write_report
        from lmjax.jobs.results import Results
        from lmjax.runs.folder import RESULTS
        from lmjax.runs.lock import lock_run_folder

        with lock_run_folder(self) as folder:
            log = RunLog(make_console())
            log.title(folder.path.name, folder.location)
            if not folder.results():
                texts = [(d.text, is_held_out(d, self.held_out)) for d in self._some(self.texts)]
                learned = [text for text, held in texts if not held]
                held = [text for text, held in texts if held]
                compared = [d.text for d in self._some(self.compared)] or held
                if not learned or not compared:
                    raise UserError(
                        f"texts: {len(learned)} documents to learn from and {len(compared)} to "
                        "compare are too few"
                    )
                with log.phase("training"):
                    model = self._trained(learned)
                    values = np.array([model.perplexity(text) for text in compared])
                    finite = values[np.isfinite(values)]
                    quantiles = np.quantile(finite, np.linspace(0, 1, STEPS + 1))
                    ngrams = model.ngrams._replace(quantiles=quantiles)
                model.tokenizer.save(folder.path / TOKENIZER)
                ngrams.save(folder.path / MODEL)
                tables = (_thirds(finite, quantiles), _documents(model, {"held out": held}))
                folder.write_json(RESULTS, Results(step=1, tables=tables).to_json())
                write_report(folder)
            for table in Results.from_json(folder.results()).tables:
                log.table(table)
            log.files(folder.path, [("the model", str(folder.path / MODEL))])

    def _some(self, sources: tuple[Source, ...]) -> Iterator:
        every = itertools.chain.from_iterable(source.documents() for source in sources)
        return itertools.islice((one for one in every if one.text.strip()), self.most)

    def _trained(self, texts: Sequence[str]) -> PieceModel:
        tokenizer = self.tokenizer.build(ListedTexts(texts))
        pieces = tokenizer.encode_batch(texts)
        return PieceModel(
            tokenizer, train_ngrams(pieces, tokenizer.vocab_size, self.order, self.least)
        )


def _thirds(values: np.ndarray, quantiles: np.ndarray):
    """The table of CCNet's parts of the compared documents."""
    from lmjax.console import Table

    shares = np.interp(values, quantiles, np.linspace(0, 1, len(quantiles)))
    names = np.array([part_of(share) for share in shares])
    rows = tuple(
        (name, int((names == name).sum()), float(np.median(values[names == name])))
        for name in ("head", "middle", "tail")
        if (names == name).any()
    )
    columns = ("part", "documents", "perplexity, median")
    return Table("Parts", columns, rows, "Thirds of the compared documents, by perplexity.")


def _documents(model: PieceModel, kinds: dict[str, Sequence[str]]):
    """The table of the perplexities of kinds of documents."""
    from lmjax.console import Table

    rows = []
    for name, texts in kinds.items():
        values = [model.perplexity(text) for text in texts]
        if values:
            rows.append((name, len(values), float(np.median(values))))
    columns = ("documents", "number", "perplexity, median")
    return Table("Perplexity", columns, tuple(rows), "Of a piece.", more_is_better=False)


if __name__ == "__main__":
    run(TrainPerplexity())
