"""Tasks inside a training run: scores in metrics.jsonl, tables and the report, and mistakes."""

import json

import jax
import pytest

from lmjax.config import UserError, replace
from lmjax.data import Bytes, Data, Domain, TextFiles
from lmjax.evaluation.answering import Answering
from lmjax.evaluation.task_evaluator import result_of
from lmjax.evaluation.tasks import Arc, Lambada, Translation
from lmjax.generation import load_run
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.report import content
from lmjax.jobs.results import Results
from lmjax.jobs.settings import Checkpoints, Evaluation
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.parallel import Mesh
from lmjax.runs.folder import RunFolder
from lmjax.training.schedules import Constant


def small(folder, **changes):
    """A run of four steps on lines, and tasks with few examples."""
    (folder / "corpus.txt").write_text("".join(f"line {n} and {n * n}\n" for n in range(300)))
    choices = {"text": ["ice", "a stone"], "label": ["A", "B"]}
    files = {
        "arc": [
            {"question": f"{n}?", "choices": choices, "answerKey": "AB"[n % 2]} for n in range(6)
        ],
        "lambada": [{"text": f"line {n} and {n}"} for n in range(3)],
        "pairs": [{"source": f"line {n}", "target": f"{n} is a line"} for n in range(3)],
    }
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    tasks = (
        Arc(path=f"{folder}/arc.jsonl", shots=2),
        Lambada(path=f"{folder}/lambada.jsonl"),
        Translation(path=f"{folder}/pairs.jsonl", shots=1, max_tokens=4),
    )
    source = TextFiles(path=f"{folder}/corpus.txt", split="line")
    return Pretrain(
        output=f"{folder}/run",
        steps=4,
        model=TransformerConfig(
            vocab_size=257,
            hidden=16,
            num_layers=1,
            max_length=96,
            attention=AttentionConfig(num_heads=4, head_dim=4),
            feed_forward=FeedForwardConfig(size=32),
        ),
        data=Data(
            train=(Domain(name="lines", source=source),),
            tokenizer=Bytes(),
            held_out=0.2,
            length=32,
            batch_size=8,
            cache=f"{folder}/cache",
        ),
        schedule=Constant(peak=1e-2, warmup=0),
        mesh=Mesh(fsdp=8),
        evaluation=Evaluation(every=2, tasks=tasks, prompts=()),
        checkpoint=Checkpoints(every=4),
        **changes,
    )


def test_scores_of_tasks_are_written_during_a_run(tmp_path):
    job = small(tmp_path)
    job.run()
    folder = RunFolder(job.output)
    lines = [line for line in folder.metrics() if line["split"].startswith("tasks/")]
    assert [(line["step"], line["split"], line["items"]) for line in lines] == [
        (step, f"tasks/{name}", items)
        for step in (2, 4)
        for name, items in (("Arc", 6), ("Lambada", 3), ("Translation", 3))
    ]
    with jax.set_mesh(job.mesh.build()):
        answering = Answering(load_run(job.output))
        found = [result_of(task, task.questions(), answering) for task in job.evaluation.tasks]
    for line, result in zip(lines[3:], found, strict=True):
        for measure in result.task.measures:
            assert line[measure.name] == pytest.approx(result.estimate(measure).value, rel=1e-4)
    tables = {table.title: table for table in Results.from_json(folder.results()).tables}
    row = tables["Scores"].by_row()["Arc 2-shot acc"]
    assert row["the model"] == lines[3]["acc"] and row["guessing"] == 0.5
    assert tables["Intervals of the model"].by_row()["Translation 1-shot chrf"]["items"] == 3
    [shown] = content(folder)["runs"]
    assert [one["step"] for one in shown["tasks"]["Lambada"]] == [2, 4]
    assert not any("tasks" in name for name in shown["held_out"])


def test_mistakes_in_tasks_are_told_before_the_first_step(tmp_path):
    job = small(tmp_path)
    with pytest.raises(UserError, match=r"shots=6, but .* has 5 examples"):
        tasks = (Arc(path=f"{tmp_path}/arc.jsonl", shots=6),)
        replace(job, evaluation=Evaluation(every=2, tasks=tasks)).run()
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "word " * 40 + "end"}) + "\n")
    with pytest.raises(UserError, match="the shortest question has 200 tokens; the model reads 96"):
        tasks = (Lambada(path=f"{tmp_path}/long.jsonl"),)
        replace(job, evaluation=Evaluation(every=2, tasks=tasks)).run()
    assert not RunFolder(job.output).metrics()


def test_models_that_give_no_texts_have_no_tasks(tmp_path):
    tasks = small(tmp_path).evaluation.tasks
    with pytest.raises(UserError, match="tasks=Arc, Lambada, Translation: a reward model has no"):
        Evaluation(tasks=tasks).refuse_tasks("a reward model")
    assert Evaluation().refuse_tasks("a reward model") is None
