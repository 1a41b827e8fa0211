"""Texts that the model writes beside those of people: translations, summaries, answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from lmjax.config import UserError, config
from lmjax.data.cleaning.units import has_spaceless, split_sentences
from lmjax.evaluation.bleu import bleu_counts, bleu_of, corpus_bleu
from lmjax.evaluation.bleu_tokens import BleuTokenizer
from lmjax.evaluation.chrf import chrf_counts, chrf_of
from lmjax.evaluation.requests import ModelRequest, Written, WrittenRequest
from lmjax.evaluation.rouge import KINDS, RougeTokenizer, rouge
from lmjax.evaluation.span_measures import answer_f1, exact_match
from lmjax.evaluation.tasks.records import Record
from lmjax.evaluation.tasks.squad import character_scores
from lmjax.evaluation.tasks.task import EvaluationTask, Item, ItemScores, Measure

WORDS = 2  # longest n-grams of words in chrF++
TextMeasure = Literal[
    *("bleu", "chrf", "chrf++", "rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match", "f1")
]


def _bleu(totals: np.ndarray) -> float:
    return bleu_of(totals).score


def _chrf(totals: np.ndarray) -> float:
    return chrf_of(totals.reshape(-1, 3))


# BLEU and chrF are of the whole corpus, in percent; ROUGE (its F1) and the rest are means.
CORPUS = {
    "bleu": Measure("bleu", kind="corpus", of=_bleu),
    "chrf": Measure("chrf", kind="corpus", of=_chrf),
    "chrf++": Measure("chrf++", kind="corpus", of=_chrf),
}


@config
class WrittenTexts(EvaluationTask):
    """Lines with a prompt and the texts of people, one or more, that an answer is compared with."""

    field: str = "prompt"  # of a line: what the model is given
    references: str = "references"  # of a line: a text of people, or a list of them
    # exact match and F1 are SQuAD's, ROUGE its F1; BLEU, chrF and chrF++ are of the whole corpus
    compared_by: tuple[TextMeasure, ...] = ("bleu", "chrf", "rougeL")
    bleu_tokenizer: BleuTokenizer | None = None  # none: 13a, for languages with spaces
    rouge_tokenizer: RougeTokenizer | None = None  # none: english, for texts that it can read
    # for exact match and F1, characters of languages without spaces are words of their own
    by_characters: bool = False
    stop: tuple[str, ...] = ("\n",)  # an answer ends before the first of them
    max_tokens: int = 128  # most tokens of an answer

    generates: ClassVar[bool] = True

    def validate(self) -> None:
        """Raises UserError for settings that cannot be meant."""
        super().validate()
        if not self.compared_by or self.max_tokens < 1:
            raise UserError(
                f"compared_by={self.compared_by}, max_tokens={self.max_tokens}: give one or more"
            )

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Numbers that `compared_by` names."""
        return tuple(CORPUS.get(name, Measure(name)) for name in self.compared_by)

    def prompt(self, text: str) -> str:
        """The question that a text of a line makes."""
        return text

    def read_item(self, record: Record) -> Item:
        """See `EvaluationTask.read_item`."""
        value = record.value(self.references)
        wanted = (value,) if isinstance(value, str) else record.texts(self.references)
        prompt = self.prompt(record.text(self.field))
        details = {"references": wanted}
        return Item(prompt, wanted[0], identity=record.where, details=details)

    def read_items(self, path: str) -> list[Item]:
        """See `EvaluationTask.read_items`; UserError for texts that a measure cannot read."""
        items = super().read_items(path)
        wanted = [item.details["references"] for item in items]
        if "bleu" in self.compared_by:
            corpus_bleu([given[0] for given in wanted], wanted, self.bleu_tokenizer)
        if {*self.compared_by} & {*KINDS}:
            for given in wanted:
                rouge("", given, KINDS[:1], self.rouge_tokenizer)
        if {"exact_match", "f1"} & {*self.compared_by} and not self.by_characters:
            for item, given in zip(items, wanted, strict=True):
                if any(map(has_spaceless, given)):
                    raise UserError(
                        f"{item.identity}: {given[0][:30]!r} has no spaces between the words that "
                        "F1 counts: set by_characters=true"
                    )
        return items

    def requests(self, item: Item, context: str) -> tuple[ModelRequest, ...]:
        """See `EvaluationTask.requests`: the likeliest text."""
        return (WrittenRequest(context, self.stop, self.max_tokens),)

    def kept(self, text: str) -> str:
        """The part of a written text that is compared."""
        return text.strip()

    def measure(self, item: Item, answers: Sequence[Written]) -> ItemScores:
        """See `EvaluationTask.measure`."""
        text, wanted = self.kept(answers[0].texts[0]), item.details["references"]
        kinds = [name for name in self.compared_by if name in KINDS]
        scores = rouge(text, wanted, kinds, self.rouge_tokenizer) if kinds else {}
        return {name: self._score(name, text, wanted, scores) for name in self.compared_by}

    def _score(self, name, text, wanted, scores) -> float | tuple[float, ...]:
        if name == "bleu":
            return corpus_row(bleu_counts([text], [wanted], self.bleu_tokenizer))
        if name in CORPUS:
            return corpus_row(chrf_counts([text], [wanted], word_order=WORDS * (name == "chrf++")))
        if name in scores:
            return scores[name].f1
        if self.by_characters:
            return character_scores(text, wanted)[name]
        return (exact_match if name == "exact_match" else answer_f1)(text, wanted)

    def stop_rule(self) -> str:
        """See `EvaluationTask.stop_rule`."""
        return ", ".join([*map(repr, self.stop), f"the end token, or {self.max_tokens} tokens"])


@config
class Translation(WrittenTexts):
    """Translations, as GPT-2 was asked for them: lines "a sentence = its translation".

    (Radford et al. 2019, section 3.7.) Without examples, no model knows the language that is meant.
    """

    field: str = "source"  # of a line: the sentence
    references: str = "target"  # of a line: its translation, or a list of them
    compared_by: tuple[TextMeasure, ...] = ("bleu", "chrf")  # measures of a text

    separator: ClassVar[str] = "\n"

    def prompt(self, text: str) -> str:
        """See `WrittenTexts.prompt`."""
        return f"{text} ="


@config
class Summaries(WrittenTexts):
    """Summaries, as GPT-2 was asked for them: the sentences behind "TL;DR:".

    (Radford et al. 2019, section 3.6, where they are drawn from the two likeliest tokens.)
    """

    field: str = "document"  # of a line: the text
    references: str = "summary"  # of a line: its summary, or a list of them
    # measures of a text
    compared_by: tuple[TextMeasure, ...] = ("rouge1", "rouge2", "rougeL")
    stop: tuple[str, ...] = ()  # an answer ends before the first of them
    max_tokens: int = 100  # most tokens of an answer
    sentences: int = 3  # of an answer that are compared, the first ones

    def prompt(self, text: str) -> str:
        """See `WrittenTexts.prompt`."""
        return f"{text}\nTL;DR:"

    def kept(self, text: str) -> str:
        """See `WrittenTexts.kept`."""
        return " ".join(split_sentences(text)[: self.sentences])


def corpus_row(counts: np.ndarray) -> tuple[float, ...]:
    """Counts that one text adds to those of a corpus."""
    return tuple(map(float, counts[0].ravel()))
