"""Our chat formats as Jinja templates: the same texts, errors and tokens as of the formats."""

import itertools

import pytest

from lmjax.config import UserError
from lmjax.data.chat.catalogue import templates
from lmjax.data.chat.jinja_format import JinjaFormat
from lmjax.data.chat.jinja_source import jinja_source
from lmjax.data.chat.messages import Message
from lmjax.data.chat.templates import ChatTemplate

OWN = ChatTemplate(
    special=("<s>",),
    start=("<s>",),
    system=("\"{content}'\n",),
    user=("{{[{round}]}} {system}🙂\\n{content}\n",),
    assistant=("é:", "{content}", "<s>"),
    observation=("({content})",),
    strip=True,
    forbidden=("###",),
)
KNOWN = {**templates(), "of your own": OWN}
EXPRESSED = {name: known for name, known in KNOWN.items() if jinja_source(known) is not None}
TEXTS = (" one\n", "two {content} {{ 3 }}", "{% if %}'\"\\", "🙂")


def rendered(chat_format, messages, reply):
    """Text of a conversation; None for a refusal."""
    try:
        return "".join(piece.text for piece in chat_format.render(messages, reply))
    except UserError:
        return None


def in_jinja(template):
    return JinjaFormat(jinja_source(template), "", frozenset(template.special), {})


@pytest.mark.parametrize("name", EXPRESSED)
def test_every_conversation_has_the_same_text(name):
    """All sequences of up to three messages of the roles, with and without the opening of a reply.

    Of conversations that one refuses (a role that the format lacks, a system text that nothing
    follows) the other one is refused too.
    """
    template, written = EXPRESSED[name], in_jinja(EXPRESSED[name])
    accepted = 0
    for count in range(1, 4):
        for roles in itertools.product(
            ("system", "user", "assistant", "observation"), repeat=count
        ):
            talk = [Message(role, TEXTS[n]) for n, role in enumerate(roles)]
            for reply in (False, True):
                wanted = rendered(template, talk, reply)
                assert rendered(written, talk, reply) == wanted
                accepted += wanted is not None
    assert accepted >= 12


def test_the_general_formats_are_expressed():
    assert {"plain", "bare", "alpaca", "vicuna", "openchat", "chatml"} <= EXPRESSED.keys()
    assert "chatglm3" not in EXPRESSED


def test_what_imitates_a_role_is_refused():
    with pytest.raises(UserError, match="a message holds '###', which marks roles"):
        in_jinja(OWN).render([Message("user", "a ### b")])


def test_stops_are_found_in_what_was_written():
    assert in_jinja(KNOWN["plain"]).stop_strings == KNOWN["plain"].stop_strings
    assert in_jinja(KNOWN["openchat"])._ends[0] == ("<|end_of_turn|>",)
