"""Public test sets as they are published, read by our tasks: counts, answers, and what they say.

They lie beside the repository, in shared/data; without them nothing is tested here.
"""

import gzip
import json
from pathlib import Path

import pytest

from lmjax.evaluation.requests import Written
from lmjax.evaluation.tasks import (
    GSM8K,
    MMLU,
    Arc,
    CrowSPairs,
    HellaSwag,
    HumanEval,
    Lambada,
    SQuAD,
    TruthfulQA1,
    TruthfulQA2,
    WikiText,
)

SHARED = Path(__file__).parents[4] / "shared" / "data"


def path_of(name):
    """The path of a public file; where it is not there, the test is skipped and says so."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return str(path)


# The counts of each set's own description.
SETS = {
    "arc/ARC-Challenge-Test.jsonl": (Arc, {}, 1150),
    "hellaswag/hellaswag_val_full.txt.bz2": (HellaSwag, {}, 10_042),
    "truthfulqa/mc_task.json": (TruthfulQA1, {}, 790),
    "lambada/lambada_test.jsonl.gz": (Lambada, {}, 5153),
    "crows-pairs/crows_pairs_anonymized.csv": (CrowSPairs, {}, 1508),
    "mmlu-redux/mmlu_redux_csv.tar.gz": (MMLU, {}, 5700),
    "gsm8k/test.jsonl.gz": (GSM8K, {}, 1319),
    "human-eval/HumanEval.jsonl.gz": (HumanEval, {"run_code": True, "allow_network": True}, 164),
    "xquad/xquad.en.json.gz": (SQuAD, {}, 1190),
    "xquad/xquad.zh.json.gz": (SQuAD, {"by_characters": True}, 1190),
    "wikitext2/test.txt": (WikiText, {}, 62),
}


@pytest.mark.parametrize("name", SETS)
def test_all_items_are_read(name):
    kind, fields, count = SETS[name]
    task = kind(path=path_of(name), **fields)
    questions = task.questions()
    assert len(questions) == count
    for question in questions:
        item = question.item
        assert item.gold is None or item.choices[item.gold] == item.answer
        assert question.requests
    if task.generates and not isinstance(task, HumanEval):
        # What people answered is right by the measures.
        for question in questions:
            given = task.measure(question.item, [Written((question.item.answer,))])
            assert set(given.values()) == {1.0}, question.item.identity


def test_subjects_and_kinds():
    questions = MMLU(path=path_of("mmlu-redux/mmlu_redux_csv.tar.gz")).questions()
    counts = {}
    for question in questions:
        counts[question.item.subject] = counts.get(question.item.subject, 0) + 1
    assert len(counts) == 57 and set(counts.values()) == {100}
    pairs = CrowSPairs(path=path_of("crows-pairs/crows_pairs_anonymized.csv")).questions()
    assert len({question.item.subject for question in pairs}) == 9
    several = TruthfulQA2(path=path_of("truthfulqa/mc_task.json")).questions()
    assert all(0 < sum(q.item.details["labels"]) < len(q.item.choices) for q in several)


def test_solutions_that_people_marked_are_marked_alike():
    """Answers of models to the 1,319 questions, each marked as right or wrong by the authors."""
    task = GSM8K(path=path_of("gsm8k/test.jsonl.gz"))
    items = {question.item.prompt: question.item for question in task.questions()}
    with gzip.open(path_of("gsm8k/example_model_solutions.jsonl.gz"), "rt") as file:
        records = list(map(json.loads, file))
    same = count = 0
    for record in records:
        item = items[f"Question: {record['question']}\nAnswer:"]
        for solution in record.values():
            if isinstance(solution, dict):
                count += 1
                found = task.measure(item, [Written((solution["solution"],))])["last_number"]
                same += found == float(solution["is_correct"])
    assert count == 4 * 1319 and same == count


@pytest.mark.slow  # 164 processes: half a minute
def test_the_solutions_of_people_pass_their_tests():
    path = path_of("human-eval/HumanEval.jsonl.gz")
    task = HumanEval(path=path, run_code=True, allow_network=True, seconds=20.0)
    failed = [
        question.item.identity
        for question in task.questions()
        if task.measure(question.item, [Written((question.item.answer,))]) != {"pass@1": 1.0}
    ]
    assert failed == []
