"""The command that evaluates models tells a user's mistakes: exit code 2, and what is wrong."""

import json
import math
import runpy
import shutil
import sys

import pytest

from tests.lmjax.jobs.test_evaluate import write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, one that gives no numbers, one without a tokenizer, and files of tasks."""
    root = tmp_path_factory.mktemp("command")
    write_run(root / "run", 0)
    shutil.copytree(root / "run", root / "mute")
    shutil.rmtree(root / "mute" / "tokenizer")
    write_run(root / "broken", 0, change=lambda array: array * math.nan)
    choices = {"text": ["ice", "a stone"], "label": ["A", "B"]}
    arc = [{"question": f"Is it {n}?", "choices": choices, "answerKey": "A"} for n in range(3)]
    files = {
        "arc": arc,
        "wrong": [*arc, {**arc[0], "answerKey": "E"}],
        "long": [{**arc[0], "question": "long " * 30}],
        "sums": [{"question": "1+1?", "answer": "#### 2"}],
    }
    for name, records in files.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return root


@pytest.fixture
def command(folder, tmp_path, monkeypatch, capsys):
    """Runs `python -m experiments.evaluate` here; gives its exit code and its words."""

    def ended(*words):
        words = [word.replace("FOLDER", str(folder)) for word in words]
        argv = ["evaluate", *words, f"output={tmp_path}/out", "batch_size=2"]
        monkeypatch.setattr(sys, "argv", argv)
        code = 0
        try:
            runpy.run_module("experiments.evaluate", run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err

    return ended


ARC = 'tasks=(Arc(path="FOLDER/arc.jsonl"),)'
MISTAKES = {
    "a model that gives no numbers": (
        ("FOLDER/broken", ARC),
        "the model gives no probabilities (NaN)",
    ),
    "the same, writing": (
        ("FOLDER/broken", 'tasks=(GSM8K(path="FOLDER/sums.jsonl", max_tokens=4),)'),
        "the model gives no probabilities (NaN)",
    ),
    "no model": ((ARC,), "model: give a run folder or a public model folder"),
    "no such folder": (("FOLDER/nothing", ARC), "FOLDER/nothing"),
    "no tokenizer": (("FOLDER/mute", ARC), "there is no tokenizer in FOLDER/mute"),
    "no such task": (("FOLDER/run", 'tasks=(Arcs(path="a"),)'), "near: Arc"),
    "no such setting": (("FOLDER/run", 'tasks=(Arc(path="a", shot=1),)'), "shots"),
    "no such file": (("FOLDER/run", 'tasks=(Arc(path="FOLDER/none.jsonl"),)'), "none.jsonl"),
    "a wrong field": (
        ("FOLDER/run", 'tasks=(Arc(path="FOLDER/wrong.jsonl"),)'),
        "wrong.jsonl, line 4: answerKey is 'E'; it must be one of A, B",
    ),
    "too few examples": (
        ("FOLDER/run", 'tasks=(Arc(path="FOLDER/arc.jsonl", shots=3),)'),
        "Arc: shots=3, but FOLDER/arc.jsonl has 2 examples besides the question itself",
    ),
    "a question that does not fit": (
        ("FOLDER/run", 'tasks=(Arc(path="FOLDER/long.jsonl"),)'),
        "Arc: the shortest question has 169 tokens; the model reads 96",
    ),
    "an answer that does not fit": (
        ("FOLDER/run", 'tasks=(GSM8K(path="FOLDER/sums.jsonl", max_tokens=90),)'),
        "tokens; the model reads 96, of which the answer may take 90",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_2_and_words(command, folder, mistake):
    words, wanted = MISTAKES[mistake]
    code, said = command(*words)
    # Lines are broken to the width of the terminal.
    assert code == 2 and "Traceback" not in said
    assert wanted.replace("FOLDER", str(folder)) in " ".join(said.split()), said


def test_without_a_mistake_it_ends_with_0(command):
    assert command("FOLDER/run", ARC)[0] == 0
