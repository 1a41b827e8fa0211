"""Tasks in YAML files of the harness: its requests and scores, and what is refused."""

import json

import pytest

from lmjax.config import UserError
from lmjax.evaluation.answering import Answering
from lmjax.evaluation.requests import Likelihood, Written, WrittenRequest
from lmjax.evaluation.task_evaluator import result_of
from lmjax.evaluation.tasks import HarnessTask, harness_task
from lmjax.evaluation.tasks.harness_task import AnswerFilter
from tests.lmjax.evaluation.harness_golden import FOLDER, GOLDEN
from tests.lmjax.evaluation.scored_models import read_model

ARC = r"""
task: own_arc
output_type: multiple_choice
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
metadata: {version: 1.0}
"""
LAMBADA = r"""
task: own_lambada
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc}
"""
HELLASWAG = r"""
task: own_hellaswag
output_type: multiple_choice
doc_to_text: query
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""
TASKS = {"arc": ARC, "lambada": LAMBADA, "hellaswag": HELLASWAG}
WRITTEN = r"""
task: sums
doc_to_text: "{{q}} ="
doc_to_target: "{{a}}"
num_fewshot: 1
generation_kwargs: {until: ["\n"], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: exact_match, ignore_case: true, regexes_to_ignore: [",", "\\$"]}
filter_list:
  - name: strict
    filter: [{function: regex, regex_pattern: "#### (\\d+)"}, {function: take_first}]
  - name: last
    filter: [{function: regex, regex_pattern: "([$0-9,]{2,})|([0-9]+)", group_select: -1}]
"""


def task_of(tmp_path, text, path, **settings):
    (tmp_path / "task.yaml").write_text(text)
    return harness_task(yaml=str(tmp_path / "task.yaml"), path=str(path), **settings)


def records(tmp_path, *values):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.mark.parametrize("name", TASKS)
def test_requests_and_scores_are_the_harnesss(tmp_path, name, one_device):
    """What lm-eval 0.4.13 asked a trained GPT-2 for the same files, and its scores."""
    golden = json.loads(GOLDEN.read_text())
    task = task_of(tmp_path, TASKS[name], FOLDER / f"{name}.jsonl")
    asked = [r for question in task.questions() for r in question.requests]
    wanted = [rest for own, *rest in golden["requests"] if own == f"own_{name}"]
    assert [[request.context, request.continuation] for request in asked] == wanted
    found = golden["models"]["train_gpt2"]
    answering = Answering(read_model("train_gpt2", found["max_length"]))
    result = result_of(task, task.questions(), answering)
    theirs = found["scores"][f"own_{name}"]
    scores = {key.partition(",")[0] for key in theirs if "_stderr" not in key and "," in key}
    assert {measure.name for measure in task.measures} == scores
    for measure in task.measures:
        score = float(theirs[f"{measure.name},none"])
        assert result.estimate(measure).value == pytest.approx(score, rel=1e-5)


def test_examples_and_filters_of_written_answers(tmp_path):
    path = records(tmp_path, {"q": "1+1", "a": "2"}, {"q": "500+500", "a": "1,000"})
    task = task_of(tmp_path, WRITTEN, path)
    second = task.questions()[1]
    assert second.context == "1+1 = 2\n\n500+500 =" and second.shots == 1
    assert second.requests == (WrittenRequest(second.context, ("\n",), 8),)
    names = ["exact_match, strict", "exact_match, last"]
    assert [measure.name for measure in task.measures] == names
    for text, scores in {
        "so 7 #### 1000": (1.0, 1.0),
        "It is $1,000": (0.0, 1.0),
        "1000, or 7": (0.0, 0.0),
        "none": (0.0, 0.0),
    }.items():
        assert tuple(task.measure(second.item, [Written((text,))]).values()) == scores


def test_a_file_over_another_one(tmp_path):
    (tmp_path / "base.yaml").write_text(ARC)
    text = "include: base.yaml\ntask: mine\ndescription: 'About {{answerKey}}. '\n"
    text += "fewshot_config: {sampler: first_n}\n"
    task = task_of(tmp_path, text, FOLDER / "arc.jsonl", shots=2)
    question = task.questions()[0]
    assert task.name == "mine" and question.shots == 2
    assert question.context.startswith("About A. Question: What do plants")  # the second item
    assert question.context.endswith(f"\n\nQuestion: {'Which of these melts in the sun?'}\nAnswer:")


def test_several_right_choices_and_labels_as_texts(tmp_path):
    path = records(
        tmp_path,
        {"q": "Even?", "options": ["1", "2", "3", "4"], "right": [1, 3]},
        {"q": "Odd?", "options": ["2", "1"], "right": "1"},  # a field's text is a choice's text
    )
    text = "task: t\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_target: right\n"
    task = task_of(tmp_path, text + "doc_to_choice: options\nmetric_list: [{metric: acc}]", path)
    first, second = (question.item for question in task.questions())
    answers = [Likelihood(-value, False, 1) for value in (3.0, 2.0, 4.0, 1.0)]
    assert task.measure(first, answers) == {"acc": 1.0} and task.chance(first) == {"acc": 0.5}
    assert second.gold == 1


WRONG = {
    "needs code: utils.prompt": (ARC.replace('"{{choices.text}}"', "!function utils.prompt"), {}),
    "metrics: 'mcc' is not known": (ARC.replace("metric: acc_norm", "metric: mcc"), {}),
    "line 1: doc_to_text: 'x' is undefined": (
        ARC.replace("{{question}}", "{{x}}"),
        {},
    ),
    "is no template": (ARC.replace("{{question}}", "{{question"), {}),
    "process_docs is not known": (ARC + "process_docs: x\n", {}),
    "`task` names no task": (ARC.replace("task: own_arc", "task: [a, b]"), {}),
    "doc_to_target is missing": (ARC.replace("doc_to_target", "doc_to_decontamination_query"), {}),
    "includes itself": (ARC + "include: task.yaml\n", {}),
    "aggregation 'median'": (ARC.replace("aggregation: mean", "aggregation: median"), {}),
    "fewshot_config: samples is": (ARC + "fewshot_config: {samples: [1]}\n", {}),
    "cannot be read": ("a: [", {}),
    "is no task": ("- a\n", {}),
    "not drawn ones": (WRITTEN.replace("do_sample: false", "do_sample: true"), {}),
    "majority_vote is not known": (WRITTEN.replace("take_first", "majority_vote"), {}),
    "is no regular expression": (WRITTEN.replace(r"#### (\\d+)", "("), {}),
    "must be one of 4 choices": (ARC.replace("label.index(answerKey)", "label|length"), {}),
    "shots=9, but": (ARC, {"shots": 9}),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_meant_is_refused(tmp_path, message):
    text, settings = WRONG[message]
    with pytest.raises(UserError) as error:
        task_of(tmp_path, text, FOLDER / "arc.jsonl", **settings).questions()
    assert message in str(error.value)


def test_a_template_cannot_reach_python(tmp_path):
    text = ARC.replace("{{question}}", "{{question.__class__.__mro__}}")
    with pytest.raises(UserError, match="unsafe"):
        task_of(tmp_path, text, FOLDER / "arc.jsonl").questions()


def test_fields_of_the_config():
    with pytest.raises(UserError, match="whole texts have no examples"):
        HarnessTask(
            path="x",
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="text",
            metrics=("bits_per_byte",),
            shots=1,
        )
    assert AnswerFilter(strip=True, case="lower")(" A b ") == "a b"
