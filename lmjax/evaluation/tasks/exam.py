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
from lmjax.evaluation.tasks.records import Record
from lmjax.evaluation.tasks.task import Item, Measure

OPTION = re.compile(r"^\s*[(（]?([A-G])[)）.．、]\s*")  # the letter in front of an option
LETTERS = "ABCDEFG"


@config
class Exam(ChoiceTask):
    """Questions with lettered options, from CSV or JSON lines; subjects are named or files.

    C-Eval (id, question, A to D, answer), CMMLU (Question, A to D, Answer), AGIEval and its Gaokao
    (passage, question, options, label), and Gaokao-Bench (question with its options, answer) are
    read as they are. Items with several right answers are left out, and counted.
    """

    language: Literal["zh", "en"] = "zh"  # of what stands before the answer
    heading: str = ""  # in front of the examples; {subject} is the subject

    measures: ClassVar[tuple[Measure, ...]] = (ACCURACY, BY_CHARACTERS)
    draws: ClassVar[bool] = False

    def read_item(self, record: Record) -> Item | None:
        """See `EvaluationTask.read_item`."""
        question = record.text("question", "Question", "query").strip()
        if record.has("passage") and isinstance(record.values["passage"], str):
            question = f"{record.text('passage').strip()}\n{question}"
        options, letters = self._options(record)
        answer = record.value("answer", "Answer", "label", "gold")
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
