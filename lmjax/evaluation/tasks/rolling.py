"""Perplexity of whole texts: WikiText (Merity et al. 2016, arXiv:1609.07843), and any other."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lmjax.config import UserError, config
from lmjax.data.cleaning.units import split_words
from lmjax.evaluation.requests import Likelihood, ModelRequest, RollingRequest
from lmjax.evaluation.tasks.records import TFDS, Record, read_files
from lmjax.evaluation.tasks.task import EvaluationTask, Item, ItemScores, Measure

HEADING = re.compile(r"^ = (?!=).*(?<!=) = $", re.MULTILINE)  # where an article of WikiText begins
# Spaces that WikiText's tokenization put round signs, and how a text has them, in this order.
SPELLINGS = (
    ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "),
    (" . ", ". "), (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
)  # fmt: skip
PAIRS = ((r"\(", r"\)", "()"), (r"\[", r"\]", "[]"), ("{", "}", "{}"), ('"', '"', '""'),
         ("'", "'", "''"))  # fmt: skip
ENDINGS = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (f" {chr(176)} ", chr(176)),
    (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip


def untokenized(text: str) -> str:
    """Text of WikiText as one writes it, by the rules that most evaluations share."""
    for old, new in SPELLINGS:
        text = text.replace(old, new)
    for opening, closing, (left, right) in PAIRS:
        inside = re.sub(r"\\", "", closing)
        text = re.sub(
            rf"{opening}\s*([^{re.escape(inside)}]*?)\s*{closing}", rf"{left}\1{right}", text
        )
    for old, new in ENDINGS:
        text = text.replace(old, new)
    return text


def check_words(text: str, where: str, way_out: str) -> None:
    """Raises UserError for a text of a script without spaces, which has no words between blanks."""
    if split_words(text).spaceless:
        raise UserError(
            f"{where}: {text.strip()[:30]!r} has no spaces between the words that word_perplexity "
            f"counts: {way_out}"
        )


def rates(answer: Likelihood, text: str, measures: Sequence[Measure]) -> ItemScores:
    """Log-likelihood of a text, with what each rate is per in it."""
    counts = {
        "word": len(re.split(r"\s+", text)),
        "byte": len(text.encode("utf-8")),
        "character": len(text),
    }
    return {one.name: (answer.log_probability, float(counts[one.per])) for one in measures}


# Logarithms are added up: no exponential is taken of more than a mean.
RATES = (
    Measure("word_perplexity", False, "rate", "word"),
    Measure("byte_perplexity", False, "rate", "byte"),
    Measure("bits_per_byte", False, "rate", "byte"),
    Measure("character_perplexity", False, "rate", "character"),
    Measure("bits_per_character", False, "rate", "character"),
)


@config
class WholeTexts(EvaluationTask):
    """Perplexity of whole texts, by word, byte and character; lines with a field text or page."""

    by_words: bool = True  # also by words between blanks, which not all languages have
    # tokens that a window of a text longer than the context scores, behind as many others as there
    # is room for: fewer take longer and hide less; none: windows stand beside each other, as in
    # EleutherAI's harness
    stride: int | None = None

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Rates, per word only with `by_words`."""
        return tuple(one for one in RATES if self.by_words or one.per != "word")

    def validate(self) -> None:
        """Raises UserError for examples, as there are no questions, and for a stride of nothing."""
        super().validate()
        if self.shots:
            raise UserError(f"{self.name}: shots={self.shots}: whole texts have no examples")
        if self.stride is not None and self.stride < 1:
            raise UserError(f"stride={self.stride}: must be 1 or more")

    def read_items(self, path: str) -> list[Item]:
        """See `EvaluationTask.read_items`; a file of plain text is one item."""
        if path.startswith(TFDS) or ".json" in path.rpartition("/")[2]:
            return super().read_items(path)
        return [self._item(file.text, file.name) for file in read_files(path) if file.text]

    def read_item(self, record: Record) -> Item | None:
        """See `EvaluationTask.read_item`."""
        text = record.text("text", "page")
        return self._item(text, record.where) if text.strip() else None

    def _item(self, text: str, where: str) -> Item:
        if self.by_words:
            check_words(text, where, "set by_words=false")
        return Item(text, "", identity=where)

    def scored_text(self, item: Item) -> str:
        """The text that the model scores; words and bytes are counted in the item's own."""
        return item.prompt

    def requests(self, item: Item, context: str) -> tuple[ModelRequest, ...]:
        """See `EvaluationTask.requests`."""
        return (RollingRequest(self.scored_text(item), self.stride),)

    def measure(self, item: Item, answers: Sequence[Likelihood]) -> ItemScores:
        """See `EvaluationTask.measure`."""
        [answer] = answers
        return rates(answer, item.prompt, self.measures)


@config
class WikiText(WholeTexts):
    """WikiText by article: scored as text, measured by the words of the tokenized file."""

    def read_items(self, path: str) -> list[Item]:
        """See `EvaluationTask.read_items`: files of tokens are cut at the articles' headings."""
        if path.startswith(TFDS) or ".json" in path.rpartition("/")[2]:
            return super().read_items(path)
        items = []
        for file in read_files(path):
            starts = [match.start() for match in HEADING.finditer(file.text)]
            if not starts:
                raise UserError(f"{file.name} has no heading ' = Title = ' of an article")
            for number, (first, last) in enumerate(zip(starts, [*starts[1:], None])):
                text = file.text[first:last]
                items.append(self._item(text, f"{file.name}, article {number + 1}"))
        return items

    def scored_text(self, item: Item) -> str:
        """See `WholeTexts.scored_text`."""
        return untokenized(item.prompt)
