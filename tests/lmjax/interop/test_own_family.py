"""A family in one file of a user's own: converted, loaded, talked to and filled in like ours."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from lmjax import models
from lmjax.config import UserError, declare, replace
from lmjax.data.chat.catalogue import chat_template, templates
from lmjax.data.tokenizers import CharacterTokenizer
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer
from lmjax.generation import Generator, Message, Sampling, load
from lmjax.generation.chat import chat_format
from lmjax.generation.fill import MaskedTokenInfiller, infiller_by
from lmjax.interop import huggingface
from lmjax.interop.convert import convert
from lmjax.models import family as registry
from lmjax.models import initialize, plain_batch
from lmjax.models.family import ChatStyle, families, register
from lmjax.models.infill import InfillFormat, MaskFormat
from lmjax.parallel import training_layout

ROOT = Path(__file__).parents[3]
OWN = "tests.lmjax.interop.own_family"
TOKENIZER = ExtendedTokenizer(
    CharacterTokenizer("".join(map(chr, range(32, 127)))), ("<|turn|>", "<|gap|>")
)


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """What a test registers is gone after it, and its module can be imported anew."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(declare, "_registry", dict(declare._registry))
    registry._import_all.cache_clear()
    yield
    sys.modules.pop(OWN, None)
    registry._import_all.cache_clear()


def own_family():
    """The module, which registers its family."""
    return importlib.import_module(OWN)


def tiny(layers):
    """A small GPT-Neo; with an odd number of layers its pattern of windows ends in the middle."""
    base = own_family().gpt_neo()
    return replace(
        base,
        vocab_size=TOKENIZER.vocab_size,
        hidden=16,
        num_layers=layers,
        max_length=40,
        attention=replace(base.attention, num_heads=2, head_dim=8, windows=(None, 5)),
        feed_forward=replace(base.feed_forward, size=48),
    )


@pytest.fixture
def folder(one_device, tmp_path):
    """A model folder of the family, with a tokenizer."""
    config = tiny(3)
    _, params = initialize(config, training_layout(), jax.random.key(4))
    params = jax.tree.map(lambda a: 3 * a, params)  # so that its choices are clear
    huggingface.write(tmp_path / "model", config, params)
    TOKENIZER.save(tmp_path / "model")
    return tmp_path / "model"


def test_it_is_converted_both_ways(folder, tmp_path, capsys):
    convert(folder, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    for title, tensor in before.items():
        np.testing.assert_array_equal(after[title], tensor, err_msg=title)
    settings = json.loads((folder / "config.json").read_text())
    assert settings["model_type"] == "gpt_neo" and settings["architectures"][0].startswith("GPTNeo")
    assert settings["attention_types"] == [[["global", "local", "global"], 1]]
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert settings.items() <= again.items()
    del again["model_type"]  # which architectures tell as well
    (folder / "config.json").write_text(json.dumps(again))
    assert huggingface.read_config(folder)[0].name == "gpt_neo"
    texts = [
        load(path).generate(["ab"], Sampling(temperature=0.0), 6)
        for path in (folder, tmp_path / "run", tmp_path / "again")
    ]
    assert texts[0] == texts[1] == texts[2]


def test_it_is_talked_to_in_its_format(folder, tmp_path):
    """Also where it has become a run folder, which keeps its model_type."""
    convert(folder, tmp_path / "run")
    special = TOKENIZER.special["<|turn|>"]
    wanted = [special, *TOKENIZER.encode("ask Hi"), special, *TOKENIZER.encode("say ")]
    for path in (folder, tmp_path / "run"):
        model = load(path)
        found = chat_format(path, model.tokenizer)
        assert found.title == "neo"
        assert found.encode(model.tokenizer, [Message("user", "Hi")]) == wanted
    assert chat_template("neo") == templates()["neo"] == found


def test_its_blanks_are_filled(folder):
    """With what the logits at its place make likeliest."""
    model = load(folder)
    assert model.filling == MaskedTokenInfiller(mask="<|gap|>", cls=None, sep=None)
    read = model.filling.read(model.tokenizer, "ab<|gap|>")
    (position,) = read.positions
    assert read.tokens[position] == TOKENIZER.special["<|gap|>"]
    config, graph, params = huggingface.read(folder, training_layout())

    @jax.jit
    def run(params, batch):
        net = nnx.merge(graph, params)
        return net.logits(net(batch)[0])[0, position, : config.vocab_size]

    logits = run(params, plain_batch(np.array([read.tokens])))
    best = np.argsort(-np.asarray(logits))[:3]
    (found,) = model.guess("ab<|gap|>", 3)
    assert [text for text, _ in found] == [TOKENIZER.decode([int(n)]).strip() for n in best]
    expected = np.asarray(jax.nn.softmax(logits))[best]
    np.testing.assert_allclose([share for _, share in found], expected, rtol=1e-5)


@pytest.mark.slow
def test_the_command_lines_know_it_by_its_module(folder, tmp_path):
    """Converted and asked in new processes; without the module the folder's kind is not known."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}

    def python(*arguments):
        command = [sys.executable, "-m", *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    unknown = python("lmjax.interop", folder, tmp_path / "run")
    assert unknown.returncode == 2 and "Traceback" not in unknown.stderr
    assert 'model_type="gpt_neo" is not one of openai-gpt' in unknown.stderr
    assert "imports=" in unknown.stderr
    done = python("lmjax.interop", folder, tmp_path / "run", f"imports={OWN}")
    assert done.returncode == 0, done.stderr
    own = f"imports={OWN}"
    # What fills blanks is not talked to; a run folder goes on with texts.
    run = tmp_path / "run"
    done = python("lmjax.generation", run, own, "chat=true", "prompt=Hi", "max_tokens=2")
    assert "chat format: neo" in done.stderr
    done = python("lmjax.generation", folder, own, "prompt=ab<|gap|>")
    assert (done.returncode, done.stdout[:9]) == (0, "[MASK] 1:"), done.stderr


@pytest.mark.parametrize(("layers", "stretches"), [(3, 3), (5, 2)])
def test_an_odd_depth_is_that_of_transformers(one_device, tmp_path, layers, stretches):
    """Its own GPT-Neo, with the layout of GPT-3: logits, greedy tokens with a cache, and back.

    2e-5 of the largest logit: float32 sums in another order.
    """
    extra = "needs the extra parity: pip install -e '.[parity]', on Python 3.11"
    torch = pytest.importorskip("torch", reason=extra)
    transformers = pytest.importorskip("transformers", reason=extra)
    settings = own_family().write_gpt_neo(tiny(layers))
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    torch.manual_seed(layers)
    theirs = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**settings, **none)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.add_(scale * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    config, graph, params = huggingface.read(tmp_path / "theirs", training_layout())
    assert huggingface.architecture_of(config) == huggingface.architecture_of(tiny(layers))
    assert len(config.stretches) == stretches  # of 5, two whole periods and the layer that is left
    rows = np.random.default_rng(layers).integers(0, config.vocab_size, (2, 12))

    @jax.jit
    def logits(params, batch):
        model = nnx.merge(graph, params)
        return model.logits(model(batch)[0])

    def expected(model):
        with torch.no_grad():
            return model(torch.tensor(rows)).logits.numpy()

    found = np.asarray(logits(params, plain_batch(rows.astype(np.int32))))[..., : config.vocab_size]
    atol = 2e-5 * np.abs(expected(theirs)).max()
    np.testing.assert_allclose(found, expected(theirs), rtol=0, atol=atol)
    tokens = Generator(config, params, unstack=False).generate(
        rows.tolist(), Sampling(temperature=0.0), 8
    )
    ids = torch.tensor(rows)
    greedy = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert tokens == greedy[:, 12:].tolist()
    huggingface.write(tmp_path / "ours", config, params)
    again = transformers.GPTNeoForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32
    ).eval()
    np.testing.assert_array_equal(expected(again), expected(theirs))


NEW_FILE = """
import dataclasses
from lmjax.models.family import register
from lmjax.models.gpt import GPT2_FAMILY

register(dataclasses.replace(GPT2_FAMILY, name="newest", model_type="newest"))
"""


def test_a_new_file_among_the_families_is_found(tmp_path, monkeypatch):
    """No list names the files beside lmjax/models/family.py."""
    (tmp_path / "newest.py").write_text(NEW_FILE)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    registry._import_all.cache_clear()
    assert families()[-1].name == "newest"
    sys.modules.pop("lmjax.models.newest")


def test_what_is_made_of_a_family_comes_after_it():
    """So a LLaMA is written as a LLaMA, whatever else could hold it."""
    names = [family.name for family in families()]
    pairs = [("gpt1", "gpt2"), *(("llama", n) for n in ("skywork", "mistral", "baichuan", "qwen2"))]
    assert all(names.index(a) < names.index(b) for a, b in [*pairs, ("qwen2", "qwen")])
    assert len(set(names)) == len(names)


def test_mistakes_name_the_family():
    own = own_family()
    register(own.GPT_NEO_FAMILY)  # the same once more
    with pytest.raises(UserError, match=r"family 'llama' already, of model_type=llama in lmjax"):
        register(dataclasses.replace(own.GPT_NEO_FAMILY, name="llama"))

    def with_chat(*styles):
        register(dataclasses.replace(own.GPT_NEO_FAMILY, chat=styles))
        return templates()

    with pytest.raises(UserError, match=r"'odd' of the family gpt_neo: .*usr.*its fields are"):
        with_chat(ChatStyle("odd", {"usr": ("{content}",)}))
    with pytest.raises(UserError, match=r"'odd' of the family gpt_neo: .*\{content\}"):
        with_chat(ChatStyle("odd", {"user": ("{contents}",)}))
    with pytest.raises(UserError, match="'llama2' of the family gpt_neo differs from another"):
        with_chat(ChatStyle("llama2", {"user": ("{content}",)}))
    with pytest.raises(UserError, match="it is one of BlankFormat, SentinelFormat, MaskFormat"):
        infiller_by(InfillFormat())


def test_a_filling_may_be_ones_own():
    """A format that is derived from one of ours is read as that; a filling stays itself."""

    class Own(MaskedTokenInfiller):
        pass

    class Derived(MaskFormat):
        pass

    assert infiller_by(Own("[X]")) == Own("[X]")
    assert infiller_by(Derived("[X]")) == MaskedTokenInfiller("[X]")
    assert infiller_by(None) is None
