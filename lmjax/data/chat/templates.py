"""Chat formats written down as data: what their parts are, and how they become tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmjax.config import UserError, config
from lmjax.data.chat.messages import ROLES, ChatFormat, Message, RenderedPiece, join_texts, text_of
from lmjax.data.tokenizers import TextPiece, Tokenizer

SLOTS = {"content": "", "context": "", "metadata": "", "round": 1, "system": ""}


@config
class ChatTemplate(ChatFormat):
    """Template that turns a conversation into tokens.

    A role is a tuple of parts, each encoded by itself. A part is a special token or text with
    slots: {content}, {metadata}, {round} (1 at the first user message), and in a user's part
    {system}, if the system text goes into the first user message, or {context}. No text of a
    message can become a special token. Where roles are plain text (falcon, chatglm2, plain) a
    message can imitate one.
    """

    special: tuple[str, ...] = ()  # parts that are special tokens
    start: tuple[str, ...] = ()  # parts before the first message
    system: tuple[str, ...] = ()  # parts of a system message; none: there is no such role
    user: tuple[str, ...] = ("{content}",)  # parts of a user message
    assistant: tuple[str, ...] = ("{content}",)  # parts of a reply; a prompt ends before its slots
    user_with_context: tuple[str, ...] = ()  # parts of one with a context; none: it is added to it
    observation: tuple[str, ...] = ()  # parts of a tool's result; none: there is no such role
    default_system: str = ""  # system text where the conversation does not begin with one
    tools: str = ""  # system text with slots {content} and {tools}, a JSON list; empty: no tools
    joined: bool = False  # texts that meet are encoded together, also across messages
    strip: bool = False  # drop white space around messages
    # what begins and ends an assistant's thoughts; kept are those behind the last user message
    thoughts: tuple[str, str] | None = None
    stop: tuple[str, ...] = ()  # special tokens that end a reply, besides the end of a document
    stop_strings: tuple[str, ...] = ()  # texts that end a reply
    forbidden: tuple[str, ...] = ()  # what no message may hold, as it would imitate a role

    def validate(self) -> None:
        """Raise UserError for a slot that there is not."""
        parts = [part for role in (*ROLES, "user_with_context") for part in getattr(self, role)]
        for part, slots in [(p, SLOTS) for p in parts] + [(self.tools, {"content": 0, "tools": 0})]:
            try:
                part.format(**slots)
            except (KeyError, IndexError, ValueError) as error:
                known = ", ".join(f"{{{name}}}" for name in slots)
                raise UserError(
                    f"chat template: {part!r} is wrong ({error}); slots: {known}"
                ) from None

    @property
    def title(self) -> str:
        """See `ChatFormat`."""
        return _names.get(self, "your own template")

    def render(self, messages: Sequence[Message], reply: bool = True) -> list[TextPiece]:
        """See `ChatFormat.render`; UserError also for a forbidden text."""
        pieces = [TextPiece(piece.text, piece.special) for piece in self.render_replies(messages)]
        if reply:
            pieces += self._fill(self._assistant_parts[0])
        return join_texts(pieces) if self.joined else pieces

    def render_replies(self, messages: Sequence[Message]) -> list[RenderedPiece]:
        """See `ChatFormat.render_replies`.

        Where no special token follows a reply's text, one of `stop` that begins the next message
        ends it.
        """
        if not messages:
            raise UserError("chat: the conversation holds no message")
        if self.default_system and messages[0].role != "system":
            messages = [Message("system", self.default_system), *messages]
        pieces = [RenderedPiece(*piece, False) for piece in self._fill(self.start)]
        for message, parts, slots in self._with_slots(messages):
            if message.role == "assistant":
                opening, reply, rest = (self._fill(p, **slots) for p in self._assistant_parts)
                pieces += [RenderedPiece(*piece, False) for piece in opening]
                pieces += [RenderedPiece(*piece, True) for piece in reply]
                pieces += [RenderedPiece(*piece, False) for piece in rest]
                continue
            found = [RenderedPiece(*piece, False) for piece in self._fill(parts, **slots)]
            if found and pieces and pieces[-1].reply:
                found = self._end_reply(pieces[-1], found)
            pieces += found
        return pieces

    def _end_reply(
        self, reply: RenderedPiece, following: list[RenderedPiece]
    ) -> list[RenderedPiece]:
        """The pieces of the message after a reply, whose beginning may be what ends the reply."""
        first, *rest = following
        if reply.special:
            return following
        if first.special:
            return [first._replace(reply=first.text in self.stop), *rest]
        for stop in self.stop_strings:
            for cut in range(len(stop)):
                if reply.text.endswith(stop[:cut]) and first.text.startswith(stop[cut:]):
                    end, text = len(stop) - cut, first.text
                    pieces = (text[:end], True), (text[end:], False)
                    return [RenderedPiece(part, False, is_end) for part, is_end in pieces] + rest
        return following

    def _with_slots(
        self, messages: Sequence[Message]
    ) -> Iterator[tuple[Message, tuple[str, ...], Mapping[str, Any]]]:
        """The messages that have parts of their own, with these, and what their slots hold."""
        in_user = any("{system}" in part for part in self.user)
        system, number = "", 0
        last = max((n for n, message in enumerate(messages) if message.role == "user"), default=-1)
        for index, message in enumerate(messages):
            content = self._content(message)
            if self.thoughts and message.role == "assistant":
                content = self._thoughtful(content, index > last, index == len(messages) - 1)
            if message.role == "system" and in_user:
                system += "".join(piece.text for piece in self._fill(self.system, content=content))
                continue
            number += message.role == "user"
            parts = getattr(self, message.role)
            if message.context and self.user_with_context:
                parts = self.user_with_context
            slots = {
                "content": content,
                "context": message.context,
                "metadata": message.metadata,
                "round": number,
                "system": system,
            }
            yield message, parts, slots
            if message.role == "user":
                system = ""
        if system:
            raise UserError("chat: this format needs a user message behind the system message")

    def _tokens(self, tokenizer: Tokenizer, pieces: Sequence[TextPiece]) -> list[int]:
        """See `ChatFormat._tokens`; each piece is encoded by itself."""
        tokens: list[int] = []
        for piece in join_texts(pieces) if self.joined else pieces:
            if piece.special:
                tokens.append(_special(tokenizer, piece.text))
            else:
                tokens += tokenizer.encode(piece.text)
        return tokens

    def stop_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens that end a reply. UserError if the tokenizer lacks one."""
        return sorted({tokenizer.end, *(_special(tokenizer, name) for name in self.stop)})

    def read_reply(self, text: str) -> Message:
        """See `ChatFormat.read_reply`; with its metadata where the format has them."""
        if any("{metadata}" in part for part in self.assistant):
            metadata, _, text = text.partition("\n")
            return Message("assistant", text.strip(), metadata.strip())
        return super().read_reply(text)

    def _content(self, message: Message) -> str:
        """A message's text, with its tools; UserError for what the format cannot express."""
        parts = getattr(self, message.role) if message.role in ROLES else ()
        if not parts:
            known = ", ".join(role for role in ROLES if getattr(self, role))
            raise UserError(f"chat: no role {message.role!r} in this format, only {known}")
        if message.metadata and not any("{metadata}" in part for part in parts):
            raise UserError(f"chat: this format has no place for metadata ({message.metadata!r})")
        if message.calls:
            raise UserError("chat: this format has no place for calls of tools")
        if "\n" in message.metadata:
            raise UserError(f"chat: metadata is one line, not {message.metadata!r}")
        content = message.content if self.user_with_context else text_of(message)
        for text in self.forbidden:
            if text in content or text in message.context:
                raise UserError(f"chat: a message holds {text!r}, which marks roles in this format")
        content = content.strip() if self.strip else content
        if not message.tools:
            return content
        if not self.tools or message.role != "system":
            raise UserError(f"chat: a {message.role} message has no place for tools in this format")
        tools = json.dumps(list(message.tools), ensure_ascii=False, indent=4)
        return self.tools.format(content=content, tools=tools)

    def _thoughtful(self, reply: str, kept: bool, last: bool) -> str:
        """A reply without its thoughts, or with them as the format has them, none for the last."""
        begin, end = self.thoughts
        thought, found, answer = reply.rpartition(end)
        thought = thought.rpartition(begin)[2].strip("\n")
        if kept and (thought or last):
            return f"{begin}\n{thought}\n{end}\n\n" + answer.lstrip("\n")
        return answer.lstrip("\n") if found else answer

    def _fill(self, parts: Sequence[str], **slots: Any) -> list[TextPiece]:
        filled = [TextPiece(part.format(**SLOTS | slots), part in self.special) for part in parts]
        return [piece for piece in filled if piece.text]

    @property
    def _assistant_parts(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """The assistant's parts: before the first slot, of the reply and its end, and the rest."""
        parts = self.assistant
        slot = next((n for n, part in enumerate(parts) if "{" in part), len(parts))
        after = range(slot, len(parts))
        end = next((n + 1 for n in after if parts[n] in self.special), len(parts))
        return parts[:slot], parts[slot:end], parts[end:]


def _special(tokenizer: Tokenizer, name: str) -> int:
    try:
        return tokenizer.special[name]
    except KeyError:
        raise UserError(
            f"chat: the tokenizer has no special token {name!r}; the format is of another model"
            " (to train one, data.tokenizer='WithTokens(tokens=(...))' adds such tokens)"
        ) from None


PLAIN = ChatTemplate(
    system=("{content}\n\n",),
    user=("User: {content}\n\n",),
    assistant=("Assistant:", " {content}\n\n"),
    joined=True,
    stop_strings=("\n\nUser:",),
)

_names = {PLAIN: "plain"}  # of formats, as `title` gives them


def name_template(template: ChatTemplate, name: str) -> None:
    """Makes a name the format's title."""
    _names[template] = name
