"""Exams of any kind: question, options, answer and subject, in the layouts of public sets."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from lmjax.config import config
from lmjax.evaluation.tasks.choices import (
    ACCURACY,
    BY_CHARACTERS,
    ChoiceTask,
    chosen_letters,
    letter_of,
)
from lmjax.evaluation.tasks.mmlu import subject_of
from lmjax.evaluation.tasks.records import Record, read_records
from lmjax.evaluation.tasks.task import Item, Measure

OPTION = re.compile(r"^\s*[(（]?([A-G])[)）.．、]\s*")  # the letter in front of an option
LETTERS = "ABCDEFG"


@config
class Exam(ChoiceTask):
    """Questions with lettered options, from CSV or JSON lines; subjects are named or files.

    C-Eval (id, question, A to D, answer), CMMLU (Question, A to D, Answer), AGIEval and its Gaokao
    (passage, question, options, label), and Gaokao-Bench (question with its options, answer) are
    read as they are. Items with several right answers, or with none to choose from, are left out;
    the table of scores says how many.
    """

    language: Literal["zh", "en"] = "zh"  # of what stands before the answer
    heading: str = ""  # in front of the examples; {subject} is the subject

    measures: ClassVar[tuple[Measure, ...]] = (ACCURACY, BY_CHARACTERS)
    draws: ClassVar[bool] = False

    def read_item(self, record: Record) -> Item | None:
        """See `EvaluationTask.read_item`."""
        question = record.text("question", "Question", "query").strip()
        passage = record.values.get("passage")
        if isinstance(passage, str) and passage.strip():
            question = f"{passage.strip()}\n{question}"
        if record.values.get("options", record.values.get("choices", "")) is None:
            return None  # the answer is to be written
        options, letters = self._options(record)
        answer = record.value(*self._answers(record))
        if isinstance(answer, (list, tuple)):
            if len(answer) != 1:
                return None
            [answer] = answer
        count = len(letters)
        if (
            isinstance(answer, str)
            and len(answer.strip()) > 1
            and set(answer.strip()) <= {*LETTERS}
        ):
            return None  # several are right
        gold = record.index(answer, count, "answer")
        lines = f"\n{chosen_letters(options)}" if options else ""
        before = "答案：" if self.language == "zh" else "Answer:"
        subject = str(record.values.get("subject") or subject_of(record.file))
        prompt = f"{question}{lines}\n{before}"
        return Item(prompt, letters[gold], letters, gold, subject, record.where)

    def left_out(self) -> int:
        """See `EvaluationTask.left_out`."""
        return sum(self.read_item(record) is None for record in read_records(self.path))

    def _answers(self, record: Record) -> list[str]:
        """Names that the answer may have, those that hold nothing last."""
        names = ("answer", "Answer", "label", "gold")
        return sorted(names, key=lambda name: record.values.get(name) is None)

    def _options(self, record: Record) -> tuple[list[str], tuple[str, ...]]:
        """Texts of the options, none where the question holds them, and their letters."""
        if record.has("A"):
            names = [letter for letter in LETTERS if record.values.get(letter) not in (None, "")]
            texts = [str(record.values[name]) for name in names]
        elif record.has("options") or record.has("choices"):
            texts = [OPTION.sub("", text) for text in record.texts("options", "choices")]
        else:
            return [], tuple("ABCD")
        return texts, tuple(map(letter_of, range(len(texts))))

    def description(self, subject: str) -> str:
        """See `EvaluationTask.description`."""
        if not self.heading:
            return ""
        return self.heading.replace("{subject}", subject.replace("_", " ")) + "\n\n"
