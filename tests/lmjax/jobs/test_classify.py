"""Fine-tuning on labelled texts: a causal model, an encoder, numbers; the reported measures."""

import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.data import Data, Domain, LabelledTexts, TextFiles
from lmjax.evaluation.label_measures import confusions_of, count_classes
from lmjax.jobs.best import BestCheckpoint
from lmjax.jobs.classify import Classify
from lmjax.jobs.settings import ChatEvaluation, Checkpoints
from lmjax.jobs.weak_labels import Teacher, WeakLabels
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    LoRA,
    TransformerConfig,
    initialize,
)
from lmjax.objectives import Augmentation, Classification, Regression, TextLabels
from lmjax.objectives.labels import outputs_for
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import read_metrics
from lmjax.training.placement import to_devices
from lmjax.training.schedules import Constant
from tests.lmjax.jobs.base_run import go_on_from, write_base
from tests.lmjax.objectives.test_text_labels import MODEL as HEADED
from tests.lmjax.objectives.test_text_labels import rows_of

LENGTH = 16
MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
    dropout=0.1,
)
NAMES = ("capital", "digit", "small")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a pretrained run, and texts whose class is the kind of their characters."""
    folder = tmp_path_factory.mktemp("classify")
    write_base(folder, MODEL)
    draw = np.random.default_rng(0)
    letters = dict(zip(NAMES, ("ABCDEF", "012345", "abcdef"), strict=True))
    records = []
    for n in range(240):
        label = NAMES[n % 4 // 2 if n % 4 else 2]
        text = "".join(draw.choice(list(letters[label]), draw.integers(2, 9)))
        records.append({"text": text, "label": label, "share": len(text) / 8})
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def job_of(folder, name, fields=(), **settings):
    source = LabelledTexts(path=str(folder / "texts.jsonl"), **dict(fields))
    data = Data(
        train=(Domain(name="texts", source=source),),
        held_out=0.3,
        length=LENGTH,
        batch_size=16,
        rows="groups",
        cache=str(folder / "cache"),
    )
    defaults = {
        "output": str(folder / name),
        "steps": 20,
        "begin_with": str(folder / "base"),
        "data": data,
        "schedule": Constant(peak=1e-2, warmup=0),
        "evaluation": ChatEvaluation(every=10),
        "checkpoint": Checkpoints(every=10),
    }
    return Classify(**(defaults | settings))


def tables_of(job):
    return {table["title"]: table["rows"] for table in RunFolder(job.output).results()["tables"]}


@pytest.fixture(scope="module")
def classes(folder):
    """A classifier of the three classes."""
    job = job_of(folder, "classes")
    job.run()
    return job


def test_it_learns_the_classes_and_reports_them(folder, classes):
    job = classes
    *_, record = read_metrics(job.output)
    assert (record["split"], record["step"]) == ("held_out/texts", 20)
    assert record["accuracy"] > 0.9
    assert record["loss"] < math.log(3) / 2
    tables = tables_of(job)
    [(title, guess, f1, error, right)] = tables["Classification"]
    count = int(title.removeprefix("texts, "))
    assert count == record["tokens"] and 40 < count < 110
    assert right == pytest.approx(record["accuracy"], abs=1e-6)
    assert error == pytest.approx(math.sqrt(right * (1 - right) / count))
    assert f1 > 0.9 and 0.2 < guess < 0.8
    _, *last = (line for line in read_metrics(job.output) if line["step"] == 20)
    assert last == [record]
    for measure, value in {"macro_f1": f1, "loss": record["loss"]}.items():
        choice = BestCheckpoint(measure=measure, better="higher")
        assert choice.value_of(last) == pytest.approx(value, abs=1e-6)
    assert [row[0] for row in tables["Confusion"]] == list(NAMES)
    assert all(sum(row[1:-1]) == pytest.approx(1) for row in tables["Confusion"])
    config = json.loads((folder / "classes" / "config.json").read_text())
    [head] = config["model"]["heads"]
    assert head["labels"] == list(NAMES) and head["outputs"] == 3
    assert config["data"]["train"][0]["source"]["labels"] == list(NAMES)
    assert "Classification" in (folder / "classes" / "report.html").read_text("utf-8")


def test_the_head_of_words_stays_where_words_are_learnt_too(folder):
    plain = job_of(folder, "plain").with_model().model
    words = job_of(folder, "words", objective=TextLabels(words=0.5)).with_model().model
    assert (plain.word_head, words.word_head) == (False, True)
    assert plain.heads == words.heads


def test_numbers_are_learnt_beside_their_mean(folder):
    """The number is the length of the text, which a sum over its bytes can tell."""
    job = job_of(
        folder,
        "numbers",
        {"kind": "number", "label": "share"},
        objective=TextLabels(objective=Regression()),
        steps=60,
    )
    job.run()
    [(name, spread, error)] = tables_of(job)["Squared error"]
    assert name == "texts"
    assert 0.04 < spread < 0.12  # of 2/8 to 8/8, evenly: 4/64
    assert error < spread / 2


def test_the_head_is_that_of_the_kind_of_model(folder):
    causal = job_of(folder, "head").with_model().model
    [head] = causal.heads
    assert not causal.word_head
    assert (head.token, head.pooler, head.bias, head.labels) == ("last", False, False, NAMES)
    adapted = job_of(folder, "head", model=replace(MODEL, lora=LoRA())).with_model().model
    assert adapted == replace(causal, lora=LoRA())
    given = replace(MODEL, heads=(replace(head, labels=()),), word_head=False)
    assert job_of(folder, "head", model=given).with_model().model == given
    other = replace(given, heads=(replace(head, labels=("a", "b", "c")),))
    with pytest.raises(UserError, match=r"the head 'label' of model\.heads has 3 outputs"):
        job_of(folder, "head", model=other).with_model()


def test_the_classes_of_all_sources_are_one_list(folder, tmp_path):
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": "?", "label": "mark"}))
    more = LabelledTexts(path=str(tmp_path / "more.jsonl"))
    job = job_of(folder, "several")
    [domain] = job.data.train
    both = replace(job.data, train=(replace(domain, evaluation=more),))
    [named] = replace(job, data=both).with_model().data.train
    names = ("capital", "digit", "mark", "small")
    assert named.source.labels == named.evaluation.labels == names
    given = replace(domain, evaluation=replace(more, labels=("mark",)))
    given = replace(given, source=replace(given.source, labels=NAMES))
    with pytest.raises(UserError, match="the sources have different labels"):
        replace(job, data=replace(job.data, train=(given,))).with_model()


def test_mistakes(folder):
    job = job_of(folder, "mistakes")
    text = Domain(name="lines", source=TextFiles(path=str(folder / "corpus.txt")))
    for message, settings in {
        "TextFiles has no labels": {"data": replace(job.data, train=(text,))},
        "TextLabels reads data.rows=groups": {"data": replace(job.data, rows="ring")},
        "Regression learns kind=number": {"objective": TextLabels(objective=Regression())},
    }.items():
        with pytest.raises(UserError, match=message):
            replace(job, **settings)


# ---- the measures --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{"fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_confusion_matrix_is_counted_on_any_mesh(shape):
    """Beside a loop over the outputs; a text without a label is not counted."""
    labels = [2, 0, 1, 2, None, 0, 1, 2]
    objective = Classification()
    with jax.set_mesh(Mesh(**shape).build(jax.devices()[: math.prod(shape.values())])):
        layout = training_layout()
        graph, params = initialize(HEADED, layout, jax.random.key(0))
        example = to_devices(rows_of(TextLabels(), labels), layout, 257)

        @jax.jit
        def both(params, example):
            model = nnx.merge(graph, params)
            hidden, _ = model(example.inputs)
            logits, _ = outputs_for(objective, model, hidden, example, None)
            return logits, count_classes(objective, model, example)

        logits, matrix = jax.device_get(both(params, example))
    expected = np.zeros((3, 3), int)
    for label, row in zip(labels, logits[:, 0], strict=True):
        if label is not None:
            expected[label, row.argmax()] += 1
    np.testing.assert_array_equal(matrix, expected)


def test_of_many_classes_the_most_frequent_mistakes_are_shown():
    matrix = np.diag(np.arange(1, 15))
    matrix[3, 5], matrix[0, 1] = 4, 2
    names = tuple("abcdefghijklmn")
    table, whole = confusions_of(matrix, names, "Confusion")
    assert table.rows == (("d: f, 4", 0.5), ("a: b, 2", 2 / 3))
    assert whole.picture and len(whole.rows) == 14 and whole.rows[3][6] == 0.5
    assert len(confusions_of(np.eye(201, dtype=int), ("x",) * 201, "Confusion")) == 1


def test_a_teacher_labels_texts_that_it_is_sure_of(folder, classes, capsys):
    """Against a loop over single texts; the lines are read as labelled texts again."""
    draw = np.random.default_rng(7)
    texts = ["".join(draw.choice(list("ABCDEF012345"), draw.integers(1, 9))) for _ in range(30)]
    texts += ["abcdef" * 6, "  "]  # longer than a row; blank
    path, output = folder / "unlabelled.jsonl", folder / "weak.jsonl"
    path.write_text("\n".join(json.dumps({"body": text}) for text in texts))
    settings = {"teacher": classes.output, "texts": str(path), "field": "body"}
    weak = WeakLabels(**settings, output=str(output), confidence=0.8, batch_size=8)
    weak.run()
    assert "of 31 texts are written" in capsys.readouterr().out
    found = [json.loads(line) for line in output.read_text().splitlines()]
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        model = Teacher(replace(weak, batch_size=1))
        alone = [next(model.label(iter([text]))) for text in texts[:-1]]
    expected = [one for one in alone if one.confidence >= 0.8]
    assert 5 < len(expected) < 31
    assert [(line["text"], line["label"]) for line in found] == [one[:2] for one in expected]
    for line, one in zip(found, expected, strict=True):  # rounding of float32 by batch size
        assert line["confidence"] == pytest.approx(one.confidence, abs=1e-5)
    again = list(LabelledTexts(path=str(output)).documents())
    assert [document.text for document in again] == [line["text"] for line in found]
    with pytest.raises(UserError, match="is there already"):
        weak.run()
    for wrong, message in (
        ({"teacher": str(folder / "base")}, "no head that tell"),
        ({"texts": str(folder / "blank.jsonl")}, "there is no text in the field 'body'"),
    ):
        (folder / "blank.jsonl").write_text('{"body": " "}')
        with pytest.raises(UserError, match=message):
            WeakLabels(**settings | wrong, output=str(folder / "x")).run()
    assert not (folder / "x").exists()


def test_augmented_training_learns_too_and_goes_on_bit_for_bit(folder):
    augmentation = Augmentation(deletion=0.1, swap=0.2, synonyms=0.1)
    settings = {
        "objective": TextLabels(augmentation=augmentation),
        "checkpoint": Checkpoints(every=10),
    }
    whole = job_of(folder, "augmented", **settings)
    whole.run()
    lines = [(m["step"], m["loss"]) for m in read_metrics(whole.output)]
    assert lines != [(m["step"], m["loss"]) for m in read_metrics(str(folder / "classes"))]
    go_on_from(whole, 10)
    assert [(m["step"], m["loss"]) for m in read_metrics(whole.output)] == lines
    experiment = RunFolder(whole.output).experiment()
    assert experiment.objective.augmentation.special == (256,)
    with pytest.raises(UserError, match=r"augmentation\.mask='\[MASK\]' is no special token"):
        refill = Augmentation(refill=0.1, refill_with=str(folder / "base"))
        job_of(folder, "refill", objective=TextLabels(augmentation=refill)).with_model()
    with pytest.raises(UserError, match=r"no masked model, .* nor one that fills blanks"):
        refill = replace(refill, mask="<|endoftext|>")
        job_of(folder, "refill", objective=TextLabels(augmentation=refill)).with_model()
