"""Any TFDS builder is read without TensorFlow: against a small one that is prepared here."""

import importlib
import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from lmjax.config import UserError, replace
from lmjax.data import ChatTemplate, Conversations, TFDSConversations
from lmjax.data import tfds as module
from lmjax.data.tfds import TFDS
from lmjax.data.tokenizers import ByteTokenizer

BUILDER = '''
import numpy as np
import tensorflow_datasets as tfds

class {name}(tfds.core.GeneratorBasedBuilder):
    """Numbered sentences."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {{"text": tfds.features.Text(), "number": np.int64}}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {{"train": self._generate_examples(25), "test": self._generate_examples(3)}}

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {{"text": f"S\\u00e4tze {{number}}", "number": number}}
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where "sentences" is prepared; "unprepared" is only known by name."""
    root = tmp_path_factory.mktemp("tfds")
    for name in ("sentences", "unprepared"):
        package = root / f"lmjax_test_{name}"
        package.mkdir()
        (package / "__init__.py").touch()
        text = BUILDER.format(name=name.capitalize())
        (package / f"{name}.py").write_text(text)
    sys.path.insert(0, str(root))
    try:
        builders = [
            getattr(importlib.import_module(f"lmjax_test_{name}.{name}"), name.capitalize())
            for name in ("sentences", "unprepared")
        ]
    finally:
        sys.path.remove(str(root))
    builder = builders[0](data_dir=root / "data", file_format="array_record")
    builder.download_and_prepare()
    return str(root / "data")


def test_documents_of_a_builder(folder, monkeypatch):
    source = TFDS(name="sentences", data_dir=folder)
    expected = {f"S\u00e4tze {number}" for number in range(25)}
    texts = [document.text for document in source.documents()]
    assert len(texts) == 25 and set(texts) == expected
    monkeypatch.setattr(module, "EXAMPLES", 10)
    assert len(source.parts()) == 3
    assert [document.text for document in source.documents()] == texts
    part = TFDS(name="sentences", data_dir=folder, split="train[:5]")
    assert [document.text for document in part.documents()] == texts[:5]
    test = TFDS(name="sentences", data_dir=folder, split="test")
    assert len({source.fingerprint(), part.fingerprint(), test.fingerprint()}) == 3


def test_a_data_set_is_known_by_what_its_files_hold(folder, tmp_path):
    """Copied elsewhere it is the same; prepared anew with other words of the same length it is not.

    Name, version, and the numbers of examples and bytes that it states stay.
    """
    splits = "train", "train[:5]", "test"
    before = [TFDS(name="sentences", data_dir=folder, split=s).fingerprint() for s in splits]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    again = [TFDS(name="sentences", data_dir=str(copy), split=s).fingerprint() for s in splits]
    assert again == before
    from tensorflow_datasets.core import registered

    package = tmp_path / "lmjax_test_changed"
    package.mkdir()
    (package / "__init__.py").touch()
    text = BUILDER.format(name="Sentences").replace("S\\u00e4tze", "S\\u00f6tze")
    (package / "sentences.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with registered.skip_registration():  # the name is taken, and stays the first one's
            builder = importlib.import_module("lmjax_test_changed.sentences").Sentences
    builder(data_dir=tmp_path / "other", file_format="array_record").download_and_prepare()
    other = TFDS(name="sentences", data_dir=str(tmp_path / "other"))
    assert next(iter(other.documents())).text.startswith("S\u00f6tze")
    infos = [p / "sentences" / "1.0.0" / "dataset_info.json" for p in (copy, tmp_path / "other")]
    sizes = [json.loads(path.read_text())["splits"] for path in infos]
    assert sizes[0] == sizes[1]
    for split, fingerprint in zip(splits, before, strict=True):
        assert replace(other, split=split).fingerprint() != fingerprint
    (missing,) = copy.rglob("*train*00000*")
    missing.unlink()
    with pytest.raises(UserError, match="cannot read the text: No such file"):
        TFDS(name="sentences", data_dir=str(copy)).fingerprint()


FEATURES = '''
import numpy as np
import tensorflow_datasets as tfds

class Pages(tfds.core.GeneratorBasedBuilder):
    """Texts in every shape, and what is none."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        f = tfds.features
        return self.dataset_info_from_configs(features=f.FeaturesDict({
            "passages": f.Sequence(f.Text()), "pair": f.Tensor(shape=(2,), dtype=np.str_),
            "nested": {"inner": f.Text(), "number": np.float32},
            "turns": f.Sequence({"text": f.Text(), "speaker": np.int64}),
            "translation": f.Translation(languages=["de", "en"]), "missing": f.Text(optional=True),
            "scalar": f.Scalar(np.str_), "label": f.ClassLabel(names=["good", "bad"]),
            "number": np.int64, "numbers": f.Sequence(np.int64), "yes": np.bool_,
            "image": f.Tensor(shape=(2, 2), dtype=np.uint8),
            "inside": f.Dataset({"text": f.Text()}),
        }))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for n in range(9):
            yield n, {
                "passages": ["first \\u00e9", "", "second"][:n], "pair": ["a", "b"],
                "nested": {"inner": "in", "number": n},
                "turns": [{"text": "Hello?", "speaker": 1}, {"text": "Yes.", "speaker": 2}],
                "translation": {"de": "ja", "en": "yes"}, "missing": "here" if n == 1 else None,
                "scalar": "\\u00e9", "label": n % 2, "number": n, "numbers": [n], "yes": True,
                "image": np.zeros((2, 2), np.uint8), "inside": [{"text": "x"}, {"text": "y"}][:n],
            }
'''


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    """The builder of "pages"."""
    root = tmp_path_factory.mktemp("features")
    package = root / "lmjax_test_pages"  # where TFDS looks for a builder's files
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "pages.py").write_text(FEATURES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        return importlib.import_module("lmjax_test_pages.pages").Pages


@pytest.fixture(scope="module", params=["array_record", "parquet"])
def pages(request, builder, tmp_path_factory):
    """Where "pages" is prepared, in a folder of the format's name."""
    folder = tmp_path_factory.mktemp("pages") / request.param
    builder(data_dir=folder, file_format=request.param).download_and_prepare()
    return str(folder)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("passages", ["first \u00e9", "first \u00e9\n\nsecond"]),
        ("pair", ["a\n\nb"]),
        ("nested/inner", ["in"]),
        ("turns/text", ["Hello?\n\nYes."]),
        ("inside/text", ["x", "x\n\ny"]),
        ("translation/de", ["ja"]),
        ("missing", ["here"]),
        ("scalar", ["\u00e9"]),
    ],
)
def test_texts_and_lists_of_texts(pages, field, expected):
    source = TFDS(name="pages", data_dir=pages, field=field)
    assert sorted({document.text for document in source.documents()}) == expected


@pytest.mark.parametrize(
    ("field", "kind"),
    [
        ("label", "ClassLabel of int64"),
        ("number", "Scalar of int64|Tensor of int64"),
        ("numbers", "Sequence of int64"),
        ("nested/number", "float32"),
        ("turns/speaker", "of int64"),
        ("yes", "of bool"),
        ("image", "Tensor of uint8"),
    ],
)
def test_what_is_no_text_is_refused_by_name(pages, field, kind):
    with pytest.raises(
        UserError, match=rf"feature '{field}' of .* texts, but .*({kind})"
    ) as refused:
        TFDS(name="pages", data_dir=pages, field=field).parts()
    assert "'passages'" in str(refused.value) and "'nested/inner'" in str(refused.value)


@pytest.mark.parametrize("field", ["nested", "turns", "nested/other", "passages/0", "text", ""])
def test_features_that_are_not_there(pages, field):
    with pytest.raises(UserError, match=rf"no feature '{field}'; it has ") as refused:
        TFDS(name="pages", data_dir=pages, field=field).parts()
    if field == "turns":
        assert "it has 'turns/text', 'turns/speaker'" in str(refused.value)


@pytest.mark.parametrize("split", ["train[:50%]", "train[50%:]", "train[:1]", "train[3:]"])
def test_slices_are_what_they_state_or_refused(pages, split):
    """Of parquet files every slice is the whole split: held-out and training text the same."""
    source = TFDS(name="pages", data_dir=pages, split=split, field="scalar")
    if "parquet" in str(list(pathlib.Path(pages).rglob("*00000*"))):
        with pytest.raises(
            UserError, match=r"has \d examples, but 9 are read .*parquet(.|\n)*array_"
        ):
            source.parts()
    else:
        counts = {"train[:50%]": 4, "train[50%:]": 5, "train[:1]": 1, "train[3:]": 6}
        assert len(list(source.documents())) == counts[split]
    assert len(list(replace(source, split="train").documents())) == 9


def test_rows_that_are_lost_are_noticed(pages, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pages, copy)
    (path,) = copy.rglob("dataset_info.json")
    path.write_text(path.read_text().replace('"9"', '"10"'))  # the length of the only shard
    with pytest.raises(
        UserError, match=r"has 10 examples, but 9 are read|example 9 cannot be read"
    ):
        list(TFDS(name="pages", data_dir=str(copy), field="scalar").documents())


@pytest.mark.parametrize(
    ("split", "count"),
    [("train+test", 28), ("all", 28), ("train[:5]+test[1:]", 7), ("train[-3:]", 3)],
)
def test_several_splits_and_slices(folder, split, count):
    source = TFDS(name="sentences", data_dir=folder, split=split)
    assert len(list(source.documents())) == count


@pytest.mark.parametrize(
    "split", ["train[:abc]", "train[:", "train[:200%]", "train+nothing", "", " train", "train[10%]"]
)
def test_splits_that_make_no_sense_are_refused(folder, split):
    source = TFDS(name="sentences", data_dir=folder, split=split)
    for call in (source.parts, source.fingerprint):
        with pytest.raises(UserError, match=r"no split .*; it has .*'test'.* slices such as"):
            call()


@pytest.mark.parametrize("split", ["train[0:0]", "train[5:3]", "train[:1%]"])
def test_splits_without_an_example_are_refused(folder, split):
    source = TFDS(name="sentences", data_dir=folder, split=split)
    for call in (source.parts, source.fingerprint):
        with pytest.raises(UserError, match="has no example"):
            call()


def test_what_is_not_there_is_said(folder):
    with pytest.raises(UserError, match=r"no split 'validation'; it has 'train', 'test'|'test', "):
        TFDS(name="sentences", data_dir=folder, split="validation").parts()
    with pytest.raises(UserError, match=r"no feature 'body'; it has .*'text'"):
        TFDS(name="sentences", data_dir=folder, field="body").parts()
    with pytest.raises(UserError, match=r"data_dir=gs://tfds-data: this is a URL"):
        TFDS(name="sentences", data_dir="gs://tfds-data")
    with pytest.raises(UserError, match="knows no data set 'nothing_of_the_kind'"):
        TFDS(name="nothing_of_the_kind", data_dir=folder).parts()
    with pytest.raises(UserError) as raised:
        TFDS(name="unprepared", data_dir=folder).parts()
    message = str(raised.value)
    assert "set download=true" in message and f"data_dir={folder!r}" in message
    assert "download_and_prepare()" in message


def test_prepares_when_told_to(folder):
    source = TFDS(name="unprepared", data_dir=folder, split="test", download=True)
    assert len(list(source.documents())) == 3
    assert len(list(TFDS(name="unprepared", data_dir=folder, split="test").documents())) == 3


def test_missing_package_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match="pip install tensorflow-datasets"):
        TFDS(name="sentences").parts()


def test_neither_package_is_imported_with_ours():
    """They take half a second and more, and `--help` should not."""
    heavy = "{'tensorflow_datasets', 'tensorflow', 'grain', 'sentencepiece', 'jax'}"
    code = f"import sys, lmjax.data; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=_root(), timeout=120
    )
    assert done.stdout == "[]\n", done.stderr


def _root():
    import lmjax

    return pathlib.Path(lmjax.__file__).parents[1]


TALKS = '''
import numpy as np
import tensorflow_datasets as tfds

class Talks(tfds.core.GeneratorBasedBuilder):
    """Conversations, in messages; and what has no layout."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        f = tfds.features
        return self.dataset_info_from_configs(features=f.FeaturesDict({
            "messages": f.Sequence({"role": f.Text(), "content": f.Text()}),
            "source": f.Text(), "reward": np.float64,
        }))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "empty": self._generate_examples(1, False)}

    def _generate_examples(self, count, filled=True):
        for n in range(count):
            turns = [("user", f"\\u00e9 {n}?"), ("assistant", "1"), ("user", "so?")]
            turns = [*turns, ("assistant", "2")][: 2 + n % 2 * 2] if filled else []
            messages = [{"role": role, "content": content} for role, content in turns]
            yield n, {"messages": messages, "source": f"s{n}", "reward": n / 4}
'''


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    root = tmp_path_factory.mktemp("talks")
    package = root / "lmjax_test_talks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "talks.py").write_text(TALKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        builder = importlib.import_module("lmjax_test_talks.talks").Talks
    builder(data_dir=root / "data", file_format="array_record").download_and_prepare()
    return str(root / "data")


def test_conversations_of_a_builder_are_those_of_lines(talks, tmp_path):
    """The same documents, tokens and spans as of JSON lines with the same fields."""
    metadata = "source", "reward"
    source = TFDSConversations(name="talks", data_dir=talks, metadata=metadata)
    assert source.layout() == "a list of messages"
    found = sorted(source.documents(), key=lambda document: document.metadata["source"])
    path = tmp_path / "talks.jsonl"
    with open(path, "w") as file:
        for n in range(6):
            turns = [
                ("user", f"\u00e9 {n}?"),
                ("assistant", "1"),
                ("user", "so?"),
                ("assistant", "2"),
            ]
            messages = [{"role": r, "content": c} for r, c in turns[: 2 + n % 2 * 2]]
            record = {"messages": messages, "source": f"s{n}", "reward": n / 4}
            print(json.dumps(record), file=file)
    expected = list(Conversations(path=str(path), metadata=metadata).documents())
    tokenizer = ByteTokenizer()
    for one, other in zip(found, expected, strict=True):
        assert (one.text, one.group, one.metadata) == (other.text, other.group, other.metadata)
        assert one.encode(tokenizer) == other.encode(tokenizer)


def test_conversations_that_are_none_are_named(talks, folder):
    empty = TFDSConversations(name="talks", data_dir=talks, split="empty")
    with pytest.raises(UserError, match="talks empty example 0: the conversation is empty"):
        list(empty.documents())
    plain = TFDSConversations(name="sentences", data_dir=folder)
    assert plain.layout() == "plain text"


def test_conversations_are_known_by_their_format_too(talks, tmp_path):
    source = TFDSConversations(name="talks", data_dir=talks)
    shutil.copytree(talks, tmp_path / "copy")
    assert replace(source, data_dir=str(tmp_path / "copy")).fingerprint() == source.fingerprint()
    other = replace(source, template=ChatTemplate(user=("<{content}>",), assistant=("{content}",)))
    assert other.fingerprint() != source.fingerprint()
