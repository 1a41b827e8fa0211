"""Any TFDS builder is read without TensorFlow: against a small one that is prepared here."""

import importlib
import subprocess
import sys

import pytest

from lmjax.config import UserError
from lmjax.data import tfds as module
from lmjax.data.tfds import TFDS

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
    numbers = TFDS(name="sentences", data_dir=folder, split="test", field="number")
    assert {document.text for document in numbers.documents()} == {"0", "1", "2"}
    assert len({source.fingerprint(), part.fingerprint(), numbers.fingerprint()}) == 3


def test_what_is_not_there_is_said(folder):
    with pytest.raises(UserError, match=r"no split 'validation'; it has 'train', 'test'|'test', "):
        TFDS(name="sentences", data_dir=folder, split="validation").parts()
    with pytest.raises(UserError, match=r"no feature 'body'; it has .*'text'"):
        TFDS(name="sentences", data_dir=folder, field="body").parts()
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
    import pathlib

    import lmjax

    return pathlib.Path(lmjax.__file__).parents[1]
