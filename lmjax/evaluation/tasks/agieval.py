"""AGIEval: entrance and qualification exams (Zhong et al. 2023, arXiv:2304.06364)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lmjax.config import config
from lmjax.data.cleaning.units import has_spaceless
from lmjax.evaluation.tasks.choices import ACCURACY, BY_CHARACTERS, ChoiceTask, letter_of
from lmjax.evaluation.tasks.records import Record, read_records
from lmjax.evaluation.tasks.task import Item, Measure

# The authors' zero-shot prompts: before the question, before the options, before the answer.
ENGLISH = "Q: ", "Answer Choices: ", "A: Among A through {}, the answer is"
CHINESE = "问题：", "选项：", "答案：从A到{}, 我们应选择"
LETTERS = "ABCDEFG"


@config
class AGIEval(ChoiceTask):
    """AGIEval's choices: each option is scored as a text behind the question.

    Reads the hub's copies that EleutherAI's harness takes (query, choices, gold), and the authors'
    files (passage, question, options, label), which get the same words. Where several options are
    right, each is. Questions without options are left out, and counted; `Exam` reads the authors'
    files too, and scores the letters of the options.
    """

    measures: ClassVar[tuple[Measure, ...]] = (ACCURACY, BY_CHARACTERS)

    def read_item(self, record: Record) -> Item | None:
        """See `EvaluationTask.read_item`."""
        if record.has("query"):
            prompt, options = record.text("query"), record.texts("choices")
            right = record.value("gold")
        elif record.values.get("options"):
            options = record.texts("options")
            prompt, right = self._prompt(record, options), record.value("label")
        else:
            return None  # the answer is to be written
        golds = tuple(record.index(one, len(options), "gold") for one in _each(right))
        if not golds:
            raise record.wrong("gold", right, "one right option or more")
        gold, details = golds[0], {"golds": golds}
        return Item(prompt, options[gold], options, gold, record.file, record.where, details)

    def _prompt(self, record: Record, options: Sequence[str]) -> str:
        """A question of the authors' files with its options."""
        question = record.text("question")
        asked, before, answer = CHINESE if has_spaceless(question) else ENGLISH
        last = letter_of(len(options) - 1)
        passage = record.values.get("passage") or ""
        return f"{passage}{asked}{question} {before}{' '.join(options)}\n{answer.format(last)}"

    def left_out(self) -> int:
        """See `EvaluationTask.left_out`."""
        return sum(self.read_item(record) is None for record in read_records(self.path))


def _each(right: Any) -> Sequence[Any]:
    """Right options, of which a file says one or several; letters may stand together."""
    if isinstance(right, str) and {*right} <= {*LETTERS}:
        return list(right)
    return right if isinstance(right, (list, tuple)) else (right,)
