"""Chat formats beside transformers' `apply_chat_template`, live: ids equal to the last one."""

import json
import os

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lmjax.data.chat.catalogue import chat_template
from lmjax.data.chat.messages import Message, ToolCall
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.generation.chat import chat_format
from tests.lmjax.data.chat.chat_families import FAMILIES, WEATHER, Family
from tests.lmjax.data.chat.chat_folders import build, write_folder

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # nothing is downloaded
EXTRA = "the live comparison needs the extra parity: pip install -e '.[parity]', on Python 3.11"
transformers = pytest.importorskip("transformers", reason=EXTRA)

SYSTEM = Message("system", "Be brief.\n\nAnd  kind.")
TURNS = [
    Message("user", "  What is the\nweather, [x] <b>? 今天 🙂 "),
    Message("assistant", "\nIt is sunny:\n\n    22 degrees "),
    Message("user", "And\ttomorrow?\n\n"),
    Message("assistant", "<think>\nWho knows?\n</think>\n\nRain."),
    Message("user", "\n\nyes  or no"),
]
CALLED = [
    Message("system", "Use tools.", tools=[WEATHER]),
    Message("user", "The weather in Paris?"),
    Message(
        "assistant", "", calls=[ToolCall("get_weather", {"place": "Paris & “co”", "n": [1.5]})]
    ),
    Message("observation", '{"degrees": 22}'),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By family: our tokenizer and format, and transformers' tokenizer, of one folder."""
    found = {}
    for name, family in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        write_folder(folder, family)
        tokenizer = read_tokenizer(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        found[name] = tokenizer, chat_format_of(folder, tokenizer), theirs
    return found


def chat_format_of(folder, tokenizer):
    """The folder's own format; a folder of a tokenizer alone is enough."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return chat_format(folder, tokenizer)


def entry(message, tool_role="tool"):
    """A message as transformers takes it."""
    role = tool_role if message.role == "observation" else message.role
    found = {"role": role, "content": message.content}
    if message.calls:
        calls = [{"type": "function", "function": call._asdict()} for call in message.calls]
        found["tool_calls"] = calls
    return found


def expected(theirs, talk, reply, tool_role="tool"):
    """Ids by transformers."""
    tools = [tool for message in talk for tool in message.tools] or None
    return theirs.apply_chat_template(
        [entry(message, tool_role) for message in talk],
        tools=tools,
        add_generation_prompt=reply,
        return_dict=False,
    )


def conversations(family):
    """One turn, several, with a system message and with tools, where the family has them."""
    yield TURNS[:1]
    yield TURNS
    yield TURNS[:2]
    if family.system:
        yield [SYSTEM, *TURNS[:3]]
    if family.tools:
        yield CALLED[:2]
        yield CALLED
    if family.tool_role != "tool":
        yield [*TURNS[:2], CALLED[-1]]


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_transformers(folders, name):
    tokenizer, template, theirs = folders[name]
    for talk in conversations(FAMILIES[name]):
        for reply in (True, False):
            found = template.encode(tokenizer, talk, reply)
            wanted = expected(theirs, talk, reply, FAMILIES[name].tool_role)
            assert found == wanted, (talk, reply)


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2TokenizerFast", "LlamaTokenizer", None])
@pytest.mark.parametrize("said", [{}, {"bos_token": None}, {"eos_token": "</s>"}])
def test_names_of_tokens_that_the_class_gives(tmp_path, kind, said):
    """Where tokenizer_config.json does not say them."""
    tokens = ("<unk>", "<s>", "</s>", "<|endoftext|>")
    family = Family("", tokens, kind="prepended" if kind == "LlamaTokenizer" else "bytes")
    build(family).save(str(tmp_path / "tokenizer.json"))
    roles = ("bos", "eos", "unk", "pad", "sep", "cls", "turn", "image")
    template = "|".join(f"{role} {{{{ {role}_token }}}}" for role in roles)
    settings = {"tokenizer_class": kind} if kind else {}
    settings |= {"turn_token": "<s>", "extra_special_tokens": {"image_token": "<unk>"}}
    settings |= {"chat_template": template, **said}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": "qwen2" if kind is None else "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    pieces = chat_format(tmp_path, read_tokenizer(tmp_path)).render(TURNS[:1])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert "".join(piece.text for piece in pieces) == theirs.apply_chat_template(
        [entry(TURNS[0])], tokenize=False
    )


TEXTS = st.text(st.sampled_from("ab \n\t<|>[]/sINT▁é漢🙂")) | st.text()


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25)
@given(texts=st.lists(TEXTS, min_size=3, max_size=3))
def test_whatever_people_write(folders, name, texts):
    """All but names of special tokens, whole or put together with what the template writes."""
    tokenizer, template, theirs = folders[name]
    talk = [Message(role, text) for role, text in zip(("user", "assistant", "user"), texts)]
    rendered = theirs.apply_chat_template([entry(m) for m in talk], tokenize=False)
    genuine = [text for text, is_special in template.render(talk, reply=False) if is_special]
    assume(genuine == specials(tokenizer, rendered))  # else transformers' has a forged token
    assert template.encode(tokenizer, talk) == expected(theirs, talk, True)


def specials(tokenizer, text):
    """Names of the special tokens that a text is read to have."""
    names = {token: name for name, token in tokenizer.special.items()}
    return [names[token] for token in tokenizer.encode_special(text) if token in names]


@pytest.mark.parametrize("name", ["qwen2", "qwen2.5", "qwen3", "llama2", "mistral", "gemma"])
def test_our_own_formats_say_the_same(folders, name):
    """The formats for folders without a template, beside the family's template.

    Ids where each piece is encoded as within the whole text, as bytes and Gemma's pieces are.
    """
    family = "qwen" if name == "qwen2" else name
    tokenizer, template, theirs = folders[family]
    for talk in conversations(FAMILIES[family]):
        if not any(message.tools for message in talk):
            if name == "mistral":  # its template strips no message
                talk = [Message(message.role, message.content.strip()) for message in talk]
            for reply in (True, False):
                if reply and talk[-1].role == "assistant":
                    continue  # ours opens another reply, theirs nothing
                found = chat_template(name).render(talk, reply)
                text = "".join(piece.text for piece in found)
                talk_there = [entry(message) for message in talk]
                assert text == theirs.apply_chat_template(
                    talk_there, tokenize=False, add_generation_prompt=reply
                ), (talk, reply)
                if FAMILIES[family].kind in ("bytes", "replaced"):
                    tokens = chat_template(name).encode(tokenizer, talk, reply)
                    assert tokens == template.encode(tokenizer, talk, reply)
