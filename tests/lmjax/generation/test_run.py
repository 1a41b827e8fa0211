"""A model from its run folder, and the command that streams text from it."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import UserError, config, to_json
from lmjax.data.chat.catalogue import chat_template, fitting_template
from lmjax.data.chat.messages import Message
from lmjax.data.chat.templates import ChatTemplate
from lmjax.data.tokenizers import ByteTokenizer, CharacterTokenizer
from lmjax.generation import Sampling, TextStream, load_model, load_run, prompt_tokens
from lmjax.generation.__main__ import Generate, show_filled
from lmjax.generation.chat import chat_format
from lmjax.generation.fill import MaskedTokenInfiller
from lmjax.interop import huggingface
from lmjax.launch import run
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, initialize
from lmjax.models.family import ChatStyle
from lmjax.models.family import _registered as registered
from lmjax.models.gpt import GPT2_FAMILY
from lmjax.parallel import Mesh, generation_layout
from lmjax.runs.checkpoints import Checkpointer

ROOT = Path(__file__).parents[3]
MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=40,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(size=32),
)


@config
class TinyRun:
    """What generation needs to know of an experiment."""

    model: TransformerConfig = MODEL  # what was trained
    ema_decay: float | None = None  # decay of an average of the parameters


@pytest.fixture(scope="module")
def mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


def write_run(folder, experiment, tokenizer):
    """A run folder with a checkpoint of random parameters; returns them."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(to_json(experiment))
    tokenizer.save(folder / "tokenizer")
    _, params = initialize(experiment.model, generation_layout(), jax.random.key(3))
    average = None if experiment.ema_decay is None else jax.tree.map(lambda a: a + 1, params)
    tree = {"params": params, "average": average, "step": jnp.int32(7)}
    with Checkpointer(folder / "checkpoints") as checkpointer:
        checkpointer.save(7, tree, {"tokenizer": tokenizer.fingerprint})
    return params


@pytest.fixture(scope="module")
def trained(mesh, tmp_path_factory):
    """A run folder and its parameters."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, write_run(folder, TinyRun(), ByteTokenizer())


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the run folder, to be damaged."""
    return shutil.copytree(trained[0], tmp_path / "run")


def test_a_run_has_its_model_and_tokenizer(trained):
    folder, params = trained
    run = load_run(folder)
    assert run.generator.config == MODEL
    assert run.tokenizer.fingerprint == ByteTokenizer().fingerprint
    jax.tree.map(np.testing.assert_array_equal, run.generator.params, params)


def test_the_average_is_taken_where_there_is_one(mesh, tmp_path):
    params = write_run(tmp_path, TinyRun(ema_decay=0.9), ByteTokenizer())
    loaded = load_run(tmp_path).generator.params
    assert (loaded["final_norm"]["bias"] == params["final_norm"]["bias"] + 1).all()


def test_what_is_wrong_with_a_folder_is_said(copied, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint of step 8, but 7"):
        load_run(copied, step=8)
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        load_run(copied)
    (copied / "config.json").write_text('{"class": "os.system"}')
    with pytest.raises(UserError, match=r"config\.json.*no config class.*os\.system"):
        load_run(copied)
    (copied / "config.json").write_text(to_json(Sampling()))
    with pytest.raises(UserError, match="has no model"):
        load_run(copied)


def test_a_tokenizer_that_does_not_fit_is_refused(copied, tmp_path):
    CharacterTokenizer("abc").save(copied / "tokenizer")
    with pytest.raises(UserError, match="not the one that the checkpoint was trained with"):
        load_run(copied)
    settings = json.loads((copied / "config.json").read_text())
    settings["model"]["vocab_size"] = 200
    (copied / "config.json").write_text(json.dumps(settings))
    ByteTokenizer().save(copied / "tokenizer")
    with pytest.raises(UserError, match="of another model"):
        load_run(copied)


def run_command(monkeypatch, *arguments):
    """Calls `python -m lmjax.generation` in this process, on one device."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    run(Generate(), list(map(str, arguments)), positional="model")


def test_the_command_prints_the_prompt_and_what_follows(trained, monkeypatch, capsys):
    settings = ["temperature=0.8", "top_k=50", "top_p=0.95", "seed=1", "max_tokens=16"]
    run_command(monkeypatch, trained[0], "prompt=ab", *settings)
    text = capsys.readouterr().out
    assert text.startswith("ab") and text.endswith("\n") and len(text) > 4
    stop = text[-2]
    run_command(monkeypatch, trained[0], "prompt=ab", *settings, f"stop={json.dumps(stop)}")
    assert capsys.readouterr().out == f"{text[: text.index(stop)]}\n"


def test_a_public_model_folder_gives_the_text_of_the_run(trained, monkeypatch, capsys, tmp_path):
    """The same parameters, written as transformers reads them."""
    settings = ["prompt=ab", "seed=1", "max_tokens=8"]
    run_command(monkeypatch, trained[0], *settings)
    expected = capsys.readouterr().out
    run = load_run(trained[0])
    huggingface.write(tmp_path, MODEL, trained[1])
    with pytest.raises(UserError, match="tokenizer"):
        load_model(tmp_path)
    run.tokenizer.save(tmp_path)
    run_command(monkeypatch, tmp_path, *settings)
    assert capsys.readouterr().out == expected


def test_a_conversation_goes_on_with_all_that_was_said(trained, monkeypatch, capsys):
    format = dict(user=("{content}:",), assistant=(">", "{content};"), stop_strings=(";",))
    family = dataclasses.replace(GPT2_FAMILY, name="short", chat=(ChatStyle("short", format),))
    monkeypatch.setitem(registered, "short", family)
    short = ChatTemplate(**format)
    lines = iter(["b"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or end())

    def end():
        raise EOFError

    run_command(monkeypatch, trained[0], "chat=short", "prompt=a", "max_tokens=4", "temperature=0")
    run, template = load_run(trained[0]), short
    greedy, conversation, replies = Sampling(temperature=0.0), [], []
    for text in ("a", "b"):
        conversation.append(Message("user", text))
        tokens = template.encode(run.tokenizer, conversation)
        stop = template.stop_tokens(run.tokenizer)
        (reply,) = run.generator.generate([tokens], greedy, 4, stop)
        stream = TextStream(run.tokenizer, template.stop_strings, at_start=True)
        replies.append(stream.add(reply) + stream.rest())
        conversation.append(template.read_reply(replies[-1]))
    assert capsys.readouterr().out == "".join(f"{reply}\n" for reply in replies)


def test_the_command_prints_several_samples(trained, monkeypatch, capsys):
    """The first is what is streamed alone."""
    settings = [trained[0], "prompt=ab", "seed=1", "max_tokens=8"]
    run_command(monkeypatch, *settings)
    alone = capsys.readouterr().out
    run_command(monkeypatch, *settings, "samples=3")
    text = capsys.readouterr().out
    assert text.startswith(f"[1] {alone}")
    assert "\n[2] ab" in text and "\n[3] ab" in text


def test_the_command_prints_the_beams_and_their_scores(trained, monkeypatch, capsys):
    settings = [trained[0], "prompt=ab", "max_tokens=4"]
    run_command(monkeypatch, *settings, "beams=1", "length_penalty=0")
    run = load_run(trained[0])
    prompt = prompt_tokens(run.tokenizer, "ab")
    (best,) = run.generator.continuations(
        [prompt], Sampling(temperature=0.0), 4, [run.tokenizer.end]
    )
    text = TextStream(run.tokenizer)
    text = text.add(best.tokens) + text.rest()
    assert capsys.readouterr().out == f"[{sum(best.log_probabilities):.3f}] ab{text}\n"
    run_command(monkeypatch, *settings, "beams=3")
    scores = re.findall(r"^\[(-[\d.]+)\] ab", capsys.readouterr().out, re.MULTILINE)
    assert len(scores) == 3 and sorted(map(float, scores), reverse=True) == [*map(float, scores)]


def test_a_run_is_talked_to_in_plain_text(trained, monkeypatch, capsys):
    def end(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    texts = []
    for chat in ("plain", "true"):
        run_command(monkeypatch, trained[0], f"chat={chat}", "prompt=a", "max_tokens=4")
        texts.append(capsys.readouterr())
    assert texts[1].out == texts[0].out != "" and texts[1].err == "chat format: plain\n"


def with_special(names):
    """A tokenizer that has special tokens of these names."""
    tokenizer = ByteTokenizer()
    tokenizer.special = {name: 256 + number for number, name in enumerate(names)}
    return tokenizer


@pytest.mark.parametrize(
    ("settings", "numbers", "expected"),
    [
        ({"vocab_size": 64_000}, (102, 103, 106, 107), "baichuan"),
        ({"vocab_size": 125_696}, (106, 107), "baichuan2"),
        ({"model_type": "falcon"}, (), "falcon"),
        ({"model_type": "falcon", "num_hidden_layers": 80}, (), "falcon_180b"),
    ],
)
def test_families_of_one_model_type_are_told_apart(tmp_path, settings, numbers, expected):
    """Other families: test_jinja_format.py."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": 97, "model_type": "baichuan"}
    (tmp_path / "config.json").write_text(json.dumps(sizes | settings))
    tokenizer = with_special([*(f"<reserved_{number}>" for number in numbers), "</s>"])
    assert chat_format(tmp_path, tokenizer).title == expected


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3"])
def test_chatglms_are_told_apart_by_their_tokens(name):
    assert fitting_template("chatglm", with_special(chat_template(name).special)) == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Which model?"),
        (["runs/nowhere"], "no such folder"),
        (["{run}", "prompt=" + 40 * "x"], "41 tokens, more than the 40 of the model's context"),
        (["{run}", "temprature=1"], "temperature"),
        (["{run}", "max_tokens=0"], "max_tokens=0"),
        (["{run}", "samples=0"], "samples=0"),
        (["{run}", "chat=klingon"], "there is no chat template 'klingon'"),
        (["{run}", "chat=plain", "samples=2"], "neither stop, samples nor beams"),
        (["{run}", "beams=0"], "beams=0"),
        (["{run}", "beams=2", "samples=2"], "neither stop strings nor samples"),
        (["{run}", "beams=2", "temperature=0.5", "seed=3"], "temperature, seed: for texts that"),
    ],
)
def test_mistakes_end_with_a_message_and_code_2(trained, monkeypatch, capsys, arguments, message):
    arguments = [argument.replace("{run}", str(trained[0])) for argument in arguments]
    with pytest.raises(SystemExit) as exit:
        run_command(monkeypatch, *arguments)
    assert exit.value.code == 2
    written = capsys.readouterr()
    assert message in written.err and written.out == ""


def test_masks_are_not_drawn_or_searched_for(trained):
    """BERT's guesses are told as they are: settings of drawing and searching would do nothing."""
    encoder = dataclasses.replace(load_run(trained[0]), filling=MaskedTokenInfiller())
    for settings, names in [
        (Generate(prompt="[MASK]", beams=3, length_penalty=2.0), "beams, length_penalty: for"),
        (Generate(prompt="[MASK]", temperature=0.5, samples=2), "temperature, samples: for"),
        (Generate(prompt="[MASK]", max_tokens=3), "max_tokens: for models that write"),
    ]:
        with pytest.raises(UserError, match=names):
            show_filled(encoder, settings)
