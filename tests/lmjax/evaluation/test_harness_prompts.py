"""Requests of our tasks beside those that EleutherAI's harness makes of its own YAML files.

Each case is a test set of a few documents in the layout of the public one.
"""

import importlib.util
import json
import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from lmjax.config import UserError
from lmjax.evaluation.requests import Likelihood, Written, WrittenRequest
from lmjax.evaluation.tasks import (
    CMMLU,
    GSM8K,
    MBPP,
    MMLU,
    PIQA,
    AGIEval,
    Arc,
    BoolQ,
    CEval,
    CoQA,
    CrowSPairs,
    HellaSwag,
    HumanEval,
    Lambada,
    SQuAD,
    TruthfulQA1,
    TruthfulQA2,
    WinoGrande,
    xquad,
)
from lmjax.evaluation.tasks.chinese_exams import CEVAL_NAMES, CMMLU_NAMES
from lmjax.evaluation.tasks.mmlu import GROUP_OF
from lmjax.evaluation.tasks.xquad import WORDS

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # nothing is downloaded
MOST = 256  # tokens that the harness lets a model write, unless a task says other
# Our measures of solutions, and the filters of the harness.
RULES = {"exact_match": "strict-match", "flexible_match": "flexible-extract"}

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed: pip install 'lmjax[lm-eval]'", allow_module_level=True)


class Case(NamedTuple):
    """A task of ours and of the harness over the same documents.

    Attributes:
      yaml: of the harness's task.
      kind: our task.
      document: makes one of a number.
      settings: of our task.
      parts: names of the part that is asked about, and of the one that examples are from.
      shots: numbers of examples that are compared.
      file: what the files are named after.
    """

    yaml: str
    kind: Any
    document: Any
    settings: Mapping[str, Any] = MappingProxyType({})
    parts: tuple[str, str] = ("test", "train")
    shots: tuple[int, ...] = (0, 3)
    file: str = "set"


def arc(n):
    choices = {"text": ["ice ", "a “stone”", "10", "iron's"], "label": list("ABCD")}
    question = f"Which of {n} melts? "
    return {"id": f"q{n}", "question": question, "choices": choices, "answerKey": "ABCD"[n % 4]}


def hellaswag(n):
    ends = ["sits [x]  down.", "[title] He rides", " waits", "[header] Sail [title] Away"]
    text = {"ctx_a": "A man  is up [step].", "ctx_b": f"he [title] wAits {n}", "ctx": ""}
    return {"ind": n, "activity_label": "Roof [y]", **text, "endings": ends, "label": str(n % 4)}


def piqa(n):
    return {"goal": f"Boil {n} eggs ", "sol1": "heat it", "sol2": " cool it", "label": n % 2}


def winogrande(n):
    sentence = f"Of {n} cups _ fell, as it_was wet. "
    return {"sentence": sentence, "option1": "mine", "option2": "hers", "answer": "12"[n % 2]}


def boolq(n):
    return {"passage": f"It is {n}. ", "question": "is it so", "idx": n, "label": n % 2}


def lambada(n):
    return {"text": f"a  {n} cup of tea."}


def truthfulqa(n):
    targets = {"choices": ["No", "Never", "Yes"], "labels": [1, n % 2, 0]}
    return {"question": f"Can {n} pigs fly?", "mc1_targets": targets, "mc2_targets": targets}


def mmlu(n):
    return {"question": f" Is it\n{n}? ", "choices": ["1", "a b ", "c", "d"], "answer": n % 4}


def exam(question, answer):
    def document(n):
        options = {"A": "甲", "B": "乙 ", "C": "3", "D": "丁"}
        return {"id": n, question: f" 第{n}题？ ", **options, answer: "ABCD"[n % 4]}

    return document


def agieval(n):
    query = f"Q: Which of {n}? Answer Choices: (A)one (B)two\nA: Among A through B, the answer is"
    return {"query": query, "choices": ["(A)one", "(B)two"], "gold": [0, 1] if n else [1]}


def gsm8k(n):
    return {"question": f"{n} + 1? ", "answer": f"It is <<{n}+1={n + 1}>>.\n#### {n + 1},000"}


def crows(n):
    return {"sent_more": f"{n} a. ", "sent_less": "b", "stereo_antistereo": "", "bias_type": "age"}


def humaneval(n):
    fields = {"canonical_solution": "    return 1\n", "test": "def check(f):\n    pass\n"}
    return {"task_id": f"t/{n}", "prompt": f"def f{n}():\n", "entry_point": f"f{n}", **fields}


def mbpp(n):
    tests = [f"assert f{n}() == 1", "assert True", "assert 1 "]
    fields = {"test_setup_code": "", "is_fewshot": True}
    return {"task_id": n, "text": f"Give {n}. ", "code": f"def f{n}():\r\n", "test_list": tests} | (
        fields
    )


def squad(n):
    answers = {"text": [f"tea {n}", "tea"] if n else [], "answer_start": [0, 0] if n else []}
    text = {"title": "Tea", "context": "Tea is hot. ", "question": f"What is {n}?"}
    return {"id": str(n), **text, "answers": answers}


def xquad_document(n):
    return squad(n) | {"answers": {"text": [f"tea {n}"], "answer_start": [0]}}


def coqa(n):
    people = [["Mia", f"A kite {n}"], ["Mia", f"a KITE {n}"], ["she", "the kite"]]
    turns = [{"input_text": given} for given in people]
    return {
        "source": ["cnn", "mctest"][n % 2],
        "story": f"Mia has {n} kites. ",
        "questions": {"input_text": ["Who?", "What?"]},
        "answers": turns[0],
        "additional_answers": {"0": turns[1], "1": turns[2]},
    }


VALID = "validation", "train"
OWN = "validation", "validation"  # examples are other documents of the same part
CODE = {"run_code": True, "allow_network": True}
CASES = {
    "arc": Case("arc/arc_challenge.yaml", Arc, arc),
    "hellaswag": Case("hellaswag/hellaswag.yaml", HellaSwag, hellaswag, parts=VALID),
    "piqa": Case("piqa/piqa.yaml", PIQA, piqa, parts=VALID),
    "winogrande": Case("winogrande/default.yaml", WinoGrande, winogrande, parts=VALID),
    "boolq": Case("super_glue/boolq/default.yaml", BoolQ, boolq, parts=VALID),
    "lambada": Case(
        "lambada/lambada_openai.yaml",
        Lambada,
        lambda n: {"text": f"a  {n} cup of tea."},
        shots=(0,),
    ),
    "mc1": Case("truthfulqa/truthfulqa_mc1.yaml", TruthfulQA1, truthfulqa, parts=VALID, shots=(0,)),
    "mc2": Case("truthfulqa/truthfulqa_mc2.yaml", TruthfulQA2, truthfulqa, parts=VALID, shots=(0,)),
    "mmlu": Case(
        "mmlu/default/mmlu_us_foreign_policy.yaml",
        MMLU,
        mmlu,
        {"subjects": ("us_foreign_policy",)},
        ("test", "dev"),
        file="us_foreign_policy",
    ),
    "ceval": Case(
        "ceval/ceval-valid_accountant.yaml",
        CEval,
        exam("question", "answer"),
        parts=("val", "dev"),
        file="accountant",
    ),
    "cmmlu": Case(
        "cmmlu/cmmlu_agronomy.yaml",
        CMMLU,
        exam("Question", "Answer"),
        parts=("test", "dev"),
        file="agronomy",
    ),
    "agieval": Case("agieval/sat-math.yaml", AGIEval, agieval, shots=(0,)),
    "crows": Case("crows_pairs/crows_pairs_english.yaml", CrowSPairs, crows, shots=(0,)),
    "gsm8k": Case("gsm8k/gsm8k.yaml", GSM8K, gsm8k),
    "humaneval": Case("humaneval/humaneval.yaml", HumanEval, humaneval, CODE, shots=(0,)),
    "mbpp": Case("mbpp/mbpp.yaml", MBPP, mbpp, CODE),
    "squad": Case("squadv2", SQuAD, squad, {"version": "2.0"}, VALID, (0,)),
    "coqa": Case("coqa/default.yaml", CoQA, coqa, {"rules": "harness"}, VALID),
    **{
        f"xquad {name}": Case(
            f"xquad/xquad_{name}.yaml", xquad, xquad_document, {"language": name}, OWN
        )
        for name in WORDS
    },
}


@pytest.fixture
def harness(monkeypatch):
    """Makes a task of the harness over documents by part, with its requests."""
    from datasets import Dataset

    # The harness's tasks name modules that transformers has no more, or that take long to load; no
    # measure of theirs is taken here.
    metrics = "transformers.data.metrics"
    for name in {metrics, f"{metrics}.squad_metrics", "evaluate"} - {*sys.modules}:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def made(case, documents, shots):
        sets = {part: Dataset.from_list(given) for part, given in documents.items()}
        task = _squad_task(sets) if case.yaml == "squadv2" else _yaml_task(case, sets)
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(1234)
        task.build_all_requests(rank=0, world_size=1)
        return task

    return made


def tasks_folder():
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks"


def _yaml_task(case, sets):
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    runs_code = case.kind in (HumanEval, MBPP)  # whose measures are fetched from the hub
    values = load_yaml(tasks_folder() / case.yaml, resolve_func=not runs_code)
    if runs_code:
        del values["metric_list"]
        values.pop("filter_list", None)
        if "fewshot_config" in values:  # its own examples, which are in the hub's words
            values["fewshot_config"] = {"sampler": "first_n", "samples": list(sets["train"])}
    for key in ("tag", "task_alias", "dataset_kwargs"):
        values.pop(key, None)
    return ConfigurableTask(config=values | {"custom_dataset": lambda **_: sets})


def _squad_task(sets):
    from lm_eval.tasks.squadv2.task import SQuAD2

    class Local(SQuAD2):
        def download(self, *args, **kwargs):
            self.dataset = sets

    return Local()


def written_files(case, folder):
    """Documents by part, and the files that they are in; the last example is asked about too."""
    asked, shown = case.parts
    documents = {
        asked: [case.document(n) for n in range(4)],
        shown: [case.document(n) for n in range(4, 9)],
    }
    paths = {}
    for part, given in documents.items():
        paths[part] = folder / f"{case.file}_{part}.jsonl"
        paths[part].write_text("".join(json.dumps(one) + "\n" for one in given), "utf-8")
    return documents, [str(paths[part]) for part in case.parts]


def asked_by_us(task):
    found = []
    for one in (request for question in task.questions() for request in question.requests):
        if isinstance(one, WrittenRequest):
            found.append([one.prompt, list(one.stop), one.max_tokens])
        else:
            found.append([one.context, one.continuation])
    return found


def asked_by_them(task):
    written = [one for one in task.instances if one.request_type == "generate_until"]
    if not written:
        return [list(one.args) for one in task.instances]
    # Beside each it asks of SQuAD how likely it is that there is no answer.
    asked = (one.args for one in written)
    return [[context, rest["until"], rest.get("max_gen_toks", MOST)] for context, rest in asked]


@pytest.mark.parametrize("name", CASES)
def test_requests_are_those_of_the_harness(tmp_path, harness, name):
    case = CASES[name]
    documents, (path, examples) = written_files(case, tmp_path)
    for shots in case.shots:
        theirs = harness(case, documents, shots)
        settings = {"shots": shots, "examples_path": examples, "drawing": "harness"}
        ours = case.kind(path=path, **case.settings, **(settings if shots else {}))
        wanted = asked_by_them(theirs)
        assert asked_by_us(ours) == wanted and wanted


def test_headings_name_each_subject_as_the_harness_does():
    from lm_eval.tasks._yaml_loader import load_yaml

    kinds = (
        ("mmlu/default", "mmlu_", MMLU(path="x"), GROUP_OF),
        ("ceval", "ceval-valid_", CEval(path="x"), CEVAL_NAMES),
        ("cmmlu", "cmmlu_", CMMLU(path="x"), CMMLU_NAMES),
    )
    for folder, prefix, task, subjects in kinds:
        found = {}
        for path in (tasks_folder() / folder).glob(f"{prefix}*.yaml"):
            found[path.stem.removeprefix(prefix)] = load_yaml(path, recursive=False)["description"]
        assert found == {subject: task.description(subject) for subject in subjects}


def test_numbers_of_solutions_are_found_as_the_harness_finds_them(tmp_path, harness):
    case = CASES["gsm8k"]
    documents, (path, _) = written_files(case, tmp_path)
    theirs = harness(case, documents, 0)
    task, texts = GSM8K(path=path), (
        *("#### 1,000", "#### 1000.", "so $1,000 #### -1000", "1000.00", "it is 1000!", "####1000"),
        *("a ... 1000 ..", "#### 2000\n#### 1000", "1000 apples and $", "none", "-1,000", "$1000.",
          "is 1000\n\n"),
    )  # fmt: skip
    for text in texts:
        for one in theirs.instances:
            one.resps = [text]
        theirs.apply_filters()
        for question, one in zip(task.questions(), theirs.instances, strict=True):
            ours = task.measure(question.item, [Written((text,))])
            for name, key in (
                ("exact_match", "strict-match"),
                ("flexible_match", "flexible-extract"),
            ):
                wanted = theirs.process_results(one.doc, [one.filtered_resps[key]])["exact_match"]
                assert ours[name] == wanted, (text, name)


@pytest.mark.parametrize("name", ["agieval", "crows", "mc2", "coqa"])
def test_scores_of_own_functions_are_those_of_the_harness(tmp_path, harness, name):
    case = CASES[name]
    documents, (path, _) = written_files(case, tmp_path)
    theirs, task = harness(case, documents, 0), case.kind(path=path, **case.settings)
    for number, (question, document) in enumerate(
        zip(task.questions(), documents[case.parts[0]], strict=True)
    ):
        if name == "coqa":  # the answers that count; its measure needs an older transformers
            assert list(question.item.details["answers"]) == theirs.doc_to_target(document)
            continue
        values = [-1.0 - (n + number) % 3 for n in range(len(question.requests))]
        ours = task.measure(question.item, [Likelihood(value, False, 1) for value in values])
        wanted = theirs.process_results(document, [(value, False) for value in values])
        wanted = {"mc2": wanted["acc"]} if name == "mc2" else wanted
        assert ours == pytest.approx(wanted)


def test_the_authors_files_of_agieval(tmp_path):
    english = {"passage": "P. ", "question": "Q?", "options": ["(A)x", "(B)y"], "label": "B"}
    chinese = {"passage": None, "question": "问？", "options": ["(A)x", "(B)y", "(C)z"]}
    written = {"passage": None, "question": "Q?", "options": None, "label": None, "answer": "5"}
    path = tmp_path / "jec-qa-kd.jsonl"
    records = english, {**chinese, "label": ["A", "C"]}, written
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    task = AGIEval(path=str(path))
    first, second = task.questions()
    assert (
        first.context == "P. Q: Q? Answer Choices: (A)x (B)y\nA: Among A through B, the answer is"
    )
    assert [one.continuation for one in first.requests] == [" (A)x", " (B)y"]
    assert second.context == "问题：问？ 选项：(A)x (B)y (C)z\n答案：从A到C, 我们应选择"
    assert second.item.details["golds"] == (0, 2) and task.left_out() == 1
    assert task.chance(second.item)["acc"] == pytest.approx(2 / 3)
    path.write_text(json.dumps({**english, "label": "D"}))
    with pytest.raises(UserError, match="line 1: gold is 'D'; it must be one of the 2 options"):
        task.questions()


def test_questions_and_subjects_that_cannot_be_meant(tmp_path):
    path = tmp_path / "val.jsonl"
    path.write_text(json.dumps(exam("question", "answer")(0)) + "\n", "utf-8")
    with pytest.raises(UserError, match="subject is 'val'; it must be one of accountant, "):
        CEval(path=str(path)).questions()
    with pytest.raises(UserError, match=r"it has no \{question"):
        SQuAD(path="x", template="{context}")
    with pytest.raises(UserError, match="draws whole stories, as rules=harness"):
        CoQA(path="x", drawing="harness")
