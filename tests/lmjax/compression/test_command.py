"""The command: folders in and out, decoding from few bits, and mistakes of the user."""

import json
import re
import sys

import jax
import numpy as np
import pytest

from lmjax.compression.__main__ import main
from lmjax.compression.forms_table import FormsTable, Measured
from lmjax.compression.quantise import Quantise
from lmjax.config import UserError
from lmjax.console import make_console
from lmjax.generation.generator import Generator
from lmjax.interop import huggingface
from lmjax.models import Int4, Int8, StaticInt8, initialize, with_quantization
from lmjax.parallel import Mesh, generation_layout, training_layout
from lmjax.runs.trained_model import load_trained_model
from tests.lmjax.interop.test_packed import MODEL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model folder of transformers' without a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        params = initialize(MODEL, training_layout(), jax.random.key(0))[1]
        huggingface.write(path, MODEL, params)
    return path


def test_a_run_folder_of_few_bits_decodes_as_its_floats(folder, tmp_path, capsys):
    """Tokens at temperature 0 are those of the weights made float, from the folder as written."""
    small = tmp_path / "small"
    mesh = Mesh()  # of all devices; it is read on one
    Quantise(source=str(folder), destination=str(small), group=16, mesh=mesh).run()
    assert "written" in capsys.readouterr().out
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        trained = load_trained_model(small, generation_layout())
        assert trained.config.quantization.weights == Int4(block=16, scales="float16")
        assert trained.config.quantization.tables == Int8(block=16, scales="float16")
        floats, plain = with_quantization(trained.params, trained.config, None)
        prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
        found = Generator(trained.config, trained.params).continuations(prompts[:1], max_tokens=8)
        expected = Generator(plain, floats).continuations(prompts[:1], max_tokens=8)
    assert found[0].tokens == expected[0].tokens
    np.testing.assert_allclose(
        found[0].log_probabilities, expected[0].log_probabilities, rtol=0, atol=1e-4
    )
    with pytest.raises(UserError, match="exists already"):
        Quantise(source=str(folder), destination=str(small), mesh=mesh).run()


def test_a_method_that_fails_leaves_nothing(folder, tmp_path):
    """Without a tokenizer no text can be read: the folder does not appear."""
    text = tmp_path / "text.txt"
    text.write_text("words")
    wanted = Quantise(
        source=str(folder),
        destination=str(tmp_path / "out"),
        method="gptq",
        calibration=str(text),
    )
    with pytest.raises(UserError, match=r"has no tokenizer, which calibration=FILE needs"):
        wanted.run()
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group": 3}, "group=3: must be an even number"),
        ({"rows": 0}, "rows=0: must be 1 or more"),
        ({"alpha": 1.5}, "alpha=1.5: must be from 0 to 1"),
        ({"damping": 0.0}, "damping=0.0: must be above 0"),
        ({"activations": "static"}, "activations=static: products of integers need weights=int8"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Quantise(**fields)


def test_settings_are_those_of_the_model():
    settings = Quantise(weights="int8", group=None, activations="static", tables=None)
    found = settings.quantization()
    assert (found.weights.block, found.activations, found.tables) == (None, StaticInt8(), None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Which command\\? The first word names it: quantise, prune, table"),
        (["squeeze"], "squeeze is none: quantise, prune, table"),
        (["quantise"], "Which folders"),
        (["quantise", "a", "b", "weights=int3"], "weights"),
        (["table", "a", "b"], "Which models, and which text"),
    ],
)
def test_mistakes_on_the_command_line(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["lmjax.compression", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_table_is_printed_and_written(tmp_path, capsys):
    """Numbers of the first model are what the others rise over."""
    found = [
        Measured("whole", "float32", 4_000_000, 4_000_000, 3000.0, 1000, 4000, 50.0),
        Measured("small", "Int4, groups of 64", 600_000, 700_000, 3010.0, 1000, 4000, 80.0),
    ]
    files = {"output": str(tmp_path / "forms.json"), "report": str(tmp_path / "forms.html")}
    FormsTable(**files).show(found, make_console())
    out = capsys.readouterr().out
    assert "of 64)" in out and "1.005" in out
    numbers = json.loads((tmp_path / "forms.json").read_text("utf-8"))
    np.testing.assert_allclose(numbers[1]["perplexity"], np.exp(3.01))
    np.testing.assert_allclose(numbers[1]["bits_per_byte"], 3010 / 4000 / np.log(2))
    page = (tmp_path / "forms.html").read_text("utf-8")
    assert "small (Int4" in page and "width:17.5%" in page
