"""Fertility of tokenizers: how many tokens does a word take, in each language?"""

from __future__ import annotations

import itertools

from lmjax.config import UserError, config
from lmjax.data.cleaning.units import split_words
from lmjax.data.documents import Source
from lmjax.data.tokenizers import Tokenizer, TokenizerConfig
from lmjax.data.tokenizers.listed_texts import ListedTexts
from lmjax.jobs.job import Job
from lmjax.launch import run


@config
class NamedText:
    """Text of a language."""

    name: str  # of the language
    source: Source  # the text


@config
class NamedTokenizer:
    """A tokenizer with a name for the report."""

    name: str  # in the report
    tokenizer: TokenizerConfig  # an existing one, or settings to train one


@config
class Fertility(Job):
    """Compare tokenizers by the tokens that they make of text in several languages.

    Fertility is the number of tokens for a word (Rust et al. 2021, arXiv:2012.15613); where words
    have no spaces between them, for a character. Bytes a token say how much shorter a text becomes.
    With parallel text, languages compare too.
    """

    output: str = "runs/fertility"  # folder of the report
    tokenizers: tuple[NamedTokenizer, ...] = ()  # that are compared
    texts: tuple[NamedText, ...] = ()  # by language
    learned: tuple[Source, ...] = ()  # text that tokenizers are trained on
    most: int = 10_000  # documents of each source, the first ones

    def validate(self) -> None:
        """Raises UserError for names that occur twice."""
        for kind in ("tokenizers", "texts"):
            names = [one.name for one in getattr(self, kind)]
            if len({*names}) < len(names):
                raise UserError(f"{kind}: give different names, got {names}")
        if self.most < 1:
            raise UserError(f"most={self.most}: must be 1 or more")

    def run(self) -> None:
        """See `Job.run`. UserError: there is nothing to compare."""
        from lmjax.console import RunLog, Table, make_console
        from lmjax.jobs.report import write_report
        from lmjax.jobs.results import Results
        from lmjax.runs.folder import RESULTS
        from lmjax.runs.lock import lock_run_folder

        if not self.tokenizers or not self.texts:
            raise UserError("tokenizers, texts: give at least one of each")
        with lock_run_folder(self) as folder:
            log = RunLog(make_console())
            log.title(folder.path.name, folder.location)
            if not folder.results():
                with log.phase("tokenizers"):
                    built = [one.tokenizer.build(self._corpus()) for one in self.tokenizers]
                for named, tokenizer in zip(self.tokenizers, built, strict=True):
                    tokenizer.save(folder.path / "tokenizers" / named.name)
                found = {one.name: measured(built, self._some(one.source)) for one in self.texts}
                columns = ("language", *(one.name for one in self.tokenizers))
                captions = (
                    "Tokens for a word; of languages without spaces, for a character.",
                    "Bytes of UTF-8 for a token.",
                )
                sizes = ", ".join(
                    f"{one.name} {tokenizer.vocab_size:,}"
                    for one, tokenizer in zip(self.tokenizers, built, strict=True)
                )
                tables = tuple(
                    Table(
                        title,
                        columns,
                        tuple((name, *row[number]) for name, row in found.items()),
                        caption,
                        more_is_better=bool(number),
                        notes=(f"Tokens of the vocabularies: {sizes}.",),
                    )
                    for number, (title, caption) in enumerate(
                        zip(("Fertility", "Bytes a token"), captions, strict=True)
                    )
                )
                folder.write_json(RESULTS, Results(step=1, tables=tables).to_json())
                write_report(folder)
            for table in Results.from_json(folder.results()).tables:
                log.table(table)

    def _some(self, source: Source) -> list[str]:
        return [one.text for one in itertools.islice(source.documents(), self.most)]

    def _corpus(self) -> ListedTexts:
        return ListedTexts([text for source in self.learned for text in self._some(source)])


def measured(tokenizers: list[Tokenizer], texts: list[str]) -> tuple[list[float], list[float]]:
    """Tokens a word, and bytes a token, of some texts by each tokenizer.

    UserError: the texts have no word.
    """
    words = sum(len(split_words(text).texts) for text in texts)
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if not words:
        raise UserError("texts: there is a language without a word")
    counts = [sum(map(len, one.encode_batch(texts))) for one in tokenizers]
    return [count / words for count in counts], [size / max(count, 1) for count in counts]


if __name__ == "__main__":
    run(Fertility())
