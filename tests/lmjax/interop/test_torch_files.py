"""PyTorch's .bin files: the same tensors where torch is installed, and never any code."""

import builtins
import json
import os
import pickle
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from lmjax.config import UserError
from lmjax.interop import huggingface
from lmjax.interop.convert import convert
from lmjax.parallel import training_layout
from tests.parity_cases import parity_folder

NEEDS = "torch is not installed: pip install 'lmjax[torch]'"


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def gpt2(tmp_path):
    """A folder without its safetensors file, and the tensors that were in it."""
    folder = shutil.copytree(parity_folder("gpt2"), tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    for path in folder.glob("model*.safetensors"):
        path.unlink()
    return folder, tensors


def read(folder):
    """The parameters."""
    return huggingface.read(folder, training_layout())[2]


def assert_same(folder):
    """The parameters are those of the case."""
    jax.tree.map(np.testing.assert_array_equal, read(folder), read(parity_folder("gpt2")))


def test_without_torch_the_extra_is_named(one_device, gpt2, monkeypatch):
    """And nothing is unpickled."""
    folder, _ = gpt2
    made = folder / "made"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(made)))
    import_module = builtins.__import__

    def without_torch(name, *arguments, **others):
        if name == "torch":
            raise ImportError(name)
        return import_module(name, *arguments, **others)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(UserError, match=r"pip install 'lmjax\[torch\]'"):
        read(folder)
    assert not made.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_the_same_tensors(one_device, gpt2, tmp_path, zipped):
    """Files of today, and of before PyTorch 1.6; and what they become as safetensors."""
    torch = pytest.importorskip("torch", reason=NEEDS)
    folder, tensors = gpt2
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_same(folder)
    convert(folder, tmp_path / "safe", to_run=False)
    written = load_file(tmp_path / "safe" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    assert not list((tmp_path / "safe").glob("*.bin"))


def test_several_files_of_half_precision(one_device, gpt2):
    torch = pytest.importorskip("torch", reason=NEEDS)
    folder, tensors = gpt2
    names = sorted(tensors)
    files = {name: f"pytorch_model-0000{1 + (name > names[9])}-of-00002.bin" for name in names}
    for file in set(files.values()):
        part = {n: torch.from_numpy(tensors[n]).bfloat16() for n in names if files[n] == file}
        torch.save(part, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    table = np.asarray(read(folder)["embedding"]["table"])[:97]
    rounded = tensors["transformer.wte.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(table, rounded)
    index.write_text(json.dumps({"weight_map": files | {names[0]: "pytorch_model-3.bin"}}))
    with pytest.raises(UserError, match=r"names the file pytorch_model-3\.bin, which is not there"):
        read(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(one_device, gpt2, zipped):
    torch = pytest.importorskip("torch", reason=NEEDS)
    folder, tensors = gpt2
    made = folder / "made"
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    path = folder / "pytorch_model.bin"
    torch.save(state | {"x": Hostile(made)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"\.bin is damaged, or holds more than tensors") as error:
        read(folder)
    assert "posix.mkdir" in str(error.value) and "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)  # PyTorch's advice is to run the file
    assert not made.exists()
    # The file is what it is said to be: a careless loader runs it.
    torch.load(path, weights_only=False)
    assert made.exists()


def test_what_is_no_table_of_tensors_is_refused(one_device, gpt2):
    torch = pytest.importorskip("torch", reason=NEEDS)
    folder, tensors = gpt2
    path = folder / "pytorch_model.bin"
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds no tensors by name, but a list"):
        read(folder)
    torch.save({"step": 3}, path)
    with pytest.raises(UserError, match=r"step is not a tensor \(int\)"):
        read(folder)
    name = next(iter(tensors))
    torch.save({3: torch.zeros(1)}, path)
    with pytest.raises(UserError, match="a tensor is called 3, which is no name"):
        read(folder)
    for odd, what in (("meta", "strided, meta"), ("sparse", "sparse_coo, cpu")):
        tensor = torch.from_numpy(tensors[name])
        tensor = tensor.to("meta") if odd == "meta" else tensor.to_sparse()
        torch.save({name: tensor}, path)
        with pytest.raises(UserError, match=rf"{name} is no plain tensor .*{what}"):
            read(folder)
    torch.save({n: torch.from_numpy(t).to(torch.int8) for n, t in tensors.items()}, path)
    with pytest.raises(UserError, match="holds int8, not one of F64, F32, F16, BF16"):
        read(folder)
    torch.save({name: torch.from_numpy(tensors[name])}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="is damaged"):
        read(folder)
    plain = pickle.dumps({"step": 3}, protocol=4)
    for content, reason in ((b"", "EOFError"), (b"hello", "KeyError"), (plain, "Unsupported")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"refuses it \({reason}"):
            read(folder)
