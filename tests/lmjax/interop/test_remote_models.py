"""Model folders and run folders at URLs are converted, read and gone on from as those on a disk."""

import filecmp
import shutil
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest

from lmjax.config import UserError
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.generation import Sampling, load
from lmjax.interop import huggingface
from lmjax.interop.convert import convert
from lmjax.interop.folder import read_params
from lmjax.models import initialize
from lmjax.parallel import Mesh, training_layout
from lmjax.remote import Objects, copies
from tests import object_store
from tests.lmjax.test_urls import MODEL


@pytest.fixture(params=["memory", "late"])
def bucket(request, tmp_path, monkeypatch):
    """The URL of an empty place in each store, and a mesh of one device."""
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(object_store.FOLDER, str(tmp_path / "objects"))
    (tmp_path / "objects").mkdir()
    with jax.set_mesh(Mesh().build(jax.devices()[:1])):
        yield f"{request.param}://bucket/models"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def model(tmp_path, bucket):
    """A model folder on the disk, with a tokenizer."""
    folder = tmp_path / "model"
    params = initialize(MODEL, training_layout(), jax.random.key(0))[1]
    huggingface.write(folder, MODEL, params)
    ByteTokenizer().save(folder)
    return folder


def list_all(url):
    for _ in range(object_store.LATE + 1):
        names = Objects(url).listed()
    return names


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_from_a_disk_to_a_store_and_back(model, bucket, tmp_path):
    """A model folder as a run folder and again as a model folder: the same tensors."""
    here, run, back = str(model), f"{bucket}/run", f"{bucket}/back"
    wanted = read_params(here, MODEL, training_layout())
    convert(here, run)
    assert "index.json" in list_all(run) and "config.json" in list_all(run)
    assert_same(read_params(run, MODEL, training_layout()), wanted)
    convert(run, back)
    list_all(back)
    assert "index.json" not in list_all(back)
    assert_same(read_params(back, MODEL, training_layout()), wanted)
    convert(back, tmp_path / "again", to_run=False)
    name = "model.safetensors"
    assert filecmp.cmp(model / name, tmp_path / "again" / name, shallow=False)
    texts = [
        load(place).generate(["ab"], Sampling(temperature=0), 4)
        for place in (here, run, back, tmp_path / "again")
    ]
    assert texts[1:] == texts[:1] * 3
    assert not [path for path in copies().rglob("*") if "converted" in str(path) and path.is_file()]


def test_what_is_there_is_not_written_over(model, bucket):
    Objects(f"{bucket}/mine").write("notes.txt", b"mine")
    list_all(f"{bucket}/mine")
    with pytest.raises(UserError, match=rf"{bucket}/mine exists already"):
        convert(model, f"{bucket}/mine")
    assert Objects(f"{bucket}/mine").listed() == ["notes.txt"]


def test_config_json_is_the_last(model, bucket, monkeypatch):
    """A destination that was not written whole is no model."""
    sent, upload = [], Objects.upload

    def failing(self, name, path):
        sent.append(name)
        if name.endswith(".safetensors"):
            raise OSError("the connection was closed")
        upload(self, name, path)

    monkeypatch.setattr(Objects, "upload", failing)
    with pytest.raises(UserError, match=r"cannot write in destination=.*connection was closed"):
        convert(model, f"{bucket}/half", to_run=False)
    assert sent and "config.json" not in sent


def test_a_model_that_was_changed_is_read_again(model, bucket):
    url = f"{bucket}/model"
    objects = Objects(url)
    for path in Path(model).iterdir():
        objects.upload(path.name, path)
    list_all(url)
    first = read_params(url, MODEL, training_layout())
    shutil.rmtree(model)
    huggingface.write(model, MODEL, initialize(MODEL, training_layout(), jax.random.key(1))[1])
    objects.upload("model.safetensors", model / "model.safetensors")
    second = read_params(url, MODEL, training_layout())
    assert_same(second, read_params(model, MODEL, training_layout()))
    with pytest.raises(AssertionError):
        assert_same(first, second)


def test_nothing_at_a_url(bucket):
    with pytest.raises(UserError, match=rf"folder={bucket}/none: there is nothing"):
        load(f"{bucket}/none")
