"""Replies in conversations: which tokens a model has to write, in every chat format."""

from typing import ClassVar

import pytest

from lmjax.config import UserError
from lmjax.data.chat.catalogue import templates
from lmjax.data.chat.folder import folder_format
from lmjax.data.chat.jinja_format import JinjaFormat
from lmjax.data.chat.messages import Message
from lmjax.data.chat.templates import ChatTemplate
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers import ByteTokenizer
from tests.lmjax.data.chat.chat_families import FAMILIES
from tests.lmjax.data.chat.chat_folders import write_folder

TALK = [
    Message("user", "Hello"),
    Message("assistant", "Hi!"),
    Message("user", "Who are\nyou?"),
    Message("assistant", "A model."),
]
# What each format has a model write in TALK; a stop that the next message begins with is its end.
REPLIES = {
    "plain": (" Hi!\n\nUser:", " A model.\n\n"),
    "bare": ("Hi!", "A model."),
    "alpaca": ("Hi!", "A model."),
    "vicuna": (" Hi!</s>", " A model.</s>"),
    "openchat": (" Hi!<|end_of_turn|>", " A model.<|end_of_turn|>"),
    "llama2": (" Hi! </s>", " A model. </s>"),
    "mistral": (" Hi!</s>", " A model.</s>"),
    "gemma": ("Hi!<end_of_turn>", "A model.<end_of_turn>"),
    "baichuan": ("Hi!</s>", "A model.</s>"),
    "baichuan2": ("Hi!<reserved_106>", "A model."),
    "falcon": (" Hi!\n\nUser:", " A model.\n\n"),
    "falcon_180b": (" Hi!\nUser:", " A model.\n"),
    "chatglm2": ("Hi!\n\n", "A model.\n\n"),
    "chatglm3": ("\nHi!<|user|>", "\nA model."),
    **dict.fromkeys(("chatml", "qwen2", "qwen2.5"), ("Hi!<|im_end|>", "A model.<|im_end|>")),
    "qwen3": ("Hi!<|im_end|>", "<think>\n\n</think>\n\nA model.<|im_end|>"),
}


def replies(form, messages):
    """Texts of the replies that a format marks."""
    found, before = [], False
    for piece in form.render_replies(messages):
        if piece.reply and before:
            found[-1] += piece.text
        elif piece.reply:
            found.append(piece.text)
        before = piece.reply
    return tuple(found)


def test_replies_of_published_formats():
    assert {name: replies(form, TALK) for name, form in templates().items()} == REPLIES


# Formats with nothing that ends a reply before the end of the text: those of one request and its
# reply alone, and ChatGLM2's, whose rounds follow one another without a token between them.
WITHOUT_STOP = {"bare", "alpaca", "chatglm2"}
END = "</s>"  # of a document, as LLaMA's and Baichuan's tokenizers have it


def test_each_reply_ends_with_what_stops_it():
    """Else a model that has replied once does not learn to stop; the end of the text is no part."""
    ends = {
        name: replies(form, TALK)[0].endswith((*form.stop, *form.stop_strings, END))
        for name, form in templates().items()
    }
    assert {name for name, found in ends.items() if not found} == WITHOUT_STOP


@pytest.mark.parametrize("form", templates().values(), ids=templates())
def test_pieces_are_those_of_the_conversation(form):
    pieces = form.render_replies(TALK)
    text = "".join(piece.text for piece in pieces)
    assert text == "".join(piece.text for piece in form.render(TALK, reply=False))


def test_a_context_has_a_part_of_its_own_or_follows_the_request():
    asked = [Message("user", "Add.", context="1 2"), Message("assistant", "3")]
    alpaca, plain = (
        "".join(piece.text for piece in templates()[name].render_replies(asked))
        for name in ("alpaca", "plain")
    )
    assert alpaca.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:3")
    assert "paired with an input" in alpaca
    assert plain == "User: Add.\n\n1 2\n\nAssistant: 3\n\n"


# ---- folders' own templates ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By family: the folder's tokenizer and format."""
    found = {}
    for name, family in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        write_folder(folder, family)
        tokenizer = read_tokenizer(folder)
        found[name] = tokenizer, folder_format(folder, tokenizer)
    return found


TEXTS = [
    ("Hello", "Hi!", "Who are\nyou?", "A model."),
    ("<", "<", "</", "< "),
    ("\na", " b", "b ", "\n\né"),
    ("[INST] a", "[/b", "|<|im_end|>", "问\n"),
]


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_comes_before_a_reply_is_its_prompt(folders, name, texts):
    """The tokens before a reply are those that the model is given to write it.

    Before the second one the first is cut from its prompt, as whoever wrote it did; what is between
    them is the same.
    """
    tokenizer, form = folders[name]
    talk = [Message(one.role, text) for one, text in zip(TALK, texts, strict=True)]
    tokens, spans = form.encode_replies(tokenizer, form.render_replies(talk))
    assert len(spans) == 2
    stops, between = form.stop_tokens(tokenizer), 0
    for count, (first, end) in zip((1, 3), spans, strict=True):
        prompt = form.encode(tokenizer, talk[:count])
        assert tokenizer.decode(tokens[:first]) == tokenizer.decode(prompt)
        assert tokens[between:first] == prompt[len(prompt) - (first - between) :]
        assert tokens[end - 1] in stops or (form.stop_strings and count == 1)
        assert texts[count].strip() in tokenizer.decode(tokens[first:end])
        between = end


# Of llama3 the line breaks before a reply are one token in the prompt, and two with the reply.
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"llama3"}))
def test_the_tokens_of_a_conversation_are_those_of_its_text(folders, name):
    """Where no token goes across a border, as a whole conversation is encoded."""
    tokenizer, form = folders[name]
    whole = form.encode(tokenizer, TALK, reply=False)
    tokens, _ = form.encode_replies(tokenizer, form.render_replies(TALK))
    assert tokens in (whole, [*whole, tokenizer.end])


THINKING = (
    "{% for m in messages %}<s>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content and not loop.last %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n<think>\n{% endif %}"
)


def own(source, special=("<s>", "</s>"), **tokens):
    """A format of this template."""
    return JinjaFormat(source, "chat_template.jinja", frozenset(special), tokens)


def test_thoughts_that_a_template_drops_or_opens():
    """A reply begins where the conversation differs from what a model would be given."""
    form = own(THINKING)
    talk = [
        *(Message("user", "One"), Message("assistant", "<think>\nno\n</think>\n\nTwo")),
        *(Message("user", "Three"), Message("assistant", "<think>\nyes\n</think>\n\nFour")),
    ]
    assert replies(form, talk) == ("Two</s>", "yes\n</think>\n\nFour</s>")


def test_a_template_that_hides_its_replies_is_refused():
    form = own("{% for m in messages %}{{ m.content | upper | length }}</s>{% endfor %}")
    with pytest.raises(UserError, match="does not show where its replies are"):
        form.render_replies(TALK)


def test_no_token_goes_across_the_border_before_a_reply():
    class Pairs(ByteTokenizer):
        """Two line breaks are one token."""

        special: ClassVar = {"<s>": 257, "</s>": 258}
        vocab_size, end = 260, 258

        def encode_batch(self, texts):
            return [list(text.encode().replace(b"\n\n", b"\xff")) for text in texts]

    form = own("{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}")
    form = own(form.source + "{% if add_generation_prompt %}<s>assistant\n{% endif %}")
    talk = [Message("user", "\nx"), Message("assistant", "\ny")]
    tokens, [(first, end)] = form.encode_replies(Pairs(), form.render_replies(talk))
    assert tokens[:first] == form.encode(Pairs(), talk[:1])
    assert tokens[first:end] == [*b"\ny", 258]
    # Not so in the text of the user, which nobody has to write.
    assert 0xFF in tokens[:first]


def test_the_end_of_a_document_ends_a_reply_that_nothing_else_ends():
    form = ChatTemplate(user=("Q:{content}\n",), assistant=("A:", "{content}\n"))
    tokenizer = ByteTokenizer()
    tokens, spans = form.encode_replies(tokenizer, form.render_replies(TALK))
    assert tokens[-1] == tokenizer.end
    assert spans[-1].end == len(tokens)
    assert [tokenizer.decode(tokens[first:end]) for first, end in spans] == ["Hi!\n", "A model.\n"]
