"""Tasks over TensorFlow Datasets: the features of each public set, prepared here with few items."""

import importlib
import json

import pytest

from lmjax.config import UserError
from lmjax.evaluation.tasks import (
    GSM8K,
    PIQA,
    Arc,
    BoolQ,
    ClozeClasses,
    CoQA,
    HellaSwag,
    Lambada,
    SQuAD,
    WholeTexts,
    WinoGrande,
)

# Features as the builders of TensorFlow Datasets state them.
BUILDER = '''
import json
import numpy as np
import tensorflow_datasets as tfds

ClassLabel, FeaturesDict = tfds.features.ClassLabel, tfds.features.FeaturesDict
Sequence, Text = tfds.features.Sequence, tfds.features.Text

LETTERS = ["A", "B", "C", "D", "E"]


class {name}(tfds.core.GeneratorBasedBuilder):
    """A few questions."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(features=FeaturesDict({features}))

    def _split_generators(self, dl_manager):
        return {{"test": self._generate_examples()}}

    def _generate_examples(self):
        yield from enumerate(json.loads({records!r}))
'''
CHOICES = 'Sequence({"text": Text(), "label": ClassLabel(names=LETTERS)})'
ANSWERS = 'Sequence({"text": Text(), "answer_start": np.int32})'
SAID = 'Sequence({"input_text": Text(), "answer_start": np.int32, "answer_end": np.int32})'
# Task and its settings, features, an example as a builder gives it, and the same from a file.
SETS = {
    "arc": (
        Arc,
        {},
        f'{{"id": Text(), "question": Text(), "choices": {CHOICES}, "answerKey": '
        "ClassLabel(names=LETTERS)}",
        {
            "id": "1",
            "question": "What melts?",
            "choices": [{"text": "stone", "label": "A"}, {"text": "ice", "label": "B"}],
            "answerKey": "B",
        },
        {"choices": {"text": ["stone", "ice"], "label": ["A", "B"]}},
    ),
    "hellaswag": (
        HellaSwag,
        {},
        '{"context": Text(), "endings": Sequence(Text()), "activity_label": Text(), '
        '"label": np.int32}',
        {"context": "A man sits. He", "endings": ["a", "b"], "activity_label": "Roof", "label": 1},
        {"ctx_a": "A man sits.", "ctx_b": "he", "label": "1"},
    ),
    "lambada": (Lambada, {}, '{"passage": Text()}', {"passage": "a cup of tea"}, {}),
    "piqa": (
        PIQA,
        {},
        '{"goal": Text(), "sol1": Text(), "sol2": Text(), "label": ClassLabel(num_classes=2)}',
        {"goal": "Sit", "sol1": "down", "sol2": "up", "label": 1},
        {},
    ),
    "winogrande": (
        WinoGrande,
        {},
        '{"sentence": Text(), "option1": Text(), "option2": Text(), "label": '
        'ClassLabel(names=["1", "2"])}',
        {"sentence": "A _ is red.", "option1": "sea", "option2": "rose", "label": "2"},
        {"answer": "2", "label": None},
    ),
    "boolq": (
        BoolQ,
        {},
        '{"question": Text(), "passage": Text(), "answer": np.bool_}',
        {"question": "is it so", "passage": "It is.", "answer": True},
        {"label": 1},
    ),
    "gsm8k": (
        GSM8K,
        {},
        '{"question": Text(), "answer": Text()}',
        {"question": "1+1?", "answer": "So #### 2"},
        {},
    ),
    "squad": (
        SQuAD,
        {},
        f'{{"title": Text(), "context": Text(), "question": Text(), "answers": {ANSWERS}}}',
        {
            "title": "Tea",
            "context": "Tea is hot.",
            "question": "What is hot?",
            "answers": [{"text": "Tea", "answer_start": 0}, {"text": "tea", "answer_start": 0}],
        },
        None,
    ),
    "coqa": (
        CoQA,
        {},
        f'{{"source": Text(), "story": Text(), "questions": Sequence(Text()), "answers": {SAID}}}',
        {
            "source": "cnn",
            "story": "Mia has a kite.",
            "questions": ["Who?", "What?"],
            "answers": [
                {"input_text": "Mia", "answer_start": 0, "answer_end": 3},
                {"input_text": "a kite", "answer_start": 8, "answer_end": 14},
            ],
        },
        {},
    ),
    "texts": (WholeTexts, {}, '{"text": Text()}', {"text": "Two lines.\nOf text."}, {}),
    "reviews": (
        ClozeClasses,
        {"words": ("bad", "good")},
        '{"text": Text(), "label": ClassLabel(names=["neg", "pos"])}',
        {"text": "A film.", "label": "pos"},
        {"label": "1"},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def prepared(tmp_path_factory):
    """Paths of all sets, which lie where TensorFlow Datasets looks for them."""
    pytest.importorskip("tensorflow_datasets")
    root, paths = tmp_path_factory.mktemp("tfds"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        for name, (_, _, features, example, _) in SETS.items():
            package = root / f"lmjax_tasks_{name}"
            package.mkdir()
            (package / "__init__.py").touch()
            kind = f"Tasks{name.capitalize()}"
            fields = {"name": kind, "features": features, "records": json.dumps([example])}
            (package / f"tasks_{name}.py").write_text(BUILDER.format(**fields))
            made = getattr(importlib.import_module(f"{package.name}.tasks_{name}"), kind)
            builder = made(data_dir=root / "data", file_format="array_record")
            builder.download_and_prepare()
            paths[name] = f"tfds:{builder.name}/test"
        # It reads TFDS_DATA_DIR once, as it is imported.
        patch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(root / "data"))
        yield paths


@pytest.mark.parametrize("name", SETS)
def test_a_builder_gives_the_questions_of_a_file(prepared, tmp_path, name):
    kind, settings, _, example, other = SETS[name]
    found = kind(path=prepared[name], **settings).questions()
    if other is None:  # SQuAD's own file is no list of questions
        asked = {"qas": [{"id": "1", **example}], "context": example["context"]}
        articles = {"data": [{"title": example["title"], "paragraphs": [asked]}]}
        path = tmp_path / "set.json"
        path.write_text(json.dumps(articles))
    else:
        path = tmp_path / "set.jsonl"
        fields = {key: value for key, value in {**example, **other}.items() if value is not None}
        path.write_text(json.dumps(fields) + "\n")
    wanted = kind(path=str(path), **settings).questions()
    assert [one.context for one in found] == [one.context for one in wanted]
    assert [one.requests for one in found] == [one.requests for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert (one.item.answer, one.item.gold) == (other.item.answer, other.item.gold)
        assert one.item.details == other.item.details


def test_mistakes_in_paths_of_builders_are_told(prepared):
    with pytest.raises(UserError, match="give tfds:NAME/SPLIT, such as tfds:ai2_arc/test"):
        Arc(path="tfds:ai2_arc").questions()
    with pytest.raises(UserError, match="has no split 'train'; it has 'test'"):
        Arc(path=prepared["arc"].replace("/test", "/train")).questions()
    with pytest.raises(UserError, match="knows no data set 'tasks_nothing'"):
        Arc(path="tfds:tasks_nothing/test").questions()
    with pytest.raises(UserError, match="example 0: there is no field question"):
        Arc(path=prepared["lambada"]).questions()
