"""The command: runs to model folders and back, from folder to folder, and what goes wrong."""

import errno
import json
import os
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load, load_file, save_file

from lmjax import launch
from lmjax.config import UserError, config, replace, to_json
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.interop import huggingface
from lmjax.interop.__main__ import Convert
from lmjax.interop.convert import convert
from lmjax.interop.folder import load_trained_model
from lmjax.interop.new_folder import new_folder
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, initialize
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.checkpoints import Checkpointer
from tests.parity_cases import parity_folder, with_older_names

MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=2,
    max_length=40,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(size=32),
)
TEXT = "The things of the list:\n\n    def f(x):\treturn  x+10  # ünï 漢字 🙂\n end  "


@config
class ConvertedRun:
    """What interop needs to know of an experiment."""

    model: TransformerConfig = MODEL  # what was trained
    average: float | None = None  # decay of an average of the parameters


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a checkpoint of random parameters."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        _, params = initialize(MODEL, training_layout(), jax.random.key(3))
        ByteTokenizer().save(folder / "tokenizer")
        (folder / "config.json").write_text(to_json(ConvertedRun()))
        with Checkpointer(folder / "checkpoints") as checkpointer:
            checkpointer.save(7, {"params": params}, {"tokenizer": ByteTokenizer().fingerprint})
    return folder


def assert_same_model(found, expected):
    """Equal configs and parameters of two run folders, but for rows that pad the vocabulary."""
    found, expected = (
        load_trained_model(folder, training_layout()) for folder in (found, expected)
    )
    assert huggingface.architecture_of(found.config) == huggingface.architecture_of(expected.config)
    for trained in (found, expected):
        table = trained.params["embedding"]
        table["table"] = np.asarray(table["table"])[: trained.config.vocab_size]
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def read_all(folder):
    """The tensors of all safetensors files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_a_run_goes_out_and_comes_back(one_device, run, tmp_path, capsys):
    """The same parameters, and a tokenizer that gives the same tokens."""
    out, back = tmp_path / "new" / "out", tmp_path / "back"
    convert(run, out, largest_file=8000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for name, file in index["weight_map"].items():
        assert name in load_file(out / file)
    tensors = read_all(out)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    # A tensor larger than the limit has a file alone.
    for file in files:
        held = load_file(file).values()
        assert sum(tensor.nbytes for tensor in held) <= 8000 or len(held) == 1
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 256
    convert(out, back)
    assert_same_model(back, run)
    tokenizer = load_trained_model(back, training_layout()).tokenizer
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert (tokenizer.begin, tokenizer.end, tokenizer.decode(tokenizer.encode(TEXT))) == (
        *(256, 256),
        TEXT,
    )
    # And once more: a run folder that was made here is a source like any other.
    convert(back, tmp_path / "again", largest_file=8000)
    for name, tensor in read_all(tmp_path / "again").items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)
    assert "writing" in capsys.readouterr().out


def test_a_mesh_changes_nothing(run, tmp_path):
    with jax.set_mesh(Mesh(fsdp=4, tensor=2).build()):
        convert(run, tmp_path / "cut")
        convert(tmp_path / "cut", tmp_path / "back")
        assert_same_model(tmp_path / "back", run)


def test_half_precision_is_rounded_once(one_device, run, tmp_path):
    """Straight from the run, and from the float32 folder: the nearest bfloat16, ties to even."""
    convert(run, tmp_path / "full")
    convert(run, tmp_path / "half", dtype="bfloat16")
    convert(tmp_path / "full", tmp_path / "other", to_run=False, dtype="bfloat16")
    full = read_all(tmp_path / "full")
    for folder in ("half", "other"):
        settings = json.loads((tmp_path / folder / "config.json").read_text())
        assert settings["torch_dtype"] == "bfloat16"
        for name, tensor in read_all(tmp_path / folder).items():
            assert tensor.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(tensor, full[name].astype(ml_dtypes.bfloat16), name)


def test_from_folder_to_folder_all_else_is_carried(one_device, tmp_path):
    """Names, numbers and precision stay; buffers go; the tokenizer and the rest are copied."""
    source = shutil.copytree(parity_folder("llama"), tmp_path / "llama")
    with_older_names(source)
    ByteTokenizer().save(source)
    convert(source, tmp_path / "copy", to_run=False, largest_file=40_000)
    original = read_all(parity_folder("llama"))
    original = {name: t for name, t in original.items() if not name.endswith("inv_freq")}
    copied = read_all(tmp_path / "copy")
    assert copied.keys() <= original.keys()
    assert original.keys() - copied.keys() == set()
    for name, tensor in copied.items():
        np.testing.assert_array_equal(tensor, original[name], err_msg=name)
    assert (tmp_path / "copy" / "config.json").read_text() == (
        json.dumps(json.loads((source / "config.json").read_text()), indent=2) + "\n"
    )
    assert read_tokenizer(tmp_path / "copy").vocab_size == 257


def test_a_model_without_a_tokenizer_is_converted_and_it_is_said(one_device, tmp_path, capsys):
    convert(parity_folder("llama2_gqa"), tmp_path / "run")
    assert "no tokenizer was carried over, and text needs one" in capsys.readouterr().out
    assert load_trained_model(tmp_path / "run", training_layout()).tokenizer is None
    convert(tmp_path / "run", tmp_path / "again")
    original = read_all(parity_folder("llama2_gqa"))
    for name, tensor in read_all(tmp_path / "again").items():
        np.testing.assert_array_equal(tensor, original[name], err_msg=name)


def test_numbers_do_not_change_with_the_file(one_device, tmp_path):
    """What was read shares no memory with the file, which may be written over."""
    folder = shutil.copytree(parity_folder("gpt2"), tmp_path / "gpt2")
    _, _, params = huggingface.read(folder, training_layout())
    before = jax.tree.map(lambda leaf: np.array(leaf), params)
    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\x7f" * size)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_nothing_half_written_counts_as_a_model(one_device, run, tmp_path, monkeypatch):
    """An interruption leaves nothing; what a kill left is removed by the next conversion."""

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lmjax.console.ByteBar.__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    killed = new_folder(tmp_path / "out")
    (killed.__enter__() / "model.safetensors").write_bytes(b"half")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    convert(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(read_all(tmp_path / "out")) == 28


def run_command(monkeypatch, *arguments):
    """Calls `python -m lmjax.interop` in this process, on one device."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    launch.run(Convert(), list(map(str, arguments)), positional=("source", "destination"))


def test_the_command_converts(run, tmp_path, monkeypatch, capsys):
    run_command(monkeypatch, run, tmp_path / "out", "dtype=bfloat16", "file_size=0.00001")
    assert f"written: {tmp_path / 'out'}" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    run_command(monkeypatch, tmp_path / "out", tmp_path / "run", "to=run")
    assert (tmp_path / "run" / "checkpoints" / "0").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Which folders?"),
        (["{run}"], "Which folders?"),
        (["{run}", "{run}"], "exists already and is not an empty folder"),
        (["{run}", "{run}/config.json"], "exists already and is not an empty folder"),
        (["{run}", "{run}/config.json/x"], "cannot write in"),
        (["{run}", "{tmp}/" + 300 * "x"], "File name too long"),
        (["{tmp}/nowhere", "{tmp}/x"], "nowhere is not a run folder: there is no such folder"),
        (["{run}", "{tmp}/x", "step=8"], "holds no checkpoint of step 8, but 7"),
        (["{run}", "{tmp}/x", "file_size=0"], "file_size=0: must be more than 0 GB"),
        (["{run}", "{tmp}/x", "to=run", "dtype=bfloat16"], "in a run folder are float32"),
        (["{run}", "{tmp}/x", "dtype=int8"], "dtype"),
        (["{gpt2}", "{tmp}/x", "step=8"], "is a model and has no checkpoints"),
    ],
)
def test_mistakes_end_with_a_message_and_code_2(
    run, tmp_path, monkeypatch, capsys, arguments, message
):
    places = {"{run}": str(run), "{tmp}": str(tmp_path), "{gpt2}": str(parity_folder("gpt2"))}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    with pytest.raises(SystemExit) as exit:
        run_command(monkeypatch, *arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_folder_leads_to_the_result(one_device, tmp_path):
    """Whether the folder is there and empty, or is yet to be made."""
    for name in ("empty", "missing"):
        (tmp_path / name).symlink_to(tmp_path / f"{name}_place")
    (tmp_path / "empty_place").mkdir()
    for name in ("empty", "missing"):
        convert(parity_folder("gpt2"), tmp_path / name, to_run=False)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / f"{name}_place" / "model.safetensors").is_file()


def test_a_full_disk_is_told_and_leaves_nothing(one_device, tmp_path, monkeypatch):
    def write_tensors(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface, "write_tensors", write_tensors)
    with pytest.raises(UserError, match=r"out was not written: .*No space left on device"):
        convert(parity_folder("gpt2"), tmp_path / "out", to_run=False)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_transformers_cannot_express_leaves_nothing(one_device, tmp_path):
    model = replace(MODEL, attention=replace(MODEL.attention, windows=(None, 4)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(ConvertedRun(model=model)))
    _, params = initialize(model, training_layout(), jax.random.key(0))
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        checkpointer.save(1, {"params": params}, {})
    with pytest.raises(UserError, match="transformers has no model like this one"):
        convert(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ---- files that do not fit each other ----------------------------------------------------------


@pytest.fixture
def cut(one_device, tmp_path):
    """A model folder of several files, to be damaged."""
    convert(parity_folder("gpt2"), tmp_path / "gpt2", to_run=False, largest_file=40_000)
    return tmp_path / "gpt2"


def refusal(folder):
    """What reading it says."""
    with pytest.raises(UserError) as error:
        huggingface.read(folder, training_layout())
    return str(error.value)


def test_an_index_and_its_files_have_to_agree(cut):
    index = cut / "model.safetensors.index.json"
    text = index.read_text()
    places = json.loads(text)["weight_map"]
    name, file = next(iter(places.items()))
    content = (cut / file).read_bytes()
    (cut / file).unlink()
    assert f"names the file {file}, which is not there" in refusal(cut)
    (cut / file).write_bytes(content[:-10])
    assert f"{file} is damaged or cut off" in refusal(cut)
    tensors = load(content)
    save_file({n: t for n, t in tensors.items() if n != name} | {"x": tensors[name]}, cut / file)
    assert f"{file} has no tensor {name}, but model.safetensors.index.json says" in refusal(cut)
    (cut / file).write_bytes(content)
    other = next(f for f in places.values() if f != file)
    save_file(load_file(cut / other) | {name: tensors[name] + 1}, cut / other)
    assert f"{name} is also in" in refusal(cut)
    for wrong in ("../elsewhere.safetensors", "config.json", "", ".."):
        index.write_text(text.replace(f'"{file}"', f'"{wrong}"'))
        assert f"names '{wrong}', which is no .safetensors file of the folder" in refusal(cut)
    for wrong in ("3", "null", '["x"]'):
        index.write_text(text.replace(f'"{file}"', wrong))
        assert "which is no .safetensors file of the folder" in refusal(cut)
    index.write_text("[]")
    assert "it has no weight_map" in refusal(cut)


def test_an_index_that_may_not_be_read_is_named(cut, monkeypatch):
    read_text = Path.read_text

    def refuse(path, *arguments):
        if path.name == "model.safetensors.index.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read_text(path, *arguments)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert "index.json cannot be read: Permission denied" in refusal(cut)


def test_writing_anew_leaves_no_file_of_before(one_device, cut):
    """transformers would take an old model.safetensors before an index."""
    config, _, params = huggingface.read(cut, training_layout())
    huggingface.write(cut, config, params)
    names = sorted(path.name for path in cut.glob("model*"))
    assert names == ["model.safetensors"]
    huggingface.write(cut, config, params, largest_file=40_000)
    assert not (cut / "model.safetensors").exists()
    again = huggingface.read(cut, training_layout())[2]
    jax.tree.map(np.testing.assert_array_equal, again, params)
