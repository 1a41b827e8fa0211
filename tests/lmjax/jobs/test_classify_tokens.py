"""Fine-tuning on words with classes: rows, several sets at once, columns, measures."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.data import (
    Bytes,
    Data,
    Domain,
    LabelledColumns,
    LabelledTexts,
    LabelledTokens,
    build_stores,
)
from lmjax.data.groups import Groups
from lmjax.data.spans import CLASSES, class_code, classes_of
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.jobs.classify_tokens import ClassifyTokens
from lmjax.jobs.settings import ChatEvaluation, Checkpoints
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    LoRA,
    TokenHeadConfig,
    TransformerConfig,
    initialize,
)
from lmjax.objectives import Classification, Example, TextLabels, TokenLabels
from lmjax.parallel import training_layout
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import read_metrics
from lmjax.training.placement import to_devices
from lmjax.training.schedules import Constant

LENGTH = 32
MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
)
SETS = ("kind", "entity")
NAMES = ("N", "V", "W"), ("B-NUM", "I-NUM", "O")
BOTH = TokenLabels(
    objectives=(Classification(head="kind"), Classification(head="entity")), weights=(1.0, 0.5)
)


def labelled(words):
    """A record; a word's last letter says its classes, of which % has none of the first set."""
    kinds = ["N" if w[-1].isdigit() else None if w == "%" else "VW"[w[-1] > "e"] for w in words]
    entities = ["I-NUM" if w == "%" else "B-NUM" if w[-1].isdigit() else "O" for w in words]
    return {"tokens": words, "kind": kinds, "entity": entities}


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def rows_of(folder, records, length=LENGTH, **settings):
    """An example of some texts, as the job makes it."""
    path = write(folder / "rows.jsonl", records)
    source = LabelledTokens(path=path, sets=SETS)
    store = build_stores(source, ByteTokenizer(), folder / "store")["all"]
    rows, number = Groups(store, length, 1, keeps_begin=True), np.arange(len(records))
    tokens, segments = rows.read(number, 0 * number)
    further = {"spans": rows.spans(number, 0 * number), "labels": rows.labels(number, 0 * number)}
    seeds = np.zeros(len(number), np.uint64)
    return replace(BOTH, **settings).prepare(tokens, segments, seeds, **further)


TWO = [labelled(["ab", "12", "%"]), labelled(["7", "xf"])]


@pytest.mark.parametrize("at", ["first", "last"])
def test_a_word_has_its_class_at_one_token(at, tmp_path):
    """Of the bytes "ab 12 %", where a word has the space before it."""
    kind, entity = rows_of(tmp_path, TWO, at=at).targets
    places = {"first": ([0, 2, 5], [0, 1]), "last": ([1, 4, 6], [0, 3])}[at]
    begin = len(ByteTokenizer().opening)
    for row, (own, kinds, entities) in enumerate(
        zip(places, ([1, 0, None], [0, 2]), ([2, 0, 1], [0, 2]), strict=True)
    ):
        expected = np.full((2, LENGTH), -1)
        for place, one, other in zip(own, kinds, entities, strict=True):
            expected[:, begin + place] = (-1 if one is None else one), other
        for targets, classes in zip((kind, entity), expected, strict=True):
            found = np.where(targets.weights[row] > 0, targets.labels[row], -1)
            np.testing.assert_array_equal(found, classes)


def test_what_closes_a_cut_text_has_no_class(tmp_path):
    begin = len(ByteTokenizer().opening)
    kind, _ = rows_of(tmp_path, [labelled(list("abcdef"))], begin + 4).targets
    assert kind.weights[0, begin:].tolist() == [1, 1, 0, 0]


@given(st.lists(st.none() | st.integers(0, CLASSES - 1), min_size=1, max_size=4))
def test_classes_of_several_sets_are_one_number(classes):
    code = class_code(classes)
    if code is None:
        assert not any(one is not None for one in classes)
        return
    kinds = np.array([code], np.int64)
    found = [classes_of(kinds, number)[0] for number in range(len(classes))]
    assert code < 0 and found == [-1 if one is None else one for one in classes]


def test_the_loss_is_the_weighted_sum_of_those_of_the_sets(tmp_path, one_device):
    """Each objective alone, on the same words; to float32's rounding."""
    heads = tuple(
        TokenHeadConfig(name=name, outputs=3, labels=names)
        for name, names in zip(SETS, NAMES, strict=True)
    )
    model, layout = replace(MODEL, heads=heads), training_layout()
    graph, params = initialize(model, layout, jax.random.key(0))
    example = to_devices(rows_of(tmp_path, TWO, at="last"), layout, 257)

    @jax.jit
    def sums(params, example):
        model = nnx.merge(graph, params)
        hidden, _ = model(example.inputs)
        parts = [Example(example.inputs, targets) for targets in example.targets]
        pairs = zip(BOTH.objectives, parts, strict=True)
        alone = [one.loss_of_hidden(model, hidden, part, None) for one, part in pairs]
        return BOTH.loss(model, example, None), alone

    both, (kind, entity) = sums(params, example)
    assert float(both.loss) == pytest.approx(float(kind.loss + 0.5 * entity.loss), rel=1e-6)
    assert (float(both.weight), float(kind.weight), float(entity.weight)) == (5, 4, 5)
    assert both.extra.keys() == {"cross_entropy"} and both.extra["cross_entropy"] == both.loss


def job_of(folder, source, **settings):
    data = Data(
        train=(Domain(name="words", source=source),),
        tokenizer=Bytes(),
        held_out=0.2,
        length=LENGTH,
        batch_size=16,
        rows="groups",
        cache=str(folder / "cache"),
    )
    defaults = {
        "output": str(folder / "run"),
        "steps": 40,
        "model": MODEL,
        "objective": BOTH,
        "data": data,
        "schedule": Constant(peak=1e-2, warmup=0),
        "evaluation": ChatEvaluation(every=40),
        "checkpoint": Checkpoints(every=40),
    }
    return ClassifyTokens(**(defaults | settings))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A file of texts, whose classes the last letters of the words tell."""
    draw, records = np.random.default_rng(0), []
    for _ in range(200):
        words = []
        for _ in range(draw.integers(2, 5)):
            letters = "".join(draw.choice(list("abcdefgh"), 2))
            words += [[letters], [str(draw.integers(100))], ["5", "%"]][draw.integers(3)]
        records.append(labelled(words[:7]))
    return write(tmp_path_factory.mktemp("texts") / "words.jsonl", records)


def test_two_sets_are_learnt_at_once(texts, tmp_path):
    job = job_of(tmp_path, LabelledTokens(path=texts, sets=SETS))
    job.run()
    [line] = [m for m in read_metrics(job.output) if m["split"] == "held_out/words"]
    assert line["accuracy_kind"] > 0.9 and line["macro_f1_kind"] > 0.9
    assert line["entity_f1_entity"] > 0.9 and "entity_f1_kind" not in line
    folder = RunFolder(job.output)
    assert [head.labels for head in folder.experiment().model.heads] == list(NAMES)
    tables = {table["title"]: table["rows"] for table in folder.results()["tables"]}
    assert tables["Classes of words"][0][0].startswith("words, kind, ")
    assert tables["Entities"][0][3] == line["entity_f1_entity"]
    assert "Confusion, words, entity" in tables


def test_columns_are_read_as_lines_are(tmp_path):
    records = [labelled(["ab", "12"]), labelled(["7", "xf", "%"])]
    rows = ["-DOCSTART- x x", ""]
    for record in records:
        columns = zip(*record.values(), strict=True)
        rows += [" ".join("_" if cell is None else cell for cell in row) for row in columns] + [""]
    (tmp_path / "words.txt").write_text("\n".join(rows[:-1]))
    settings = {"sets": SETS, "labels": NAMES}
    lines = LabelledTokens(path=write(tmp_path / "words.jsonl", records), **settings)
    columns = LabelledColumns(path=str(tmp_path / "words.txt"), columns=(1, 2), **settings)
    found = [
        [(d.text, d.encode(ByteTokenizer())) for d in source.documents()]
        for source in (lines, columns)
    ]
    assert found[0] == found[1] and len(found[0]) == 2
    assert replace(lines, labels=()).names() == replace(columns, labels=()).names()


def test_lines_that_are_wrong_are_named(tmp_path):
    for message, record in {
        "should be a list of words": {"tokens": "a b"},
        "'labels' has 1 labels for 2 words": {"tokens": ["a", "b"], "labels": ["X"]},
        "'labels' has no list of labels": {"tokens": ["a", "b"]},
        r"'labels' is 'Z'; the labels are 'X', 'Y'": {"tokens": ["a"], "labels": ["Z"]},
        r"'labels' is 2; there are 2 labels": {"tokens": ["a"], "labels": [2]},
        r"'labels' has \[\]: a class is a name": {"tokens": ["a"], "labels": [[]]},
    }.items():
        source = LabelledTokens(path=write(tmp_path / "a.jsonl", [record]), labels=(("X", "Y"),))
        with pytest.raises(UserError, match=rf"a\.jsonl, line 1: .*{message}"):
            list(source.documents())
    (tmp_path / "a.txt").write_text("a X\nb X\n\nc\n")
    with pytest.raises(UserError, match=r"a\.txt, line 4: there are 1 columns, not 2: 'c'"):
        list(LabelledColumns(path=str(tmp_path / "a.txt"), columns=(1,)).documents())


def test_mistakes(texts, tmp_path):
    source = LabelledTokens(path=texts, sets=SETS)
    with pytest.raises(UserError, match="the words of LabelledTexts have no labels"):
        job_of(tmp_path, LabelledTexts(path=texts))
    with pytest.raises(UserError, match=r"has 2 sets of labels \(kind, entity\); .* for label"):
        job_of(tmp_path, source, objective=TokenLabels())
    with pytest.raises(UserError, match="of different names"):
        replace(BOTH, objectives=(Classification(), Classification()))
    with pytest.raises(UserError, match="a number above 0 for each of 2 sets"):
        replace(BOTH, weights=(1.0,))
    with pytest.raises(UserError, match="give different names of fields"):
        replace(source, sets=("kind", "kind"))
    two = TokenHeadConfig(name="kind", outputs=2), TokenHeadConfig(name="entity", outputs=3)
    with pytest.raises(UserError, match=r"'kind' of model\.heads has 2 outputs"):
        job_of(tmp_path, source, model=replace(MODEL, heads=two)).with_model()
    job = job_of(tmp_path, source, model=replace(MODEL, lora=LoRA())).with_model()
    assert job.objective.at == "last" and [h.name for h in job.model.heads] == list(SETS)
    with pytest.raises(UserError, match="objective=TextLabels: the head 'kind' is not one of text"):
        TextLabels(objective=Classification(head="kind")).check(job.model)
