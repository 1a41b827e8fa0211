"""The command: folders in and out, decoding from few bits, and mistakes of the user."""

import dataclasses
import json
import re
import sys
import time

import jax
import numpy as np
import pytest

from lmjax.compression.__main__ import main
from lmjax.compression.forms_picture import HEIGHT, MARGIN, WIDTH, Point, picture
from lmjax.compression.forms_table import FormsTable, Measured, words_of
from lmjax.compression.peak_memory import PeakMemory
from lmjax.compression.quantise import Quantise
from lmjax.config import UserError, replace
from lmjax.console import make_console
from lmjax.evaluation.tasks import Arc
from lmjax.generation.generator import Generator
from lmjax.interop import gguf_file, huggingface
from lmjax.interop.folder import load_trained_model
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    Int4,
    Int8,
    Quantization,
    StaticInt8,
    TransformerConfig,
    initialize,
    with_quantization,
)
from lmjax.parallel import Mesh, generation_layout, training_layout
from lmjax.runs.trained_model import read_experiment
from tests.lmjax.interop.test_packed import MODEL
from tests.lmjax.jobs.base_run import write_base

TINY = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=32,
    attention=AttentionConfig(num_heads=8, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
)


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


def test_a_gguf_file_is_a_source(folder, tmp_path):
    """Of its weights in float32 come the integers that come of the same model's folder."""
    pytest.importorskip("gguf", reason="needs the extra gguf")
    path, found = tmp_path / "model.gguf", []
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        config, _, params = huggingface.read(folder, training_layout())
        gguf_file.write(path, config, params, None, "f32")
    for source in (folder, path):
        small = tmp_path / f"of-{source.name}"
        Quantise(source=str(source), destination=str(small), group=16).run()
        with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
            found.append(load_trained_model(small, generation_layout()).params)
        assert read_experiment(small).source == str(source)
    jax.tree.map(np.testing.assert_array_equal, *found)
    with pytest.raises(UserError, match="it is a GGUF file, of which one is made by: python -m"):
        read_experiment(path)


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
        Measured("whole", "float32", 4_000_000, 4_000_000, 3000.0, 1000, 4000, 50.0, 5_000_000),
        Measured("small", "Int4, groups of 64", 600_000, 700_000, 3010.0, 1000, 4000, 80.0),
    ]
    found = [dataclasses.replace(one, scores={"Arc acc": 0.25 + n}) for n, one in enumerate(found)]
    files = {"output": str(tmp_path / "forms.json"), "report": str(tmp_path / "forms.html")}
    FormsTable(**files).show(found, make_console())
    out = capsys.readouterr().out
    assert "of 64)" in out and "1.01" in out
    numbers = json.loads((tmp_path / "forms.json").read_text("utf-8"))
    np.testing.assert_allclose(numbers[1]["perplexity"], np.exp(3.01))
    np.testing.assert_allclose(numbers[1]["bits_per_byte"], 3010 / 4000 / np.log(2))
    page = (tmp_path / "forms.html").read_text("utf-8")
    assert "small (Int4" in page and "width:17.5%" in page
    assert "<th>Arc acc</th><th>tokens/s</th><th>peak MB</th>" in page
    assert page.count("<circle") == 2 and ">whole</text>" in page


def test_forms_of_weights_in_words(tmp_path):
    """A sparse model is called so, one of floats or of few bits by what it is."""
    weight = np.arange(8.0) % 4 * (np.arange(8) % 2)
    blocks = {"up": {"weight": weight, "bias": np.zeros(8)}}
    assert words_of(tmp_path, TINY, {"blocks": [blocks, blocks]}) == "float32, 50% zeros"
    assert words_of(tmp_path, TINY, {"blocks": {"up": {"weight": weight + 1}}}) == "float32"
    small = replace(TINY, quantization=Quantization(weights=Int4(block=32)))
    assert words_of(tmp_path, small, {"blocks": {}}) == "Int4, groups of 32"


def test_points_lie_where_their_numbers_are():
    """Between the ends of the axes, more to the right and above; equal numbers have room too."""
    found = picture([Point("a", 1.0, 2.0), Point("b", 3.0, 5.0)], "x", "y < 1", "words")
    (ax, bx), (ay, by) = (
        [float(n) for n in re.findall(rf'<circle.*? {name}="([\d.]+)"', found)]
        for name in ("cx", "cy")
    )
    assert MARGIN < ax < bx < WIDTH and HEIGHT > ay > by > 0 and "y &lt; 1" in found
    assert "<circle" in picture([Point("a", 0.0, 0.0)], "x", "y", "words")


def test_peak_memory_is_that_of_the_block():
    """Of 64 MB that are held for a moment at least three quarters are seen, once they are gone."""
    with PeakMemory() as peak:
        held = np.ones(64_000_000, np.uint8)
        time.sleep(0.05)
        del held
    assert 48_000_000 < peak.bytes < 200_000_000


def test_a_table_of_a_trained_model(tmp_path, capsys):
    """Each number is there; the task's score is a share of its items."""
    write_base(tmp_path, TINY)
    (tmp_path / "text.txt").write_text("line 5 and 25\n" * 20)
    questions = [
        {
            "question": f"{n}",
            "choices": {"text": ["line", "x"], "label": ["A", "B"]},
            "answerKey": "A",
        }
        for n in range(4)
    ]
    (tmp_path / "arc.jsonl").write_text("\n".join(map(json.dumps, questions)))
    base = str(tmp_path / "base")
    FormsTable(
        models=(base,),
        text=str(tmp_path / "text.txt"),
        tasks=(Arc(path=str(tmp_path / "arc.jsonl")),),
        tokens=4,
        runs=1,
        output=str(tmp_path / "forms.json"),
    ).run()
    assert "Arc" in capsys.readouterr().out
    (first,) = json.loads((tmp_path / "forms.json").read_text("utf-8"))
    ((name, score),) = first["scores"].items()
    assert "acc" in name and score in (0, 0.25, 0.5, 0.75, 1)
    assert first["peak"] >= first["memory"] and first["speed"] > 0
