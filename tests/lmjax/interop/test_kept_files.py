"""Chat templates, ends and names of special tokens: read from folders and kept by conversions."""

import json

import jax
import pytest

from lmjax.config import UserError
from lmjax.data.chat.folder import Template, read_special_names, read_templates, write_templates
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers import load_tokenizer
from lmjax.generation import Message, chat_format
from lmjax.interop import huggingface
from lmjax.interop.convert import convert
from lmjax.interop.kept_files import KEPT, keep, read_end_ids
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, initialize
from lmjax.parallel import training_layout
from lmjax.runs.folder import RunFolder
from tests.lmjax.data.chat.chat_families import FAMILIES, WEATHER
from tests.lmjax.data.chat.chat_folders import build, write_folder

TALK = [
    Message("user", "Hello"),
    Message("assistant", "<think>\nHm\n</think>\n\nHi!"),
    Message("user", "Who\n\nare you?"),
]
EMPTY_MAP = {"bos_token": None, "eos_token": "</s>"}


def write(folder, **files):
    """Files of a folder by name, with `__` for a dot; what is no text as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_what_is_kept_comes_back(tmp_path):
    """Byte for byte, line ends and all; once more is the same."""
    named = [
        {"name": "default", "template": "a\r\n\tü {{ bos_token }}\n"},
        {"name": "tool_use", "template": "b"},
    ]
    source = write(
        tmp_path / "source",
        tokenizer_config__json=EMPTY_MAP | {"pad_token": "<pad>", "chat_template": named},
        generation_config__json={"eos_token_id": 7, "top_p": 0.8},
        config__json={"eos_token_id": [7, 8]},
    )
    expected = {entry["name"]: entry["template"] for entry in named}
    for place in (tmp_path / "run", tmp_path / "again"):
        place.mkdir()
        keep(source, place)
        found = {name: template.source for name, template in read_templates(place).items()}
        assert found == expected
        assert (place / "chat_template.jinja").read_bytes() == expected["default"].encode()
        assert json.loads((place / "generation_config.json").read_text()) == {
            "eos_token_id": [7, 8],
            "top_p": 0.8,
        }
        assert read_special_names(place) == EMPTY_MAP | {"pad_token": "<pad>"}
        assert {path.name for path in place.iterdir()} == set(KEPT)
        source = place
    RunFolder(source).remove()
    assert not source.exists()


def test_nothing_to_keep(tmp_path):
    source = write(tmp_path / "source", config__json={}, tokenizer_config__json=EMPTY_MAP)
    assert keep(source, write(tmp_path / "run")) == {}
    assert list((tmp_path / "run").iterdir()) == []
    assert keep(source, tmp_path / "run", {"eos_token_id": 3}) == {"eos_token_id": 3}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["generation_config.json"]


def test_a_template_that_would_leave_the_folder(tmp_path):
    for name in ("../x", "a/b", "", "/x"):
        with pytest.raises(UserError, match=r"in tokenizer_config\.json has no name for a file"):
            write_templates(tmp_path, {name: Template("x", "tokenizer_config.json")})


def test_damaged_files_are_named(tmp_path):
    for name in ("generation_config__json", "config__json", "tokenizer_config__json"):
        folder = write(tmp_path / name, **{name: "{"})
        with pytest.raises(UserError, match=rf"{name.replace('__', '.')} is damaged"):
            keep(folder, write(tmp_path / "out"))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja cannot be read"):
        read_templates(tmp_path)
    for text in ('{"eos_token_id": "2"}', '{"eos_token_id": [2, null]}'):
        with pytest.raises(UserError, match=r"config\.json: eos_token_id=.*: should be the id"):
            read_end_ids(write(tmp_path / "ends", config__json=text))


# ---- conversions -------------------------------------------------------------------------------


def write_model(folder, family, **settings):
    """A model folder of a chat family, with random parameters."""
    config = TransformerConfig(
        vocab_size=build(family).get_vocab_size(),
        hidden=16,
        num_layers=1,
        max_length=64,
        attention=AttentionConfig(num_heads=2, head_dim=8),
        feed_forward=FeedForwardConfig(size=32),
    )
    _, params = initialize(config, training_layout(), jax.random.key(0))
    huggingface.write(folder, config, params)
    write_folder(folder, family)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma"])
def test_a_chat_model_is_talked_to_the_same_after_conversion(one_device, tmp_path, name):
    """To a run, to another run, and back; and as a copy of the folder."""
    family = FAMILIES[name]
    tools = f"{{{{ pad_token }}}}{family.template}"
    named = [{"name": "default", "template": family.template}]
    named.append({"name": "tool_use", "template": tools})
    write_model(tmp_path / "model", family, chat_template=named, pad_token=family.tokens[0])
    convert(tmp_path / "model", tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "second", to_run=True)
    convert(tmp_path / "second", tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "copy", to_run=False)
    talks = [TALK, TALK[:1], [Message("system", "", tools=[WEATHER]), *TALK]]
    found = []
    for place in ("model", "run", "second", "back", "copy"):
        folder = tmp_path / place
        read = load_tokenizer if (folder / "tokenizer").is_dir() else read_tokenizer
        tokenizer = read(folder / "tokenizer" if read is load_tokenizer else folder)
        template = chat_format(folder, tokenizer)
        found.append([template.encode(tokenizer, talk) for talk in talks])
        found[-1].append(template.stop_tokens(tokenizer))
        if place in ("run", "second"):  # a folder for transformers names more of the tokens
            assert template == chat_format(tmp_path / "model", read_tokenizer(tmp_path / "model"))
    assert all(one == found[0] for one in found)
    assert found[0][2][0] == read_tokenizer(tmp_path / "model").special[family.tokens[0]]


def test_transformers_reads_what_comes_back(one_device, tmp_path):
    reason = "needs the extra parity: pip install -e '.[parity]', on Python 3.11"
    transformers = pytest.importorskip("transformers", reason=reason)
    family = FAMILIES["qwen2.5"]
    write_model(tmp_path / "model", family, pad_token="<|endoftext|>")
    convert(tmp_path / "model", tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    talk = [{"role": message.role, "content": message.content} for message in TALK]
    theirs = [
        transformers.AutoTokenizer.from_pretrained(tmp_path / place) for place in ("model", "back")
    ]
    first, second = (
        tokenizer.apply_chat_template(talk, tools=[WEATHER], return_dict=False)
        for tokenizer in theirs
    )
    assert first == second
    assert theirs[0].pad_token_id == theirs[1].pad_token_id is not None


def test_a_family_without_a_template_is_known_after_conversion(one_device, tmp_path):
    """And what is not known is not guessed, nor called plain."""
    write_model(tmp_path / "model", FAMILIES["llama2"], chat_template=None)
    convert(tmp_path / "model", tmp_path / "run")
    kind = json.loads((tmp_path / "model" / "config.json").read_text())["model_type"]
    with pytest.raises(UserError, match=f"no chat format is known for a {kind} model"):
        chat_format(tmp_path / "run", load_tokenizer(tmp_path / "run" / "tokenizer"))
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace(f'"family": "{kind}"', '"family": "chatglm"'))
    write_folder(tmp_path / "model", FAMILIES["chatglm2"])
    assert chat_format(tmp_path / "run", read_tokenizer(tmp_path / "model")).title == "chatglm2"
