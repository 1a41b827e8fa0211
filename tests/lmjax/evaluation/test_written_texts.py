"""Texts that models write beside those of people, and two models on the same items."""

import json

import numpy as np
import pytest

from lmjax.config import UserError
from lmjax.evaluation.bleu import corpus_bleu
from lmjax.evaluation.chrf import corpus_chrf
from lmjax.evaluation.comparison import mcnemar, paired_bootstrap
from lmjax.evaluation.requests import Likelihood, Written, WrittenRequest
from lmjax.evaluation.rouge import rouge
from lmjax.evaluation.task_comparison import comparison_tables
from lmjax.evaluation.task_result import TaskResult
from lmjax.evaluation.task_tables import calibration_table, error_table
from lmjax.evaluation.tasks import Arc, Lambada, Summaries, Translation, WrittenTexts

PAIRS = (
    ("the cat sat on the mat", ["the cat sat down on the mat", "a cat sat on a mat"]),
    ("he read a book", ["he read the book all night long"]),
    ("nothing of it is right", ["the answer lies in the other room"]),
)


@pytest.fixture
def lines(tmp_path):
    """Writes records as JSON lines and gives the path."""

    def write(*records):
        path = tmp_path / "set.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def written(task, texts):
    questions = task.questions()
    return TaskResult.of(task, questions, [[Written((text,))] for text in texts])


def test_a_translation_is_asked_for_as_a_line_of_pairs(lines):
    path = lines({"source": "un", "target": "one of us now"}, {"source": "deux", "target": "two"})
    first, second = Translation(path=path, shots=1).questions()
    assert first.context == "deux = two\nun ="
    assert second.requests == (WrittenRequest("un = one of us now\ndeux =", ("\n",), 128),)


def test_measures_of_texts_are_those_of_their_corpus(lines):
    names = ("bleu", "chrf", "chrf++", "rouge1", "rougeL", "exact_match", "f1")
    path = lines(*({"prompt": "?", "references": wanted} for _, wanted in PAIRS))
    task = WrittenTexts(path=path, compared_by=names)
    texts, references = [text for text, _ in PAIRS], [wanted for _, wanted in PAIRS]
    result = written(task, [f" {text}\n" for text in texts])
    found = {m.name: result.estimate(m) for m in task.measures}
    assert found["bleu"].value == pytest.approx(corpus_bleu(texts, references).score)
    assert found["chrf"].value == pytest.approx(corpus_chrf(texts, references))
    assert found["chrf++"].value == pytest.approx(corpus_chrf(texts, references, word_order=2))
    scores = [rouge(*pair)["rougeL"].f1 for pair in PAIRS]
    assert found["rougeL"].value == pytest.approx(np.mean(scores))
    # By hand, without articles: all words; 3 of 3 and of 6; none.
    assert found["f1"].value == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["exact_match"].value == pytest.approx(1 / 3)
    for one in found.values():
        assert one.low <= one.value <= one.high and one.count == 3


def test_a_summary_is_the_first_sentences(lines):
    path = lines({"document": "A long text.", "summary": "It is long. It is dull."})
    task = Summaries(path=path, sentences=2)
    assert task.questions()[0].context == "A long text.\nTL;DR:"
    result = written(task, ["\n It is long. It is dull. What else is there to say?"])
    assert result.scores[0] == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}


def test_texts_that_a_measure_cannot_read_are_refused(lines):
    chinese = {"prompt": "?", "references": "\u4eca\u5929\u5929\u6c14\u5f88\u597d"}
    for name in ("bleu", "rougeL", "f1"):
        with pytest.raises(UserError, match=r"tokenizer|by_characters"):
            WrittenTexts(path=lines(chinese), compared_by=(name,)).questions()
    settings = {"bleu_tokenizer": "zh", "rouge_tokenizer": "unicode", "by_characters": True}
    names = ("bleu", "rougeL", "f1")
    task = WrittenTexts(path=lines(chinese), compared_by=names, **settings)
    result = written(task, [chinese["references"]])
    assert [result.estimate(measure).value for measure in task.measures] == [
        pytest.approx(100), 1.0, 1.0
    ]  # fmt: skip
    with pytest.raises(UserError, match="longest reference has 1 tokens"):
        Translation(path=lines({"source": "un", "target": "one"})).questions()
    with pytest.raises(UserError, match="line 1: there is no field target"):
        Translation(path=lines({"source": "un"})).questions()


def test_errors_of_a_corpus_measure_are_other_texts(lines):
    path = lines({"source": "un", "target": "one of us now"}, {"source": "deux", "target": "two"})
    result = written(Translation(path=path), ["one of us now", "three"])
    [(item, said)] = error_table("m", [result]).rows
    assert "deux =" in item and "'three'" in said


def arc_results(lines, count):
    """Results of two models in a task of two choices, and which items each has right."""
    choices = {"text": ["ice", "stone"], "label": ["A", "B"]}
    path = lines(*({"question": f"{n}?", "choices": choices, "answerKey": "A"}
                   for n in range(count)))  # fmt: skip
    task = Arc(path=path)
    right = np.random.default_rng(0).random((2, count)) < [[0.7], [0.4]]
    found = []
    for row in right:
        answers = [[Likelihood(-1.0 - 4 * (not one), False, 1), Likelihood(-3.0, False, 1)]
                   for one in row]  # fmt: skip
        found.append(TaskResult.of(task, task.questions(), answers))
    return found, right


def test_two_models_are_compared_item_by_item(lines):
    (one, other), right = arc_results(lines, 40)
    [table] = comparison_tables({"a": [one], "b": [other]})
    assert table.title == "b beside a"
    row = table.by_row()["Arc 0-shot acc"]
    wanted = paired_bootstrap(right[1].astype(float), right[0].astype(float))
    assert (row["difference"], row["2.5 %"], row["97.5 %"], row["p"]) == tuple(wanted)
    alone = mcnemar(right[1], right[0])
    assert (row["b alone"], row["a alone"], row["McNemar's p"]) == tuple(alone)
    assert row["items"] == 40
    assert comparison_tables({"a": [one]}) == ()


def test_perplexities_and_corpora_are_compared_with_their_own_number(lines):
    path = lines(*({"text": f"the number {n} is a word"} for n in range(12)))
    task = Lambada(path=path)
    values = np.random.default_rng(1).normal(-3, 1, (2, 12))
    results = [
        TaskResult.of(task, task.questions(), [[Likelihood(v, False, 1)] for v in row])
        for row in values
    ]
    [table] = comparison_tables({"a": results[:1], "b": results[1:]})
    row = table.by_row()["Lambada 0-shot perplexity"]
    first, second = np.exp(-values.mean(axis=1))
    assert row["difference"] == pytest.approx(second - first)
    assert row["2.5 %"] < row["difference"] < row["97.5 %"]
    assert "McNemar's p" not in row
    too_large = [TaskResult.of(task, task.questions(), [[Likelihood(-9e3, False, 1)]] * 12)]
    [table] = comparison_tables({"a": results[:1], "b": too_large})
    assert "difference" not in table.by_row()["Lambada 0-shot perplexity"]
    task = WrittenTexts(path=lines(*({"prompt": "?", "references": w} for _, w in PAIRS)))
    texts = [text for text, _ in PAIRS]
    [table] = comparison_tables(
        {"a": [written(task, texts)], "b": [written(task, [*texts[:2], "the answer lies here"])]}
    )
    row = table.by_row()["WrittenTexts 0-shot bleu"]
    references = [wanted for _, wanted in PAIRS]
    scores = [corpus_bleu(one, references).score
              for one in ([*texts[:2], "the answer lies here"], texts)]  # fmt: skip
    assert row["difference"] == pytest.approx(scores[0] - scores[1])


def test_calibration_is_of_the_chosen_answers(lines):
    (one, _), right = arc_results(lines, 40)
    table = calibration_table({"a": [one]})
    # The right answer is chosen by e^2 to 1, the wrong one too: one confidence for all.
    error = abs(np.mean(right[0]) - 1 / (1 + np.exp(-2)))
    assert table.by_row()["Arc 0-shot acc"]["a"] == pytest.approx(error)
