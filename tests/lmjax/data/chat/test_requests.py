"""Requests as dialogues, and messages as JSON values that are read again."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.data import ChatTemplate
from lmjax.data.chat.messages import ROLES, Message, ToolCall
from lmjax.data.chat.records import ROLE_CONTENT, message_record
from lmjax.data.chat.requests import Requests

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
NAMES = st.text("abc_", min_size=1)
VALUES = st.dictionaries(NAMES, st.integers() | TEXTS, max_size=2)
FIELDS = st.fixed_dictionaries(
    {
        "role": st.sampled_from(ROLES),
        "content": TEXTS,
        "metadata": TEXTS,
        "tools": st.lists(VALUES, max_size=2).map(tuple),
        "calls": st.lists(st.tuples(NAMES, VALUES), max_size=2),
    }
)


@given(st.lists(FIELDS, min_size=1, max_size=3))
def test_messages_are_read_as_they_were_written(fields):
    messages = [
        Message(**one | {"calls": tuple(ToolCall(*call) for call in one["calls"])})
        for one in fields
    ]
    text = json.dumps([message_record(message) for message in messages], ensure_ascii=False)
    assert ROLE_CONTENT(json.loads(text)) == messages


def test_the_context_of_a_request_becomes_a_part_of_its_text():
    assert message_record(Message("user", "Shorten.", context="A text.")) == {
        "role": "user",
        "content": "Shorten.\n\nA text.",
    }


@pytest.fixture
def requests(tmp_path):
    """A text, messages with a reply at their end, and messages of several turns."""
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    records = [
        {"prompt": "x", "answer": "y", "other": 1},
        {"messages": [{"role": role, "content": text} for role, text in turns]},
    ]
    path = tmp_path / "asks.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return Requests(path=str(path), metadata=("answer",))


def test_dialogues_are_the_documents(requests):
    """Without the reply at the end, and with the fields that are kept."""
    found = list(requests.dialogues())
    assert [[one.content for one in dialogue.messages] for dialogue in found] == [
        ["x"],
        ["a", "b", "c"],
    ]
    assert [dialogue.metadata for dialogue in found] == [{"answer": "y"}, {}]
    for dialogue, document in zip(found, requests.documents(), strict=True):
        pieces = requests.template.render(dialogue.messages)
        assert document.text == "".join(piece.text for piece in pieces)


def test_lines_that_cannot_be_asked(requests, tmp_path):
    """They are told with file and line, or left out."""
    template = ChatTemplate(assistant=("{content}",))  # it has no system message
    lines = [
        '{"messages": [{"role": "assistant", "content": "b"}]}',
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}]}',
        '{"prompt": "x"}',
    ]
    source = replace(requests, template=template, path=str(tmp_path / "bad.jsonl"))
    for number, message in ((0, "there is no message to reply to"), (1, "no role 'system'")):
        (tmp_path / "bad.jsonl").write_text("\n".join(lines[number:]))
        with pytest.raises(UserError, match=rf"bad\.jsonl, line 1: .*{message}"):
            list(source.dialogues())
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    [found] = replace(source, on_error="skip").dialogues()
    assert found.messages == [Message("user", "x")]
