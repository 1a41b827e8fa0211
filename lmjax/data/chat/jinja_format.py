"""Chat formats that a folder spells out: Jinja templates, rendered as transformers does."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from lmjax.config import UserError
from lmjax.data.chat.messages import (
    ChatFormat,
    Message,
    RenderedPiece,
    join_texts,
    text_of,
)
from lmjax.data.tokenizers import TextPiece, Tokenizer, cut_at_names, name_pattern

# Stands in the text of messages where no special token may be read; no text has this code point.
MARK = "\ufdd0"
END = "\ufdd1"  # stands after the text of a message where its end is looked for
SAFE_JINJA = (3, 1, 6)  # older sandboxes can be left
PROBE = "Replyprobe"  # an assistant's text that templates write as it is
PROBES = Message("user", "First"), Message("assistant", PROBE), Message("user", "Second")
TOOL_ROLE, GLM_ROLE = "tool", "observation"  # what templates call the role `observation`


@dataclasses.dataclass(frozen=True)
class JinjaFormat(ChatFormat):
    """A chat template in Jinja's language, rendered in a sandbox.

    Messages are encoded together with what the template writes around them, so an ordinary
    conversation has the tokens that transformers' `apply_chat_template` gives it. Names of special
    tokens in messages and tools stay text there, which they do not in transformers.

    Attributes:
      source: the template.
      title: what users are told that it is.
      special: names of the tokenizer's special tokens.
      tokens: those that the template knows under names of its own, such as eos_token.
      with_tools: the template of conversations with tools, where the folder has another for them.
    """

    source: str
    title: str = dataclasses.field(compare=False)
    special: frozenset[str]
    tokens: Mapping[str, str]
    with_tools: str | None = None

    def __post_init__(self) -> None:
        """Raises UserError for a template that is not one."""
        for source in filter(None, (self.source, self.with_tools)):
            self._compiled(source)

    def render(self, messages: Sequence[Message], reply: bool = True) -> list[TextPiece]:
        """See `ChatFormat.render`."""
        return join_texts(self._pieces(self._text(messages, reply)))

    def render_replies(self, messages: Sequence[Message]) -> list[RenderedPiece]:
        """See `ChatFormat.render_replies`.

        A reply begins where the template, asked for one, ends what comes before it, or where the
        whole conversation differs from that. It ends with the special token after its text.
        """
        text = self._text(messages, reply=False, ends=True)
        plain = self._text(messages, reply=False).replace(MARK, "")
        if text.replace(END, "").replace(MARK, "") != plain:
            raise UserError(f"chat: {self.title} does not show where its replies are")
        pieces, before = [], 0
        for first, end in self._replies(text, messages):
            for begin, stop, reply in ((before, first, False), (first, end, True)):
                found = self._pieces(text[begin:stop].replace(END, ""))
                pieces += [RenderedPiece(*piece, reply) for piece in join_texts(found)]
            before = end
        found = self._pieces(text[before:].replace(END, ""))
        return pieces + [RenderedPiece(*piece, False) for piece in join_texts(found)]

    def _replies(self, text: str, messages: Sequence[Message]) -> Iterator[tuple[int, int]]:
        """First character and one past the last of each reply in a rendered conversation."""
        before = 0  # characters up to the end of the message before
        for number, message in enumerate(messages):
            if message.role == "assistant" and number:
                asked, answered = (
                    self._text(messages[:count], reply, ends=True).rpartition(END)[2]
                    for count, reply in ((number, True), (number + 1, False))
                )
                following = text[before:]
                first = before + _common(asked, following)
                if message.content:
                    end = text.find(END, before)
                    end += len(self._reply_end.match(text, end).group())
                else:  # it calls tools alone
                    end = before + _common(answered, following)
                yield first, end
            if message.content:
                before = 1 + text.find(END, before)

    @functools.cached_property
    def _reply_end(self) -> re.Pattern[str]:
        """Pattern of the end of a reply's text, with what ends it: a special token, or a text."""
        names, texts = map(name_pattern, (self.special, self.stop_strings))
        return re.compile(rf"{END}(?:{texts}|\s*(?:{names})?)")

    def _pieces(self, text: str) -> list[TextPiece]:
        """A text cut at special tokens, none of which goes across a mark."""
        return [piece for part in text.split(MARK) for piece in cut_at_names(part, self.special)]

    def _tokens(self, tokenizer: Tokenizer, pieces: Sequence[TextPiece]) -> list[int]:
        """See `ChatFormat._tokens`."""
        return tokenizer.encode_pieces(join_texts(pieces))

    def stop_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """The tokenizer's end, and what the template writes right behind a reply."""
        return sorted({tokenizer.end, *(tokenizer.special[name] for name in self._ends[0])})

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The text between a reply and the next message, where no special token is."""
        return self._ends[1]

    @functools.cached_property
    def _ends(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Special tokens right behind replies, and text that is there instead."""
        first, reply, second = PROBES
        names, texts = [], []
        for talk in ([first, reply, second], [first, reply]):
            behind, following = self._behind_reply(talk)
            if behind.strip():
                texts.append(behind.split(second.content)[0].rstrip())
            elif following is not None:
                names.append(following)
        stops = (text for text in texts if len(text.strip()) > 1)
        return tuple(dict.fromkeys(names)), tuple(dict.fromkeys(stops))

    def _behind_reply(self, talk: Sequence[Message]) -> tuple[str, str | None]:
        """The text behind the probe, and the special token behind that."""
        for system in ([], [Message("system", "System probe")]):  # some want one
            try:
                pieces = self.render([*system, *talk], reply=False)
            except UserError:
                continue
            for piece, following in pairwise([*pieces, TextPiece("", False)]):
                if PROBE in piece.text:
                    behind = piece.text.rpartition(PROBE)[2]
                    return behind, following.text if following.special else None
        return "", None

    # ---- text ----------------------------------------------------------------------------------

    def _text(self, messages: Sequence[Message], reply: bool, ends: bool = False) -> str:
        """The rendered conversation, with a mark wherever messages would forge a special token.

        With `ends` there is an `END` after the text of each message, before white space.
        """
        if not messages:
            raise UserError("chat: the conversation holds no message")
        tools = [tool for message in messages for tool in message.tools]
        bare = [message for message in messages if message.content or not message.tools]
        variables = {
            "messages": [self._entry(message, ends) for message in bare],
            "tools": self._marked(tools) or None,
            "documents": None,
            "add_generation_prompt": reply,
        }
        source = self.with_tools if tools and self.with_tools else self.source
        try:
            return self._compiled(source).render(**self.tokens, **variables)
        except UserError:
            raise
        except Exception as error:  # whatever a foreign template does wrong
            raise UserError(f"chat: {self.title} fails: {error or type(error).__name__}") from None

    def _entry(self, message: Message, end: bool = False) -> dict[str, Any]:
        """A message as templates read it."""
        if not message.role.isidentifier():
            raise UserError(f"chat: {message.role!r} is no name of a role")
        role = self._tool_role if message.role == "observation" else message.role
        content = text_of(message)
        said = content.rstrip()
        marked = self._marked(content)
        if end and content:
            marked = self._marked(said) + END + self._marked(content[len(said) :])
        entry: dict[str, Any] = {"role": role, "content": marked}
        if message.metadata:
            entry["metadata"] = self._marked(message.metadata)
        if message.calls:
            entry["tool_calls"] = [
                {"type": "function", "function": self._marked(call._asdict())}
                for call in message.calls
            ]
        return entry

    @functools.cached_property
    def _tool_role(self) -> str:
        """The template's name of the role `observation`: GLM's is the same, most say tool."""
        sources = f"{self.source} {self.with_tools}"
        named = {name for _, name in re.findall(r"""(['"])(\w+)\1""", sources)}
        glm = GLM_ROLE in named or f"<|{GLM_ROLE}|>" in self.special
        return GLM_ROLE if glm and TOOL_ROLE not in named else TOOL_ROLE

    def _marked(self, value: Any) -> Any:
        """A JSON value whose texts have marks inside the names of special tokens."""
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping):
            return {self._inside(key): self._marked(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(inner) for inner in value]
        if not isinstance(value, str):
            raise UserError(f"chat: {value!r} is no JSON value")
        # With what the template writes beside it, the end of a text may make a name.
        heads, tails = self._halves
        return MARK * value.startswith(tails) + self._inside(value) + MARK * value.endswith(heads)

    def _inside(self, text: str) -> str:
        if MARK in text or END in text:
            raise UserError("chat: a text holds U+FDD0 or U+FDD1, which are no characters")
        return self._starts.sub(rf"\1{MARK}", text)

    @functools.cached_property
    def _starts(self) -> re.Pattern[str]:
        """The first character of the name of a special token, also inside another name."""
        return re.compile(f"(?={name_pattern(self.special)})(.)", re.DOTALL)

    @functools.cached_property
    def _halves(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Beginnings and endings of the names of special tokens."""
        cuts = [(name, length) for name in self.special for length in range(1, len(name))]
        heads = {name[:length] for name, length in cuts}
        tails = {name[length:] for name, length in cuts}
        return tuple(heads), tuple(tails)

    def _compiled(self, source: str) -> Any:
        jinja2, _ = _environment()
        try:
            return _template(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"chat: {self.title} is no template: {error.message} (line {error.lineno})"
            ) from None


def _common(one: str, other: str) -> int:
    """Length of the beginning that two texts share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


@functools.lru_cache(64)
def _template(source: str) -> Any:
    """A compiled template: compiling takes far longer than a conversation does."""
    return _environment()[1].from_string(source)


@functools.cache
def _environment() -> tuple[Any, Any]:
    """The jinja2 package, and a sandbox with what transformers gives templates."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise UserError(
            "the folder's own chat template needs the package jinja2: pip install 'lmjax[chat]'"
        ) from None
    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < SAFE_JINJA:
        raise UserError(f"chat: jinja2 {jinja2.__version__} is unsafe: pip install 'lmjax[chat]'")

    class Generation(jinja2.ext.Extension):
        """The tag `generation`, which marks what an assistant says for training."""

        tags: ClassVar = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """Without names that lead into Python."""

        def __init__(*self_and_pairs: Any, **values: Any) -> None:
            self, *pairs = self_and_pairs
            jinja2.utils.Namespace.__init__(self)
            for name, value in dict(*pairs, **values).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace may not have {name!r}")
            super().__setitem__(name, value)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": _Dictionaries(),
        "namespace": Namespace,
    }
    return jinja2, environment


class _Dictionaries:
    """`dict` for templates, which is no class there."""

    def __call__(self, *pairs: Any, **values: Any) -> dict:
        return dict(*pairs, **values)

    def fromkeys(self, *arguments: Any) -> dict:
        """As Python's."""
        return dict.fromkeys(*arguments)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escapes for web pages."""
    text = json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    if ensure_ascii:
        for mark in (MARK, END):
            text = text.replace(json.dumps(mark)[1:-1], mark)
    return text


def _refuse(message: str) -> None:
    """Function that templates call for conversations that they do not take."""
    raise UserError(f"chat: the folder's template refuses the conversation: {message}")
