"""The job that evaluates models: its numbers, going on after a kill, and what it refuses."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import pytest

from lmjax.config import UserError, config, replace, to_json
from lmjax.console import Table
from lmjax.data import Bytes, Data, Domain, TextFiles, prepare
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.evaluation import answer_file
from lmjax.evaluation.answering import Answering
from lmjax.evaluation.requests import Likelihood, Written, answer_record, read_answer
from lmjax.evaluation.task_evaluator import result_of
from lmjax.evaluation.tasks import GSM8K, Arc, Lambada
from lmjax.generation import load_run
from lmjax.jobs.evaluate import Evaluate, model_key
from lmjax.jobs.results import Results
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, initialize
from lmjax.objectives import Objective, PrefixLM
from lmjax.parallel import Mesh, generation_layout
from lmjax.runs.checkpoints import Checkpointer
from lmjax.runs.folder import RunFolder

MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=96,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(size=32),
)


@config
class ScoredRun:
    """What evaluation needs to know of an experiment."""

    model: TransformerConfig = MODEL  # what was trained
    ema_decay: float | None = None  # decay of an average of the parameters


@config
class RunOnText(ScoredRun):
    """The same, with text to train on."""

    data: Data  # text that the model was trained on


@config
class PrefixRun(ScoredRun):
    """The same, trained on prefixes."""

    objective: Objective = PrefixLM()  # what it was trained to do


def write_run(folder, seed, experiment=None, change=None):
    """A run folder with random parameters, or with what `change` makes of each of them."""
    folder.mkdir()
    (folder / "config.json").write_text(to_json(experiment or ScoredRun()))
    ByteTokenizer().save(folder / "tokenizer")
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        _, params = initialize(MODEL, generation_layout(), jax.random.key(seed))
        if change is not None:
            params = jax.tree.map(change, params)
        with Checkpointer(folder / "checkpoints") as checkpointer:
            tree = {"params": params, "average": None, "step": jnp.int32(1)}
            checkpointer.save(1, tree, {"tokenizer": ByteTokenizer().fingerprint})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs, and files of three tasks."""
    root = tmp_path_factory.mktemp("evaluated")
    for seed, name in enumerate(("one", "two")):
        write_run(root / name, seed)
    choices = {"text": ["ice", "a stone"], "label": ["A", "B"]}
    questions = [
        {"question": f"Is it {n}?", "choices": choices, "answerKey": "AB"[n % 2]} for n in range(5)
    ]
    files = {
        "arc": questions,
        "lambada": [{"text": "a cup of tea"}, {"text": "the end of it"}],
        "gsm8k": [{"question": "1+1?", "answer": "#### 2"}],
    }
    for name, records in files.items():
        (root / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        (root / name).rename(root / f"{name}.jsonl")
    return root


def tasks(root):
    return (
        Arc(path=f"{root}/arc.jsonl", shots=1),
        Lambada(path=f"{root}/lambada.jsonl"),
        GSM8K(path=f"{root}/gsm8k.jsonl", max_tokens=4),
    )


def job(root, output, *names):
    models = tuple(str(root / name) for name in names)
    mesh = Mesh(fsdp=1, data=1) if jax.device_count() == 1 else Mesh()
    return Evaluate(output=str(output), models=models, tasks=tasks(root), batch_size=4, mesh=mesh)


@pytest.fixture(scope="module")
def finished(runs, tmp_path_factory):
    """An evaluation of both runs, and its results."""
    output = tmp_path_factory.mktemp("out") / "evaluation"
    job(runs, output, "one", "two").run()
    return output, json.loads((output / "results.json").read_text())


def table(results, title):
    found = next(one for one in results["tables"] if one["title"] == title)
    return {row[0]: dict(zip(found["columns"][1:], row[1:])) for row in found["rows"]}


def test_the_scores_are_those_of_the_models(runs, finished, one_device):
    scores = table(finished[1], "Scores")
    for name in ("one", "two"):
        answering = Answering(load_run(runs / name))
        for task in tasks(runs):
            result = result_of(task, task.questions(), answering)
            for measure in (m for m in task.measures if m.more_is_better):
                shots = task.shots
                row = scores[f"{task.name} {shots}-shot {measure.name}"]
                assert row[name] == pytest.approx(result.estimate(measure).value)
    assert scores["Arc 1-shot acc"]["guessing"] == 0.5
    assert scores["Arc 1-shot acc"]["by length"] == 0.6  # the shorter one, of five questions
    intervals = table(finished[1], "Intervals of one")
    assert intervals["Arc 1-shot acc"]["items"] == 5
    beside = table(finished[1], "two beside one")["Arc 1-shot acc"]
    row = scores["Arc 1-shot acc"]
    assert beside["difference"] == pytest.approx(row["two"] - row["one"])
    assert beside["two alone"] - beside["one alone"] == pytest.approx(5 * beside["difference"])
    assert table(finished[1], "Calibration errors")["Arc 1-shot acc"].keys() == {"one", "two"}
    page = (finished[0] / "report.html").read_text()
    assert "Question: Is it 0?" in page and "stops at" in page


def test_what_was_answered_is_not_asked_again(runs, finished, tmp_path, monkeypatch):
    """After a kill in the middle of a line, and with the same numbers."""
    output = tmp_path / "again"
    job(runs, output, "one").run()
    [path] = (output / "replies").iterdir()
    assert path.name == f"{model_key(str(runs / 'one'), None)}.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]) + lines[7][:9])
    asked = []
    original = answer_file.AnswerFile.add
    monkeypatch.setattr(
        answer_file.AnswerFile,
        "add",
        lambda self, request, answer: (asked.append(request), original(self, request, answer)),
    )
    job(runs, output, "one").run()
    assert len(asked) == len(lines) - 7
    again = json.loads((output / "results.json").read_text())
    assert (
        table(again, "Scores")["Arc 1-shot acc"]["one"]
        == (table(finished[1], "Scores")["Arc 1-shot acc"]["one"])
    )
    asked.clear()
    job(runs, output, "one").run()
    assert asked == []


def test_two_models_never_share_an_answer(runs):
    keys = {
        model_key(str(runs / name), dtype)
        for name in ("one", "two")
        for dtype in (None, "bfloat16")
    }
    assert len(keys) == 4


def test_answers_are_kept_by_all_that_decides_about_them(tmp_path):
    """Precision as it is computed, ends of texts, and how a context is read."""
    write_run(tmp_path / "run", 0)
    folder = str(tmp_path / "run")
    key = model_key(folder, None)
    assert key == model_key(folder, "float32") != model_key(folder, "bfloat16")
    (tmp_path / "run" / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert (ended := model_key(folder, None)) != key
    (tmp_path / "run" / "config.json").write_text(to_json(PrefixRun()))
    assert model_key(folder, None) not in (key, ended)
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        assert load_run(folder).reads_prefix


def test_results_are_json_whatever_the_numbers(tmp_path):
    rows = (("a", math.inf), ("b", math.nan), ("c", 0.5))
    folder = RunFolder(tmp_path)
    folder.write_json(
        "results.json", Results(step=1, tables=(Table("T", ("n", "x"), rows),)).to_json()
    )

    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "results.json").read_text()
    [found] = json.loads(text, parse_constant=refuse)["tables"]
    assert found["rows"] == [["a", None], ["b", None], ["c", 0.5]]


def test_answers_are_read_as_they_were_written():
    for answer in (Likelihood(-1 / 3, True, 2, 1), Written(("a\u2028b", ""), 0)):
        assert read_answer(json.loads(json.dumps(answer_record(answer)))) == answer


def test_no_more_examples_than_fit(runs, tmp_path):
    """The model reads 96 bytes: a question with its answer has 34, an example 32 or 36."""
    task = Arc(path=f"{runs}/arc.jsonl", shots=4)
    found = {}
    for fit in (False, True):
        output = tmp_path / str(fit)
        replace(job(runs, output, "one"), tasks=(replace(task, fit=fit),)).run()
        results = json.loads((output / "results.json").read_text())
        scores = next(one for one in results["tables"] if one["title"] == "Scores")
        found[fit] = scores["rows"][0][0], len(scores["notes"])
    assert found == {False: ("Arc 4-shot acc", 1), True: ("Arc 1-shot acc", 0)}


@pytest.mark.parametrize(("chat", "shots"), [(None, 3), ("plain", 2)])
def test_a_chat_format_takes_room_of_examples(runs, tmp_path, chat, shots):
    """Of 96 bytes a question has 21 with its answer, an example 24, and the format 19."""
    (tmp_path / "short.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "question": f"Q{n}",
                    "choices": {"text": ["a", "b"], "label": ["A", "B"]},
                    "answerKey": "A",
                }
            )
            + "\n"
            for n in range(6)
        )
    )
    task = Arc(path=f"{tmp_path}/short.jsonl", shots=5, fit=True, limit=2)
    asked = replace(job(runs, tmp_path / "out", "one"), tasks=(task,), chat=chat)
    asked.run()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    scores = next(one for one in results["tables"] if one["title"] == "Scores")
    assert scores["rows"][0][0] == f"Arc {shots}-shot acc" and not scores["notes"]


def test_questions_in_a_chat_format(runs, tmp_path):
    """Prompts are the format's, and its answers are others than those of plain prompts."""
    asked = replace(job(runs, tmp_path / "out", "one"), chat="plain", tasks=tasks(runs)[:1])
    asked.run()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    [[_, prompt]] = next(t for t in results["tables"] if t["title"] == "Prompts")["rows"]
    assert prompt.startswith("User: Question: ") and "scored: 'ice'" in prompt
    [path] = (tmp_path / "out" / "replies").iterdir()
    assert len(path.read_text().splitlines()) == 10
    replace(asked, chat=None).run()
    assert len(path.read_text().splitlines()) == 20
    with pytest.raises(UserError, match="there is no chat template 'plane'"):
        replace(asked, chat="plane").run()


def test_mistakes_are_told(runs, tmp_path):
    with pytest.raises(UserError, match="give a run folder"):
        Evaluate(output=str(tmp_path / "a")).run()
    with pytest.raises(UserError, match="tasks: give one or more"):
        Evaluate(output=str(tmp_path / "a"), model=str(runs / "one")).run()
    double = (Lambada(path="a"), Lambada(path="b"))
    with pytest.raises(UserError, match="two have the name 'Lambada'"):
        Evaluate(output=str(tmp_path / "a"), model=str(runs / "one"), tasks=double).run()
    text = "word " * 40 + "end"
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}) + "\n")
    long = (Lambada(path=str(tmp_path / "long.jsonl")),)
    with pytest.raises(UserError, match="the shortest question has 200 tokens; the model reads 96"):
        Evaluate(output=str(tmp_path / "a"), model=str(runs / "one"), tasks=long).run()
    (runs / "one" / "tokenizer").rename(runs / "one" / "elsewhere")
    try:
        with pytest.raises(UserError, match="no tokenizer"):
            job(runs, tmp_path / "b", "one").run()
    finally:
        (runs / "one" / "elsewhere").rename(runs / "one" / "tokenizer")


def test_items_are_searched_in_the_training_text(runs, tmp_path):
    """And published scores stand beside those of the model."""
    said = [f"{n} came with one of the {n} red houses of the old town and saw a tree" for n in "ab"]
    (tmp_path / "text.txt").write_text(f"Once upon a time\n{said[0]}\nNothing.\n")
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in said))
    source = TextFiles(path=str(tmp_path / "text.txt"), split="line")
    domains = (Domain(name="text", source=source),)
    data = Data(train=domains, held_out=0.0, tokenizer=Bytes(), cache=str(tmp_path / "cache"))
    write_run(tmp_path / "run", 0, RunOnText(data=data))
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    prepare(data, tmp_path / "run" / "tokenizer")
    mesh = Mesh(fsdp=1, data=1) if jax.device_count() == 1 else Mesh()
    asked = Evaluate(
        output=str(tmp_path / "out"),
        model=str(tmp_path / "run"),
        tasks=(Lambada(path=str(tmp_path / "items.jsonl")),),
        published=("GPT-2 124M",),
        contamination=True,
        mesh=mesh,
    )
    asked.run()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    items = table(results, "Contamination of run")
    assert items["Lambada 0-shot acc, contaminated"]["number"] == 1
    assert items["Lambada 0-shot acc, clean"]["number"] == 1
    beside = table(results, "People and published models")["Lambada 0-shot acc"]
    assert beside["GPT-2 124M"] == 0.4599
    with pytest.raises(UserError, match="one: the run has no data"):
        replace(asked, model=str(runs / "one")).run()
