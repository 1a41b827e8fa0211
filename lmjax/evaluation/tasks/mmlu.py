"""MMLU: exam questions of 57 subjects (Hendrycks et al. 2020, arXiv:2009.03300)."""

from __future__ import annotations

from typing import ClassVar

from lmjax.config import UserError, config
from lmjax.evaluation.tasks.choices import ACCURACY, ChoiceTask, chosen_letters, letter_of
from lmjax.evaluation.tasks.records import Record, headless_rows, read_files, stem
from lmjax.evaluation.tasks.task import Item, Measure

GROUPS = {
    "STEM": (
        "abstract_algebra anatomy astronomy college_biology college_chemistry"
        " college_computer_science college_mathematics college_physics computer_security"
        " conceptual_physics electrical_engineering elementary_mathematics high_school_biology"
        " high_school_chemistry high_school_computer_science high_school_mathematics"
        " high_school_physics high_school_statistics machine_learning"
    ),
    "humanities": (
        "formal_logic high_school_european_history high_school_us_history"
        " high_school_world_history international_law jurisprudence logical_fallacies"
        " moral_disputes moral_scenarios philosophy prehistory professional_law world_religions"
    ),
    "social sciences": (
        "econometrics high_school_geography high_school_government_and_politics"
        " high_school_macroeconomics high_school_microeconomics high_school_psychology"
        " human_sexuality professional_psychology public_relations security_studies sociology"
        " us_foreign_policy"
    ),
    "other": (
        "business_ethics clinical_knowledge college_medicine global_facts human_aging management"
        " marketing medical_genetics miscellaneous nutrition professional_accounting"
        " professional_medicine virology"
    ),
}
GROUP_OF = {subject: group for group, names in GROUPS.items() for subject in names.split()}
PARTS = ("_test", "_val", "_dev", "_train")  # behind the subject in names of files


@config
class MMLU(ChoiceTask):
    """MMLU: the letter of the right option, with the first examples of the subject.

    Reads a folder or an archive of the authors' CSV files (without names of columns), files with
    question, choices and answer a subject, or lines that have a subject too.
    """

    subjects: tuple[str, ...] = ()  # only these; none: all 57, which must be there

    measures: ClassVar[tuple[Measure, ...]] = (ACCURACY,)
    draws: ClassVar[bool] = False

    def validate(self) -> None:
        """Raises UserError for subjects that MMLU does not have."""
        super().validate()
        if unknown := [name for name in self.subjects if name not in GROUP_OF]:
            raise UserError(f"subjects: MMLU has no {unknown[0]!r}; it has {', '.join(GROUP_OF)}")

    def read_items(self, path: str) -> list[Item]:
        """See `EvaluationTask.read_items`; UserError where a subject is missing."""
        if self._is_headless(path):
            items = [item for file in read_files(path) for item in _rows(file)]
        else:
            items = super().read_items(path)
        found = {item.subject for item in items}
        if unknown := found - GROUP_OF.keys():
            raise UserError(f"{path}: MMLU has no subject {min(unknown)!r}")
        wanted = set(self.subjects) or set(GROUP_OF)
        if missing := wanted - found:
            raise UserError(
                f"{path} has {len(found & wanted)} of {len(wanted)} subjects of MMLU; it lacks"
                f" {', '.join(sorted(missing)[:5])}{', ...' * (len(missing) > 5)}; "
                "subjects= takes only some"
            )
        return [item for item in items if item.subject in wanted]

    def _is_headless(self, path: str) -> bool:
        if path.startswith("tfds:"):
            return False
        file = read_files(path)[0]
        return ".csv" in file.name and "question" not in file.text.split("\n", 1)[0].lower()

    def read_item(self, record: Record) -> Item:
        """See `EvaluationTask.read_item`."""
        subject = record.values.get("subject") or subject_of(record.file)
        choices = record.texts("choices")
        gold = record.index(record.value("answer"), len(choices), "answer")
        return _item(record.text("question"), choices, gold, subject, record.where)

    def description(self, subject: str) -> str:
        """See `EvaluationTask.description`."""
        words = subject.replace("_", " ")
        return f"The following are multiple choice questions (with answers) about {words}.\n\n"

    def group(self, subject: str) -> str:
        """See `EvaluationTask.group`."""
        return GROUP_OF[subject]


def subject_of(file: str) -> str:
    """The subject that a file is named after."""
    name = file.removeprefix("mmlu_")
    return next((name.removesuffix(part) for part in PARTS if name.endswith(part)), name)


def _rows(file) -> list[Item]:
    """Items of a CSV file with question, four options and a letter in each row."""
    items, subject = [], subject_of(stem(file.name))
    for where, row in headless_rows(file):
        if len(row) != 6:
            raise UserError(
                f"{where} has {len(row)} fields; MMLU's are question, A, B, C, D, answer"
            )
        question, *choices, answer = row
        gold = Record({}, where).index(answer, len(choices), "answer")
        items.append(_item(question, choices, gold, subject, where))
    return items


def _item(question: str, choices, gold: int, subject: str, where: str) -> Item:
    letters = tuple(letter_of(n) for n in range(len(choices)))
    prompt = f"{question.strip()}\n{chosen_letters(choices)}\nAnswer:"
    return Item(prompt, letters[gold], letters, gold, subject, where)
