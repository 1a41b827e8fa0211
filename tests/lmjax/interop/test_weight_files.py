"""Which of a folder's weight files are read, beside what transformers reads of it."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lmjax.config import UserError
from lmjax.interop import huggingface
from lmjax.parallel import training_layout

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # nothing is downloaded
SETTINGS = {
    "model_type": "llama",
    "vocab_size": 17,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
TABLE, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LAYER = "model.layers.0"
WHOLE, SHARDS = "model.safetensors", ("model-00001-of-00002", "model-00002-of-00002")
OURS = {TABLE: ("embedding", "table"), HEAD: ("head", "table"), NORM: ("final_norm", "scale")}


def tensors(seed, **changes):
    """A LLaMA's, random; None takes one out."""
    draw = np.random.default_rng(seed)
    shapes = {TABLE: (17, 8), HEAD: (17, 8), NORM: (8,)}
    shapes |= {f"{LAYER}.self_attn.{part}_proj.weight": (8, 8) for part in "qkvo"}
    shapes |= {f"{LAYER}.{part}_layernorm.weight": (8,) for part in ("input", "post_attention")}
    shapes |= {f"{LAYER}.mlp.{part}_proj.weight": (12, 8) for part in ("gate", "up")}
    shapes[f"{LAYER}.mlp.down_proj.weight"] = (8, 12)
    made = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: made.get(name) for name in made} | changes


def write_one(folder, given, name=WHOLE):
    """One file, of either kind."""
    if name.endswith(".bin"):
        torch = pytest.importorskip("torch", reason="a .bin file needs torch: lmjax[torch]")
        torch.save({title: torch.tensor(a) for title, a in given.items()}, folder / name)
    else:
        save_file(given, folder / name, {"format": "pt"})


def write_shards(folder, given, ending="safetensors", twice=None, extra=None):
    """Two files and an index; a tensor may be in both, and others in the second alone."""
    names = sorted(given)
    stem = "model" if ending == "safetensors" else "pytorch_model"
    files = [f"{name.replace('model', stem)}.{ending}" for name in SHARDS]
    places = {name: files[names.index(name) > 4] for name in names}
    for file in files:
        part = {name: given[name] for name in names if places[name] == file}
        if file == files[1]:
            part |= (extra or {}) | (twice or {})
        write_one(folder, part, file)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
    (folder / f"{stem}.{ending}.index.json").write_text(text)


@pytest.fixture
def folder(tmp_path):
    """One with a config.json alone."""
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    return tmp_path


def read(folder, *names):
    """Those tensors as we read them."""
    params = huggingface.read(folder, training_layout())[2]
    found = {}
    for name in names or OURS:
        group, leaf = OURS[name]
        if group in params:
            found[name] = np.asarray(params[group][leaf])[: 17 if leaf == "table" else None]
    return found


def assert_read(folder, expected):
    """What we read of a folder is `expected`, and what transformers reads, where it is here."""
    found = read(folder)
    assert found
    for name, array in found.items():
        np.testing.assert_array_equal(array, np.asarray(expected[name], np.float32), err_msg=name)
    transformers = pytest.importorskip("transformers", reason="compared with it: lmjax[parity]")
    torch = pytest.importorskip("torch", reason="compared with it: lmjax[parity]")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = theirs.state_dict()
    for name, array in found.items():
        np.testing.assert_array_equal(state[name].numpy(), array, err_msg=name)


def test_one_file_comes_before_an_index(one_device, folder):
    """Of an earlier save: with its files, without them, and with one of them damaged."""
    write_shards(folder, tensors(1))
    write_one(folder, tensors(2))
    assert_read(folder, tensors(2))
    (folder / f"{SHARDS[0]}.safetensors").unlink()
    assert_read(folder, tensors(2))
    (folder / f"{SHARDS[1]}.safetensors").write_bytes(b"damaged")
    assert_read(folder, tensors(2))


ORDER = ("one safetensors", "several safetensors", "one bin", "several bin")


@pytest.mark.parametrize("first", range(4), ids=ORDER)
def test_kinds_of_files_in_transformers_order(one_device, folder, first):
    """Every kind that comes after the first lies there too, with other weights."""
    for number, kind in list(enumerate(ORDER))[first:]:
        given, ending = tensors(number), kind.split()[1]
        if kind.startswith("several"):
            write_shards(folder, given, ending)
        else:
            write_one(folder, given, WHOLE if ending == "safetensors" else "pytorch_model.bin")
    assert_read(folder, tensors(first))


def test_files_that_the_index_does_not_name_are_left_alone(one_device, folder):
    write_shards(folder, tensors(1))
    write_one(folder, tensors(2), "model-00003-of-00003.safetensors")
    write_one(folder, tensors(3), "consolidated.safetensors")
    assert_read(folder, tensors(1))


def test_an_index_that_is_wrong_about_the_file(one_device, folder):
    """The tensor lies in the other one; nothing is lost."""
    write_shards(folder, tensors(1))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][TABLE] = f"{SHARDS[0]}.safetensors"
    index["weight_map"][HEAD] = f"{SHARDS[1]}.safetensors"
    path.write_text(json.dumps(index))
    assert_read(folder, tensors(1))
    index["weight_map"]["model.nothing"] = f"{SHARDS[1]}.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"has no tensor model\.nothing"):
        read(folder)


def test_a_tensor_in_two_files(one_device, folder):
    """Twice the same is no matter; two that differ are refused: the index names one of them."""
    given = tensors(1)
    write_shards(folder, given, twice={HEAD: given[HEAD]})
    assert_read(folder, given)
    write_shards(folder, given, twice={HEAD: given[HEAD] + 1})
    with pytest.raises(UserError, match=r"lm_head\.weight is also in .*2\.safetensors, and is not"):
        read(folder)


def test_heads_of_other_tasks_are_left_out(one_device, folder):
    others = {"score.weight": (2, 8), "v_head.summary.bias": (1,), "mtp.layers.0.weight": (3, 3)}
    extra = {name: np.ones(shape, np.float32) for name, shape in others.items()}
    write_one(folder, tensors(1) | extra)
    assert_read(folder, tensors(1))
    write_one(folder, tensors(1) | {f"{LAYER}.self_attn.q_proj.bias": np.ones(8, np.float32)})
    with pytest.raises(UserError, match=r"q_proj\.bias has no place in the llama of config\.json"):
        read(folder)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("stored", ["none", "same", "other"])
def test_a_head_is_tied_as_it_is_stored(one_device, folder, tie, stored):
    """As in transformers 5, whatever config.json says; without one, nothing is predicted."""
    (folder / "config.json").write_text(json.dumps(SETTINGS | {"tie_word_embeddings": tie}))
    given = tensors(1)
    head = {"none": None, "same": given[TABLE], "other": given[HEAD]}[stored]
    write_one(folder, {k: v for k, v in (given | {HEAD: head}).items() if v is not None})
    config = huggingface.read_config(folder)[1]
    assert config.word_head == (tie or stored != "none")
    if not config.word_head:
        return
    assert config.tied_head == (tie and stored != "other")
    assert_read(folder, given | {HEAD: head})


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_names_with_and_without_the_prefix(one_device, folder, prefix):
    """The second as models without a head are written; one may stand beside it all the same."""
    given = {name.replace("model.", prefix): array for name, array in tensors(1).items()}
    write_one(folder, given)
    assert_read(folder, tensors(1))


def test_precisions_may_differ(one_device, folder):
    """Each is widened or narrowed to float32 by itself; whole numbers are refused by name."""
    given = tensors(1)
    kinds = [ml_dtypes.bfloat16, np.float16, np.float64, np.float32]
    mixed = {name: a.astype(kinds[n % 4]) for n, (name, a) in enumerate(sorted(given.items()))}
    write_one(folder, mixed)
    assert_read(folder, mixed)
    for kind, name in ((np.int8, "I8"), (np.int32, "I32"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")):
        write_one(folder, given | {NORM: given[NORM].astype(kind)})
        with pytest.raises(UserError, match=rf"model\.norm\.weight holds {name}, not one of F64"):
            read(folder)


def test_another_tensor_file_is_named_as_what_it_is(folder):
    """A folder of weights that only another program reads."""
    write_one(folder, tensors(1), "consolidated.safetensors")
    with pytest.raises(UserError, match=r"holds no weights: none of model\.safetensors"):
        huggingface.read(folder, training_layout())
