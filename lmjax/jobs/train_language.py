"""Trains the model of languages on parallel paragraphs, and tests it on held-out articles.

python -m lmjax.jobs.train_language path='xquad/xquad.{}.json.gz'
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from lmjax.config import UserError, config
from lmjax.data.cleaning.languages import LanguageModel, language_of, train_languages
from lmjax.data.files import open_file, read_blocks
from lmjax.jobs.job import Job
from lmjax.launch import run

MODEL = "languages.npz"
# Of XQuAD.
LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
EVERY = 4  # one of so many articles is held out for the test
SHORTEST = 20  # characters of a sentence
UNSPACED = 80  # characters of Thai that are taken for a sentence: it has no mark at its end
SENTENCE = re.compile("(?<=[.!?\u0964])\\s+|(?<=[\u3002\uff01\uff1f])")

Articles = Mapping[str, list[list[str]]]  # by language, the paragraphs of each article


@config
class TrainLanguage(Job):
    """Train the model of `LanguageFilter` on paragraphs in the layout of SQuAD.

    The report is about one article of four, by a model that has not seen them in any language; the
    model that is kept has seen all.
    """

    output: str = "runs/languages"  # folder of the model and its report
    path: str = ""  # files, with {} for the code of the language: "xquad/xquad.{}.json.gz"
    languages: tuple[str, ...] = LANGUAGES  # codes
    bits: int = 15  # binary logarithm of the number of buckets

    def validate(self) -> None:
        """Raises UserError for settings that cannot be meant."""
        if self.path and "{}" not in self.path:
            raise UserError(f"path={self.path} has no {{}} for the code of the language")
        if not 8 <= self.bits <= 20:
            raise UserError(f"bits={self.bits}: must be from 8 to 20")

    def run(self) -> None:
        """See `Job.run`. UserError: the files cannot be read."""
        from lmjax.console import RunLog, Table, make_console
        from lmjax.jobs.report import write_report
        from lmjax.jobs.results import Results
        from lmjax.runs.folder import RESULTS
        from lmjax.runs.lock import lock_run_folder

        if not self.path:
            raise UserError("path: give the files; see python -m lmjax.jobs.train_language --help")
        with lock_run_folder(self) as folder:
            log = RunLog(make_console())
            log.title(folder.path.name, folder.location)
            if not folder.results():
                articles = {code: _articles(self.path.format(code)) for code in self.languages}
                rows = tuple(_rows(self._model(articles, held_out=True), articles))
                self._model(articles, held_out=False).save(folder.path / MODEL)
                columns = ("language", "sentences", "paragraphs right", "sentences right")
                caption = f"Shares, of one article of {EVERY}, which the model has not seen."
                tables = (Table("Languages", columns, rows, caption),)
                folder.write_json(RESULTS, Results(step=1, tables=tables).to_json())
                write_report(folder)
            for table in Results.from_json(folder.results()).tables:
                log.table(table)
            log.files(folder.path, [("the model", str(folder.path / MODEL))])

    def _model(self, articles: Articles, held_out: bool) -> LanguageModel:
        """A model of all articles, or of those that are not held out."""
        texts = {
            code: [p for n, own in enumerate(found) if n % EVERY or not held_out for p in own]
            for code, found in articles.items()
        }
        return train_languages(texts, self.bits)


def _articles(path: str) -> list[list[str]]:
    """The paragraphs of each article of a file. UserError: it is none of SQuAD's layout."""
    with open_file(path) as file:
        data = b"".join(read_blocks(file, path))
    try:
        return [[one["context"] for one in a["paragraphs"]] for a in json.loads(data)["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} has not SQuAD's layout: {type(error).__name__} {error}") from None


def _rows(model: LanguageModel, articles: Articles) -> Iterator[tuple[str, int, float, float]]:
    """A language, sentences, and shares of paragraphs and sentences that are right."""
    totals = [0, 0, 0, 0]
    for code, found in articles.items():
        paragraphs = [p for own in found[::EVERY] for p in own]
        sentences = [s for p in paragraphs for s in _sentences(p, code)]
        right = [
            sum(language_of(text, model)[0] == code for text in texts)
            for texts in (paragraphs, sentences)
        ]
        numbers = (len(paragraphs), len(sentences), *right)
        totals = [total + number for total, number in zip(totals, numbers)]
        yield code, numbers[1], right[0] / numbers[0], right[1] / numbers[1]
    yield "all", totals[1], totals[2] / totals[0], totals[3] / totals[1]


def _sentences(paragraph: str, code: str) -> list[str]:
    if code == "th":
        starts = range(0, len(paragraph), UNSPACED)
        parts = [paragraph[start : start + UNSPACED] for start in starts]
    else:
        parts = SENTENCE.split(paragraph)
    return [one for one in map(str.strip, parts) if len(one) >= SHORTEST]


if __name__ == "__main__":
    run(TrainLanguage(), positional="path")
