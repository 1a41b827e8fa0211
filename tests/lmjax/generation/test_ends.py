"""Where texts end and begin: ends of folders, special tokens as stops and in prompts.

The models are Markov chains: decoded greedily, a token is followed by the one that `CHAIN` says.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from lmjax.config import UserError
from lmjax.generation import Message, Sampling, chat_format, load, prompt_tokens
from lmjax.generation.__main__ import Generate
from lmjax.generation.run import ends_of
from lmjax.interop.convert import convert
from lmjax.interop.kept_files import keep
from lmjax.launch import run
from lmjax.parallel import Mesh

SPECIAL = ["<|begin|>", "<|doc|>", "<|turn|>", "<|pad|>"]
BEGIN, DOC, TURN, PAD = range(256, 260)
VOCAB, HIDDEN = 260, 272
CHAIN = {"a": "b", "b": "c", "c": "<|turn|>", "<|turn|>": "x", "x": "y", "y": "<|doc|>"}
CHAIN |= {"<|doc|>": "z", "z": "z", "<|begin|>": "z"}
GREEDY = Sampling(temperature=0)


def write_model(folder, size=VOCAB, **settings):
    """A folder of the chain, with a tokenizer of bytes; `settings` are config.json's own."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: token for token, letter in enumerate(letters)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", BEGIN)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    head = np.zeros((VOCAB, HIDDEN), np.float32)
    for before, after in CHAIN.items():
        head[tokenizer.token_to_id(after), tokenizer.token_to_id(before)] = 5
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin|>", "eos_token": "<|doc|>"})
    )
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "vocab_size": size,
                "hidden_size": HIDDEN,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 16,
                "max_position_embeddings": 128,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False,
                **settings,
            }
        )
    )
    zeros, ones = lambda *shape: np.zeros(shape, np.float32), np.ones(HIDDEN, np.float32)
    layer = "model.layers.0"
    save_file(
        {
            "model.embed_tokens.weight": np.eye(size, HIDDEN, dtype=np.float32),
            "lm_head.weight": np.ascontiguousarray(head[:size]),
            "model.norm.weight": ones,
            f"{layer}.input_layernorm.weight": ones,
            f"{layer}.post_attention_layernorm.weight": ones,
            **{f"{layer}.self_attn.{n}_proj.weight": zeros(HIDDEN, HIDDEN) for n in "qkvo"},
            f"{layer}.mlp.gate_proj.weight": zeros(16, HIDDEN),
            f"{layer}.mlp.up_proj.weight": zeros(16, HIDDEN),
            f"{layer}.mlp.down_proj.weight": zeros(HIDDEN, 16),
        },
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


@pytest.fixture(scope="module")
def mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def model(mesh, tmp_path_factory):
    """The chain, without what a folder says of its ends; what it compiles serves all tests."""
    return load(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def folder(mesh, tmp_path):
    """A folder that says nothing of its ends."""
    (tmp_path / "model").mkdir()
    return write_model(tmp_path / "model")


def texts_of(model):
    """What follows "a" by every way to generate."""
    found = {
        *model.generate(["a", "a"], GREEDY, max_tokens=12, samples=2),
        "".join(model.stream("a", GREEDY, max_tokens=12)),
        model.search("a", beams=2, length_penalty=0.0, max_tokens=12)[0][0],
    }
    assert len(found) == 1, found
    return found.pop()


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, "bcxy"),
        (TURN, None, "bc"),
        ([TURN], None, "bc"),
        ([DOC, TURN], None, "bc"),
        (None, TURN, "bc"),
        (None, [DOC, TURN], "bc"),
        (DOC, TURN, "bc"),
        ([TURN], [DOC], "bc"),
        ([PAD], [PAD, DOC], "bcxy"),
        (ord("y") - 33, None, "bcx"),  # a token of text, as GPT-2 orders its bytes
    ],
)
def test_every_end_of_the_folder_ends_a_text(model, folder, tmp_path, generation, config, expected):
    """generation_config.json, config.json and the tokenizer; also of a run that it becomes."""
    if generation is not None:
        text = json.dumps({"eos_token_id": generation, "temperature": 0.5})
        (folder / "generation_config.json").write_text(text)
    if config is not None:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"eos_token_id": config}))
    ends = ends_of(folder, model.generator.config)
    assert texts_of(dataclasses.replace(model, ends=ends)) == expected
    run = tmp_path / "run"
    run.mkdir()
    keep(folder, run)
    assert set(ends_of(run, model.generator.config)) == set(ends)


def test_ends_survive_conversion(folder, tmp_path):
    settings = {"eos_token_id": [TURN, PAD], "temperature": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    convert(folder, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    for name in ("model", "run", "back"):
        assert "".join(load(tmp_path / name).stream("a", GREEDY, max_tokens=12)) == "bc"
    kept = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert kept == settings
    back = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert back == {"bos_token_id": BEGIN, **settings}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == [
        TURN,
        PAD,
    ]


def test_ends_that_are_no_tokens(model, folder, capsys):
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [{TURN}, 999, -1]}}')
    assert ends_of(folder, model.generator.config) == (TURN,)
    assert "eos_token_id has 999, -1, which the model does not have" in capsys.readouterr().err
    for wrong in ('"<|turn|>"', "true", "1.5", '["x"]', "{}"):
        (folder / "generation_config.json").write_text(f'{{"eos_token_id": {wrong}}}')
        with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id=.*id of a tok"):
            load(folder)
    (folder / "generation_config.json").write_text("[")
    with pytest.raises(UserError, match=r"generation_config\.json is damaged"):
        load(folder)


def test_a_special_token_is_a_stop_string(model, folder, monkeypatch, capsys):
    for stop in (["<|turn|>"], ["q", "<|turn|>", "y"]):
        assert model.generate(["a"], GREEDY, 12, stop, samples=2) == ["bc", "bc"]
        assert "".join(model.stream("a", GREEDY, 12, stop)) == "bc"
    assert model.generate(["a"], GREEDY, 12, ["y", "<|pad|>"]) == ["bcx"]
    for stop in ("<|turn|>\n", "c<|turn|>", "<|turn|><|doc|>"):
        with pytest.raises(UserError, match=r"holds the special token '<\|turn\|>', which is no t"):
            model.generate(["a"], GREEDY, 12, [stop])
        with pytest.raises(UserError, match="give the token alone"):
            model.stream("a", GREEDY, 12, [stop])
    run_command(monkeypatch, folder, "prompt=a", "temperature=0", 'stop="<|turn|>"')
    assert capsys.readouterr().out == "abc\n"


def run_command(monkeypatch, *arguments):
    """Calls `python -m lmjax.generation` in this process, on one device."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    run(Generate(), list(map(str, arguments)), positional="model")


def test_what_the_folder_recommends_is_said(folder, monkeypatch, capsys):
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "num_beams": 1}
    settings |= {"eos_token_id": DOC, "repetition_penalty": 1.0, "no_repeat_ngram_size": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    run_command(monkeypatch, folder, "prompt=a", "max_tokens=1", "temperature=0.6", "top_k=10")
    told = "recommends top_p=0.95, top_k=20, no_repeat_ngram_size=3; only what is given here counts"
    assert told in capsys.readouterr().err
    (folder / "generation_config.json").write_text(json.dumps(settings | {"do_sample": False}))
    run_command(monkeypatch, folder, "prompt=a", "max_tokens=1")
    assert "recommends no_repeat_ngram_size=3;" in capsys.readouterr().err


def test_special_tokens_in_a_prompt_on_purpose(model, folder, monkeypatch, capsys):
    """As text they are letters, and the chain goes on from the last one, which has no successor."""
    prompt = "a<|turn|>"
    assert model.generate([prompt], GREEDY, 2, special=True) == ["xy"]
    assert "".join(model.stream(prompt, GREEDY, 2, special=True)) == "xy"
    assert model.search(prompt, max_tokens=2, special=True)[0][0] == "xy"
    assert model.generate([prompt], GREEDY, 2) != ["xy"]
    run_command(monkeypatch, folder, f"prompt={prompt}", "temperature=0", "special=true")
    assert capsys.readouterr().out == f"{prompt}xy\n"
    begun = prompt_tokens(model.tokenizer, "a")
    assert prompt_tokens(model.tokenizer, "<|begin|>a", special=True) == begun
    assert prompt_tokens(model.tokenizer, "a", special=True) == begun


def test_a_tokenizer_larger_than_the_table(mesh, tmp_path, capsys):
    """It is said and goes on, here and in a run that it becomes; a prompt with such ids is not."""
    (tmp_path / "model").mkdir()
    folder = write_model(tmp_path / "model", size=PAD)
    convert(folder, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    told = "has 260 tokens, more than the 259 of the model; texts must not have '<|pad|>' (259)"
    assert capsys.readouterr().out.count(told) == 2
    for name in ("model", "run", "back"):
        model = load(tmp_path / name)
        assert told in capsys.readouterr().err
        assert model.generate(["a"], GREEDY, 12) == ["bcxy"]
        with pytest.raises(UserError, match="prompt 1 has the token 259; the model's are 0 to 258"):
            model.generate(["a<|pad|>"], GREEDY, 12, special=True)


def test_a_conversation_ends_at_all_of_them(model, folder):
    """The folder's ends, the tokenizer's, and what the template writes behind a reply."""
    for template, expected in [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "bcxy"),
        ("{% for m in messages %}{{ m.content }}<|pad|>{% endfor %}a", "bcxy"),
        ("{% for m in messages %}{{ m.content }} <|turn|>\n{% endfor %}a", "bc"),
        ("{% for m in messages %}{{ m.content }}x{% endfor %}a", "bcxy"),
        ("{% for m in messages %}{{ m.content }}xy{{ m.role }}{% endfor %}a", "bcxy"),
    ]:
        (folder / "chat_template.jinja").write_text(template)
        chat = chat_format(folder, model.tokenizer)
        assert "".join(model.reply(chat, [Message("user", "a")], GREEDY, 12)) == expected, template
    model = dataclasses.replace(model, ends=(TURN,))
    assert "".join(model.reply(chat, [Message("user", "a")], GREEDY, 12)) == "bc"


def test_half_precision_on_a_cpu(folder, tmp_path, capsys, monkeypatch):
    """A run that was trained in bfloat16 is decoded in float32, unless it is asked for."""
    convert(folder, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    capsys.readouterr()
    assert load(tmp_path / "run").generator.config.dtype == "float32"
    assert capsys.readouterr().err.count("computing in float32") == 1
    for place in (tmp_path / "run", folder):
        assert load(place, dtype="bfloat16").generator.config.dtype == "bfloat16"
    assert load(folder).generator.config.dtype == "float32"
    assert capsys.readouterr().err == ""
    run_command(monkeypatch, folder, "prompt=a", "temperature=0", "dtype=bfloat16")
    assert capsys.readouterr().out == "abcxy\n"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert load(tmp_path / "run").generator.config.dtype == "bfloat16"
