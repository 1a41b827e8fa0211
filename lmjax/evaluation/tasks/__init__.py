"""Tasks: test sets as config objects over local files or TensorFlow Datasets."""

from lmjax.evaluation.tasks.addition import Addition
from lmjax.evaluation.tasks.agieval import AGIEval
from lmjax.evaluation.tasks.arc import Arc
from lmjax.evaluation.tasks.chinese_exams import CMMLU, CEval
from lmjax.evaluation.tasks.cloze_classes import ClozeClasses
from lmjax.evaluation.tasks.code import MBPP, HumanEval
from lmjax.evaluation.tasks.coqa import CoQA
from lmjax.evaluation.tasks.crows_pairs import CrowSPairs
from lmjax.evaluation.tasks.exam import Exam
from lmjax.evaluation.tasks.gsm8k import GSM8K
from lmjax.evaluation.tasks.harness_task import HarnessTask
from lmjax.evaluation.tasks.harness_yaml import harness_task
from lmjax.evaluation.tasks.hellaswag import HellaSwag
from lmjax.evaluation.tasks.lambada import Lambada
from lmjax.evaluation.tasks.mmlu import MMLU
from lmjax.evaluation.tasks.rolling import WholeTexts, WikiText
from lmjax.evaluation.tasks.squad import SQuAD
from lmjax.evaluation.tasks.task import EvaluationTask, Item, Measure, Question
from lmjax.evaluation.tasks.truthfulqa import TruthfulQA1, TruthfulQA2
from lmjax.evaluation.tasks.written_texts import Summaries, Translation, WrittenTexts
from lmjax.evaluation.tasks.xquad import xquad
from lmjax.evaluation.tasks.yes_or_no import PIQA, BoolQ, WinoGrande

__all__ = [
    "CMMLU",
    "GSM8K",
    "MBPP",
    "MMLU",
    "PIQA",
    "AGIEval",
    "Addition",
    "Arc",
    "BoolQ",
    "CEval",
    "ClozeClasses",
    "CoQA",
    "CrowSPairs",
    "EvaluationTask",
    "Exam",
    "HarnessTask",
    "HellaSwag",
    "HumanEval",
    "Item",
    "Lambada",
    "Measure",
    "Question",
    "SQuAD",
    "Summaries",
    "Translation",
    "TruthfulQA1",
    "TruthfulQA2",
    "WholeTexts",
    "WikiText",
    "WinoGrande",
    "WrittenTexts",
    "harness_task",
    "xquad",
]
