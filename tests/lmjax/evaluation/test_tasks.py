"""Tasks: prompts character by character, examples, measures by hand, and wrong files."""

import dataclasses
import json
import math

import pytest

from lmjax.config import UserError, replace
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.evaluation.requests import ContinuationRequest, Likelihood, Written
from lmjax.evaluation.task_evaluator import fits_into
from lmjax.evaluation.task_result import TaskResult, by_length, estimated, guessing
from lmjax.evaluation.task_tables import score_table
from lmjax.evaluation.tasks import (
    GSM8K,
    MBPP,
    MMLU,
    PIQA,
    Arc,
    BoolQ,
    CrowSPairs,
    Exam,
    HellaSwag,
    HumanEval,
    Lambada,
    Measure,
    SQuAD,
    TruthfulQA1,
    TruthfulQA2,
    WholeTexts,
    WikiText,
    WinoGrande,
)
from lmjax.evaluation.tasks.hellaswag import cleaned
from lmjax.evaluation.tasks.mmlu import GROUP_OF, GROUPS
from lmjax.evaluation.tasks.rolling import untokenized


@pytest.fixture
def lines(tmp_path):
    """Writes records as JSON lines and gives the path."""

    def write(*records, name="set.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def arc(question, texts=("ice", "stone"), key="A"):
    choices = {"text": list(texts), "label": ["A", "B", "C", "D"][: len(texts)]}
    return {"id": question, "question": question, "choices": choices, "answerKey": key}


def likelihoods(*values, greedy=False):
    return [Likelihood(value, greedy, 1) for value in values]


def test_arc_of_both_layouts(lines):
    old = {"stem": "What melts?", "choices": [{"text": "ice", "label": "1"}]}
    path = lines({"question": old, "answerKey": "1"}, arc("What melts?", ["ice"]))
    for question in Arc(path=path).questions():
        assert question.context == "Question: What melts?\nAnswer:"
        assert question.requests == (ContinuationRequest(question.context, " ice"),)


def test_scores_are_normalised_by_the_answers_characters_without_the_space(lines):
    [question] = Arc(path=lines(arc("?", ("é" * 4, "ab", "abcdefgh")))).questions()
    task, item = Arc(path="x"), question.item
    # Sums favour the second; per character -1, -1.05, -1.1; per byte -0.5, -1.05, -1.1.
    assert task.measure(item, likelihoods(-4.0, -2.1, -8.8)) == {
        "acc": 0.0,
        "acc_norm": 1.0,
        "acc_bytes": 1.0,
    }
    # Per character -1.5 against -1.4; per byte -0.75: two bytes a letter.
    found = task.measure(item, likelihoods(-6.0, -2.8, -16.0))
    assert found == {"acc": 0.0, "acc_norm": 0.0, "acc_bytes": 1.0}
    assert task.measure(item, likelihoods(-2.0, -2.0, -9.0))["acc"] == 1.0  # the first of equals


def test_examples_are_the_same_each_time_and_never_the_question(lines):
    path = lines(*(arc(f"q{n}") for n in range(9)))
    task = Arc(path=path, shots=3)
    found = task.questions()
    assert [q.context for q in found] == [q.context for q in Arc(path=path, shots=3).questions()]
    for number, question in enumerate(found):
        examples, asked = question.context.rsplit("\n\n", 1)
        assert asked == f"Question: q{number}\nAnswer:"
        assert len(examples.split("\n\n")) == question.shots == 3
        assert f"Question: q{number}\n" not in examples
        assert examples.startswith("Question: q") and examples.endswith("\nAnswer: ice")
    assert found[0].context != Arc(path=path, shots=3, seed=1).questions()[0].context
    # Few are questions themselves, so that the others share one prompt.
    heads = [question.context.rsplit("\n\n", 1)[0] for question in found]
    assert max(map(heads.count, heads)) == 6


def test_a_question_that_another_file_repeats_is_no_example_of_itself(lines):
    path, pool = lines(arc("q0"), arc("q1")), lines(arc("q0"), arc("other"), name="train.jsonl")
    first, second = Arc(path=path, examples_path=pool, shots=1).questions()
    assert first.context.startswith("Question: other\n")
    with pytest.raises(UserError, match=r"shots=2, but .* has 1 examples besides"):
        Arc(path=path, examples_path=pool, shots=2).questions()
    assert second.shots == 1


def test_hellaswag_of_both_layouts(lines, tmp_path):
    record = {
        "activity_label": "Roof",
        "ctx_a": "A man is up.",
        "ctx_b": "he [step] waits",
        "endings": ["He [title] sits.", "b", "c", "d"],
        "label": "0",
    }
    [question] = HellaSwag(path=lines(record)).questions()
    assert question.context == "Roof: A man is up. He waits"
    assert question.requests[0].continuation == " He. sits."
    assert cleaned(" a  b [x] ") == "a b "
    path = tmp_path / "set.txt"
    path.write_text("Roof: A man\n2\na\nb\nc\nd\n")
    [question] = HellaSwag(path=str(path)).questions()
    assert (question.context, question.item.gold) == ("Roof: A man", 2)
    path.write_text("Roof: A man\n2\na\n")
    with pytest.raises(UserError, match="has 3 lines, no multiple of 6"):
        HellaSwag(path=str(path)).questions()


def test_truthfulqa_shows_its_examples(lines):
    targets = {"choices": ["No", "Never", "Yes"], "labels": [1, 1, 0]}
    path = lines({"question": "Can pigs fly?", "mc1_targets": targets, "mc2_targets": targets})
    [question] = TruthfulQA1(path=path).questions()
    assert question.context.startswith(
        "Q: What is human life expectancy in the United States?\nA: "
    )
    assert question.context.endswith("Barcelona, Spain.\n\nQ: Can pigs fly?\nA:")
    assert question.requests[0].continuation == " No"
    [two] = TruthfulQA2(path=path).questions()
    shares = [math.log(p) for p in (0.2, 0.1, 0.1)]
    task = TruthfulQA2(path=path)
    assert task.measure(two.item, likelihoods(*shares)) == {"mc2": pytest.approx(0.75)}
    far = likelihoods(*(value - 1e4 for value in shares))  # whose probabilities are all 0
    assert task.measure(two.item, far) == {"mc2": pytest.approx(0.75)}
    with pytest.raises(UserError, match="its prompt has its own examples"):
        TruthfulQA1(path=path, shots=1)


def test_two_answers(lines):
    piqa = {"goal": "Boil it", "sol1": "heat", "sol2": "cool", "label": 0}
    [question] = PIQA(path=lines(piqa)).questions()
    assert question.context == "Question: Boil it\nAnswer:"
    grande = {"sentence": "A _ is red.", "option1": "rose", "option2": "sea", "answer": "1"}
    [question] = WinoGrande(path=lines(grande)).questions()
    assert question.requests == (
        ContinuationRequest("A rose", " is red."),
        ContinuationRequest("A sea", " is red."),
    )
    boolq = {"passage": "It is.", "question": "is it", "answer": True}
    [question] = BoolQ(path=lines(boolq)).questions()
    assert question.context == "It is.\nQuestion: is it?\nAnswer:"
    assert [r.continuation for r in question.requests] == [" no", " yes"]
    assert question.item.gold == 1
    with pytest.raises(UserError, match="line 1: answer is '3'; it must be 1 or 2"):
        WinoGrande(path=lines({**grande, "answer": "3"})).questions()


def test_lambada(lines):
    [question] = Lambada(path=lines({"text": "a cup of tea"})).questions()
    assert question.requests == (ContinuationRequest("a cup of", " tea"),)
    found = Lambada(path="x").measure(question.item, likelihoods(-2.0, greedy=True))
    assert found == {"acc": 1.0, "perplexity": -2.0}
    one = estimated(Measure("perplexity", False, "perplexity"), [-2.0, -4.0])
    assert one.value == pytest.approx(math.exp(3))


def test_mmlu_has_57_subjects_in_four_groups(tmp_path):
    assert len(GROUP_OF) == 57
    assert [len(names.split()) for names in GROUPS.values()] == [19, 13, 12, 13]
    for subject in GROUP_OF:
        (tmp_path / f"{subject}_test.csv").write_text('"1, or 2?",one,two,both,none,C\n')
    (tmp_path / "dev").mkdir()
    task = MMLU(path=str(tmp_path))
    found = task.questions()
    assert len(found) == 57
    assert found[0].context == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "1, or 2?\nA. one\nB. two\nC. both\nD. none\nAnswer:"
    )
    assert [r.continuation for r in found[0].requests] == [" A", " B", " C", " D"]
    result = TaskResult.of(task, found, [likelihoods(-1.0, -2.0, -0.5, -3.0)] * 57)
    assert result.estimate(task.measures[0]).value == 1.0
    assert {name: len(n) for name, n in result.groups().items()} == {
        "STEM": 19,
        "humanities": 13,
        "social sciences": 12,
        "other": 13,
    }
    (tmp_path / "virology_test.csv").unlink()
    with pytest.raises(UserError, match="has 56 of 57 subjects of MMLU; it lacks virology"):
        task.questions()
    assert len(MMLU(path=str(tmp_path), subjects=("astronomy",)).questions()) == 1


def test_exams_of_four_layouts(lines, tmp_path):
    path = tmp_path / "law_val.csv"
    path.write_text("id,question,A,B,C,D,answer\n0,问题？,甲,乙,丙,丁,B\n", "utf-8")
    [question] = Exam(path=str(path), heading="以下是{subject}的题").questions()
    assert question.context == "以下是law的题\n\n问题？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案："
    assert (question.item.answer, question.item.subject) == ("B", "law")
    path.write_text(",Question,A,B,C,D,Answer\n0,问题？,甲,乙,丙,丁,B\n", "utf-8")
    assert Exam(path=str(path)).questions()[0].item.gold == 1
    agi = {"passage": "P", "question": "Q?", "options": ["(A)x", "(B)y"], "label": "B"}
    [question] = Exam(path=lines(agi), language="en").questions()
    assert question.context == "P\nQ?\nA. x\nB. y\nAnswer:"
    empty = {**agi, "passage": "", "answer": None}
    cloze = {"passage": None, "question": "Q?", "options": None, "label": None, "answer": "5"}
    task = Exam(path=lines(empty, cloze), language="en")
    [question] = task.questions()
    assert question.context == "Q?\nA. x\nB. y\nAnswer:" and task.left_out() == 1
    found = {"one": [TaskResult.of(task, [question], [likelihoods(-1.0, -2.0)])]}
    assert score_table(found, True).notes == (
        "Exam: records of the file that it cannot ask, and leaves out: 1",
    )
    bench = tmp_path / "bench.json"
    examples = [
        {"question": "A. x\nB. y", "answer": ["B"]},
        {"question": "?", "answer": ["A", "B"]},
    ]
    bench.write_text(json.dumps({"keywords": "k", "example": examples}, indent=1))
    [question] = Exam(path=str(bench)).questions()  # the one with one right answer
    assert question.item.gold == 1 and question.context == "A. x\nB. y\n答案："


def test_gsm8k_by_three_rules(lines):
    path = lines({"question": "1+1?", "answer": "It is <<1+1=2>>2\n#### 1,042"})
    [question] = GSM8K(path=path).questions()
    assert question.context == "Question: 1+1?\nAnswer:"
    task = GSM8K(path=path)

    def scores(text):
        return list(task.measure(question.item, [Written((text,))]).values())

    assert scores(" so\n#### 1042") == [1.0, 1.0, 1.0]
    assert scores(" it is 1,042.") == [0.0, 1.0, 1.0]
    assert scores(r" $\boxed{1042}$.") == [0.0, 0.0, 1.0]  # "$." is the last for the harness
    assert scores(" I do not know") == [0.0, 0.0, 0.0]
    # Of an index, a range and LaTeX's comma: see the rules of `answer_match`.
    assert scores(r"so \boxed{1{,}042\text{ m}^2}")[2] == 1.0
    assert scores("from 3-1042")[2] == 1.0
    with pytest.raises(UserError, match="whose number stands behind ####"):
        GSM8K(path=lines({"question": "1+1?", "answer": "#### two"})).questions()


def test_squad_by_words_and_by_characters(tmp_path):
    def write(answer):
        asked = {"id": "1", "question": "Who?", "answers": [{"text": answer}]}
        article = {"title": "T", "paragraphs": [{"context": "C", "qas": [asked]}]}
        path = tmp_path / "set.json"
        path.write_text(json.dumps({"data": [article]}))
        return str(path)

    [question] = SQuAD(path=write("the old cat")).questions()
    assert question.context == "Title: T\n\nBackground: C\n\nQuestion: Who?\n\nAnswer:"
    found = SQuAD(path="x").measure(question.item, [Written((" an old dog",))])
    assert found == {"exact_match": 0.0, "f1": 0.5}
    with pytest.raises(UserError, match="set by_characters=true"):
        SQuAD(path=write("北京市")).questions()
    task = SQuAD(path=write("北京市"), by_characters=True)
    [question] = task.questions()
    assert task.measure(question.item, [Written(("北京。",))]) == {
        "exact_match": 0.0,
        "f1": pytest.approx(0.8),
    }
    # Wide letters and spaces beside characters are no difference.
    [question] = SQuAD(path=write("在2020年，GPT 2。"), by_characters=True).questions()
    found = task.measure(question.item, [Written(("在 ２０２０ 年 gpt ２",))])
    assert found == {"exact_match": 1.0, "f1": 1.0}
    empty = dataclasses.replace(question.item, details={"answers": ()})
    version = SQuAD(path="x", by_characters=True, version="2.0")
    assert version.measure(empty, [Written(("unanswerable",))]) == {"exact_match": 1.0, "f1": 1.0}


def test_crows_pairs_and_whole_texts(lines, tmp_path):
    pair = {"sent_more": "a", "sent_less": "b", "bias_type": "age"}
    [question] = CrowSPairs(path=lines(pair)).questions()
    assert question.requests == (ContinuationRequest("", "a"), ContinuationRequest("", "b"))
    found = CrowSPairs(path="x").measure(question.item, likelihoods(-3.0, -5.0))
    assert found == {"pct_stereotype": 1.0, "likelihood_diff": 2.0}
    chinese = lines({"text": "一二三四"})
    with pytest.raises(UserError, match=r"line 1: .* set by_words=false"):
        WholeTexts(path=chinese).questions()
    task = WholeTexts(path=chinese, by_words=False)
    result = TaskResult.of(task, task.questions(), [likelihoods(-4e3)])
    values = {m.name: result.estimate(m).value for m in task.measures}
    assert "word_perplexity" not in values
    assert values["bits_per_byte"] == pytest.approx(1000 / 3 / math.log(2))
    assert values["bits_per_character"] == pytest.approx(1000 / math.log(2))
    assert values["character_perplexity"] == math.inf  # exp(1000), and no overflow
    path = tmp_path / "wiki.txt"
    path.write_text(" \n = A = \n \n a @-@ b , c \n = = Part = = \n \n = B = \n \n d \n")
    first, second = WikiText(path=str(path)).questions()
    assert first.requests[0].text == "= A =\n\na-b, c\n== Part ==\n\n".replace("= A", " = A", 1)
    assert second.item.prompt.startswith(" = B = ")
    assert untokenized('( a ) said " it \'s " . \n') == '(a) said "it\'s".\n'


def test_code_runs_only_where_it_is_allowed(lines):
    record = {
        "task_id": "t/0",
        "prompt": "def one():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n",
        "entry_point": "one",
    }
    with pytest.raises(UserError, match="run_code=true allows it"):
        HumanEval(path=lines(record)).questions()
    code = {"run_code": True, "allow_network": True}
    task = HumanEval(path=lines(record), samples=4, temperature=0.5, **code)
    [question] = task.questions()
    # The last one leaves before its tests.
    texts = ("    return 1", "    return 2", "    return (", "    pass\nimport os\nos._exit(0)")
    assert task.measure(question.item, [Written(texts)]) == {"pass@1": 0.25, "pass@4": 1.0}
    some = replace(task, tries=(1, 2, 3))
    assert some.measure(question.item, [Written(texts)]) == pytest.approx(
        {"pass@1": 0.25, "pass@2": 0.5, "pass@3": 0.75}  # that the one right is among k of four
    )
    assert [one.name for one in some.measures] == ["pass@1", "pass@2", "pass@3"]
    with pytest.raises(UserError, match="pass@5 needs as many samples; samples=4"):
        replace(task, tries=(1, 5))
    problem = {
        "text": "Give one.",
        "code": "def one(): return 1",
        "test_list": ["assert one() == 1"],
    }
    task = MBPP(path=lines(problem), **code)
    [question] = task.questions()
    assert question.context.endswith("tests:\n\nassert one() == 1\n[BEGIN]\n")
    assert task.measure(question.item, [Written((problem["code"],))]) == {"pass@1": 1.0}


def test_rows_of_chance_and_length(lines):
    task = Arc(path=lines(arc("a", ("long one", "b")), arc("c", ("d", "longer"))))
    questions = task.questions()
    assert guessing(task, questions) == {"acc": 0.5, "acc_norm": 0.5, "acc_bytes": 0.5}
    assert by_length(task, questions)["acc"] == 0.5  # the shortest: wrong, right


def test_intervals():
    """Wilson's for 8 of 10, from the closed form; the error is that of the sample."""
    one = estimated(Measure("acc"), [1.0] * 8 + [0.0] * 2)
    assert (one.low, one.high) == (
        pytest.approx(0.49016, abs=1e-5),
        pytest.approx(0.94332, abs=1e-5),
    )
    assert one.error == pytest.approx(math.sqrt(0.16 * 10 / 9 / 10))
    rate = estimated(Measure("bits_per_byte", False, "rate", "byte"), [(-8.0, 4.0), (-2.0, 4.0)])
    assert rate.value == pytest.approx(10 / 8 / math.log(2))
    assert rate.low <= rate.value <= rate.high


def test_wrong_files_are_told_by_line(lines, tmp_path):
    with pytest.raises(
        UserError, match=r"set.jsonl, line 2: answerKey is 'E'; it must be one of A, B"
    ):
        Arc(path=lines(arc("a"), arc("b", key="E"))).questions()
    with pytest.raises(UserError, match="line 1: there is no field text or passage; fields: txt"):
        Lambada(path=lines({"txt": "a b"})).questions()
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a b"}\n{"text": \n')
    with pytest.raises(UserError, match=r"bad.jsonl, line 2"):
        Lambada(path=str(path)).questions()
    with pytest.raises(UserError, match=r"cannot be read|no such"):
        Lambada(path=str(tmp_path / "none.jsonl")).questions()


def test_answers_that_look_like_dates_or_lists_stay_text(lines):
    texts = ("2020-01-01", "[1, 2]")
    [question] = Arc(path=lines(arc("When?", texts))).questions()
    assert [r.continuation for r in question.requests] == [" 2020-01-01", " [1, 2]"]


@pytest.mark.parametrize("longest", [20, 60, 88, 120, 200, None])
def test_as_many_examples_as_fit(lines, longest):
    """A model that reads bytes; counted by trying each number for each item."""
    path = lines(*(arc(f"q{'x' * (n % 4)}{n}") for n in range(9)))
    fits = fits_into(ByteTokenizer(), longest)
    found = Arc(path=path, shots=8, fit=True).questions(fits)
    assert found == Arc(path=path, shots=8, fit=True).questions(fits)
    whole = Arc(path=path, shots=8).questions()
    for question, most in zip(found, whole, strict=True):
        *examples, asked = most.context.split("\n\n")
        texts = ["\n\n".join([*examples[:n], asked]) for n in range(9)]
        # The longest answer is " stone", of which all but the last byte are read; one begins.
        sizes = [1 + len(text) + 5 for text in texts]
        number = max((n for n in range(9) if longest is None or sizes[n] <= longest), default=0)
        assert (question.shots, question.context) == (number, texts[number])
    gsm = GSM8K(path=lines(*[{"question": f"{n}?", "answer": "#### 2"} for n in range(3)]))
    task = replace(gsm, shots=2, fit=True, max_tokens=10)
    room = 10 + 1 + len(replace(gsm, shots=2).questions()[0].context)
    assert [task.questions(fits_into(ByteTokenizer(), n))[0].shots for n in (room, room - 1)] == [
        2,
        1,
    ]
