"""Programs of StableHLO, called by jax alone, beside our models."""

import contextlib
import datetime
import json
import subprocess
import sys
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.interop import huggingface, stablehlo_folder
from lmjax.interop.__main__ import Convert
from lmjax.interop.export import convert_to_stablehlo
from lmjax.models import Batch, bert, bloom, gpt3, initialize, t5
from lmjax.parallel import training_layout
from tests.larger import larger
from tests.lmjax.interop import run_stablehlo
from tests.parity_cases import parity_folder

pytest.importorskip("flatbuffers", reason="needs the extra stablehlo")

CLOSE = 1e-5  # other orders of sums, of logits around 3
SIZES = {"vocab_size": 97, "hidden": 48, "num_layers": 2, "max_length": 32}


def tiny(base, **more):
    """A model of a family's parts in a size for tests."""
    attention = replace(base.attention, num_heads=4, num_kv_heads=None, head_dim=12)
    feed_forward = replace(base.feed_forward, size=96)
    return replace(base, **SIZES | {"attention": attention, "feed_forward": feed_forward} | more)


MADE = {
    "bert": tiny(bert()),
    "bloom": tiny(bloom()),
    "gpt3": replace(tiny(gpt3()), attention=replace(tiny(gpt3()).attention, windows=(None, 3))),
    "t5": tiny(t5(), encoder_layers=3, max_length=None),
}


@contextlib.contextmanager
def unchecked():
    """Leaves shapes unchecked, whose sizes are no int while a program is exported."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def written(one_device, tmp_path):
    """Writes a model of `MADE` or of a parity folder; gives it and its folder."""

    def write(name, **how):
        if name in MADE:
            config = MADE[name]
            graph, params = initialize(config, training_layout(), jax.random.key(3))
            params = larger(params, 4, axes=2)
        else:
            config, graph, params = huggingface.read(parity_folder(name), training_layout())
        folder = tmp_path / f"{name}.stablehlo"
        folder.mkdir()
        with unchecked():
            notes = stablehlo_folder.write(folder, config, params, **how)
        return config, nnx.merge(graph, params), folder, notes

    return write


def rows(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, SIZES["vocab_size"], length).tolist() for length in lengths]


def logits_of(config, model, given, tokens):
    """Logits of the last tokens of whole texts: the prompts and the tokens that were found."""
    graph, params = nnx.split(model)
    last = given["positions"][:, -1:]
    more = np.broadcast_to(np.arange(1, tokens.shape[1] + 1), tokens.shape)

    def longer(name, new):
        return np.concatenate([given[name], new], axis=1).astype(np.int32)

    batch = Batch(
        tokens=longer("tokens", tokens),
        positions=longer("positions", last + more),
        segments=longer("segments", np.ones_like(tokens)),
        encoder=encoder_of(given),
    )

    @jax.jit
    def run(params, batch):
        model = nnx.merge(graph, params)
        return model.logits(model(batch)[0])

    return np.asarray(run(params, batch))[:, -tokens.shape[1] - 1 :, : config.vocab_size]


def encoder_of(given):
    read = {k.removeprefix("encoder_"): a for k, a in given.items() if k.startswith("encoder_")}
    return Batch(**read) if read else None


@pytest.mark.parametrize("name", ["gpt2", pytest.param("t5", marks=pytest.mark.slow)])
def test_a_process_without_lmjax_gives_the_same_logits(written, tmp_path, name):
    """Prompts of two lengths and tokens behind them, by a loader that imports jax alone."""
    config, model, folder, notes = written(name)
    asked = {"rows": rows((6, 3)), "count": 5}
    given = run_stablehlo.padded(asked["rows"])
    if name == "t5":
        asked["rows"] = [[0], [0]]
        read = run_stablehlo.padded(rows((7, 2), seed=1))
        asked["inputs"] = {f"encoder_{field}": a.tolist() for field, a in read.items()}
        given = run_stablehlo.padded(asked["rows"])
        given |= {f"encoder_{field}": a for field, a in read.items()}
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(asked))
    script = [sys.executable, "-I", run_stablehlo.__file__, str(folder), str(prompts)]
    subprocess.run(script, check=True, cwd=tmp_path, timeout=300)
    found = np.load(folder / "found.npz")["logits"]
    expected = logits_of(config, model, given, found.argmax(-1)[:, :-1])
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)
    assert notes[0].startswith("jax promises to read the programs until 20")


@pytest.mark.parametrize(
    "name", ["llama2_gqa", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bloom", "gpt3"))]
)
def test_one_program_serves_any_number_of_rows_and_columns(written, name):
    config, model, folder, _ = written(name)
    programs = run_stablehlo.Programs(folder)
    for lengths in ((6, 3), (1,)):
        given = run_stablehlo.padded(rows(lengths))
        found = run_stablehlo.greedy(programs, given, 4)
        expected = logits_of(config, model, given, found.argmax(-1)[:, :-1])
        np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)


def test_an_encoder_gives_what_its_heads_give(written):
    config, model, folder, _ = written("bert")
    programs = run_stablehlo.Programs(folder)
    given = run_stablehlo.padded(rows((9, 5)))
    given["token_types"] = np.array([[0] * 4 + [1] * 5, [0] * 9], np.int32)
    found = programs.call["read"](programs.weights, given)
    graph, params = nnx.split(model)

    @jax.jit
    def both(params, batch):
        model = nnx.merge(graph, params)
        hidden, _ = model(batch)
        return model.logits(hidden)[..., : config.vocab_size], model.classes(hidden)

    logits, classes = jax.device_get(both(params, Batch(**given)))
    real = given["segments"] == 1
    np.testing.assert_allclose(np.asarray(found["logits"])[real], logits[real], atol=CLOSE)
    np.testing.assert_allclose(found["classes"], classes, rtol=0, atol=CLOSE)


def test_the_manifest(written):
    """Platforms, versions, the day, and the order of inputs, which is the program's own.

    It is that of a model that reads prompts from both sides.
    """
    config, model, folder, _ = written("gpt2", prefix=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
    assert manifest["versions"]["jax"] == jax.__version__
    days = datetime.date.fromisoformat(manifest["readable_until"]) - datetime.date.today()
    assert 180 <= days.days <= 183
    assert set(manifest["sizes"]) == {"batch", "new", "room"}
    assert set(manifest["programs"]) == {"prefill", "step"}
    prefill = manifest["programs"]["prefill"]
    data = bytearray((folder / prefill["file"]).read_bytes())
    program = jax.export.deserialize(data)
    assert program.calling_convention_version == manifest["calling_convention"]
    assert prefill["inputs"] == ["weights", "cache", "inputs"]
    leaves = jax.tree.leaves(program.in_tree.unflatten(program.in_avals)[0][2])
    assert len(leaves) == len(prefill["texts"])
    assert prefill["texts"]["tokens"] == {"shape": ["batch", "new"], "dtype": "int32"}
    assert prefill["cache"]["keys.1"]["shape"] == [1, "batch", "room", 48]
    given = run_stablehlo.padded(rows((6, 3)))
    given["ranks"] = np.zeros_like(given["tokens"])
    found = run_stablehlo.greedy(run_stablehlo.Programs(folder), given, 1)[:, 0]
    hidden, _ = model(Batch(**given))
    expected = np.asarray(model.logits(hidden))[:, -1, : config.vocab_size]
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)


def test_the_command(one_device, tmp_path):
    """A folder that holds something is left as it is; settings of files are refused."""
    folder = parity_folder("gpt2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        convert_to_stablehlo(folder, tmp_path / "full")
    with pytest.raises(UserError, match="weights=int8: must be none in stablehlo"):
        Convert(source=str(folder), destination="x.stablehlo/", weights="int8").run()
    assert not Path("x.stablehlo").exists()
