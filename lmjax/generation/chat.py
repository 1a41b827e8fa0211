"""Chat formats written down as data: those of models whose folders do not spell them out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lmjax.config import UserError, config, preset
from lmjax.data.tokenizers import Piece, Tokenizer
from lmjax.generation.messages import ROLES, ChatFormat, Message

SLOTS = {"content": "", "metadata": "", "round": 1, "system": ""}


@config
class ChatTemplate(ChatFormat):
    """How a conversation becomes tokens.

    A role is a tuple of parts, each encoded by itself. A part is a special token or text with
    slots: {content}, {metadata}, {round} (1 at the first user message), and in a user's part
    {system}, if the system text goes into the first user message. No text of a message can become
    a special token. Where roles are plain text (falcon, chatglm2, plain) a message can imitate one.
    """

    special: tuple[str, ...] = ()  # parts that are special tokens
    start: tuple[str, ...] = ()  # parts before the first message
    system: tuple[str, ...] = ()  # parts of a system message; none: there is no such role
    user: tuple[str, ...] = ("{content}",)  # parts of a user message
    assistant: tuple[str, ...] = ("{content}",)  # parts of a reply; a prompt ends before its slots
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
        parts = [part for role in ROLES for part in getattr(self, role)]
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
        return next((name for name, known in TEMPLATES.items() if known == self), "of your own")

    def render(self, messages: Sequence[Message], reply: bool = True) -> list[Piece]:
        """See `ChatFormat.render`; UserError also for a forbidden text."""
        if not messages:
            raise UserError("chat: the conversation holds no message")
        if self.default_system and messages[0].role != "system":
            messages = [Message("system", self.default_system), *messages]
        pieces = self._fill(self.start)
        in_user = any("{system}" in part for part in self.user)
        system, number = "", 0
        last = max((n for n, message in enumerate(messages) if message.role == "user"), default=-1)
        for place, message in enumerate(messages):
            content = self._content(message)
            if self.thoughts and message.role == "assistant":
                content = self._thoughtful(content, place > last, place == len(messages) - 1)
            if message.role == "system" and in_user:
                system += "".join(piece.text for piece in self._fill(self.system, content=content))
                continue
            number += message.role == "user"
            pieces += self._fill(
                getattr(self, message.role),
                content=content,
                metadata=message.metadata,
                round=number,
                system=system,
            )
            if message.role == "user":
                system = ""
        if system:
            raise UserError("chat: this format needs a user message behind the system message")
        if reply:
            pieces += self._fill(self._opening())
        return _join(pieces) if self.joined else pieces

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], reply: bool = True
    ) -> list[int]:
        """See `ChatFormat.encode`; each piece is encoded by itself."""
        tokens: list[int] = []
        for piece in self.render(messages, reply):
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
        for text in self.forbidden:
            if text in message.content:
                raise UserError(f"chat: a message holds {text!r}, which marks roles in this format")
        content = message.content.strip() if self.strip else message.content
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

    def _fill(self, parts: Sequence[str], **slots: Any) -> list[Piece]:
        filled = [Piece(part.format(**SLOTS | slots), part in self.special) for part in parts]
        return [piece for piece in filled if piece.text]

    def _opening(self) -> list[str]:
        """The assistant's parts before the first one with a slot."""
        slot = next((n for n, part in enumerate(self.assistant) if "{" in part), None)
        return list(self.assistant[:slot])


def _join(pieces: Sequence[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in pieces:
        if joined and not piece.special and not joined[-1].special:
            joined[-1] = Piece(joined[-1].text + piece.text, False)
        else:
            joined.append(piece)
    return joined


def _special(tokenizer: Tokenizer, name: str) -> int:
    try:
        return tokenizer.special[name]
    except KeyError:
        raise UserError(
            f"chat: the tokenizer has no special token {name!r}; the format is of another model"
        ) from None


def _chatml(default_system: str, thoughts: tuple[str, str] | None = None) -> ChatTemplate:
    """ChatML as Qwen's models have it since the second: texts that meet are encoded together."""
    messages = {
        role: ("<|im_start|>", f"{role}\n", "{content}", "<|im_end|>", "\n")
        for role in ("system", "user", "assistant")
    }
    return ChatTemplate(
        special=("<|im_start|>", "<|im_end|>"),
        **messages,
        default_system=default_system,
        thoughts=thoughts,
        joined=True,
        stop=("<|im_end|>", "<|im_start|>"),
    )


TEMPLATES = {
    "plain": ChatTemplate(
        system=("{content}\n\n",),
        user=("User: {content}\n\n",),
        assistant=("Assistant:", " {content}\n\n"),
        joined=True,
        stop_strings=("\n\nUser:",),
    ),
    "chatml": ChatTemplate(
        special=("<|im_start|>", "<|im_end|>"),
        system=("<|im_start|>", "system", "\n", "{content}", "<|im_end|>", "\n"),
        user=("<|im_start|>", "user", "\n", "{content}", "<|im_end|>", "\n"),
        assistant=("<|im_start|>", "assistant", "\n", "{content}", "<|im_end|>", "\n"),
        default_system="You are a helpful assistant.",
        stop=("<|im_end|>", "<|im_start|>"),
    ),
    "qwen2": _chatml("You are a helpful assistant."),
    "qwen2.5": _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": _chatml("", thoughts=("<think>", "</think>")),
    "llama2": ChatTemplate(
        special=("<s>", "</s>"),
        system=("<<SYS>>\n{content}\n<</SYS>>\n\n",),
        user=("<s>", "[INST] {system}{content} [/INST]"),
        assistant=(" {content} ", "</s>"),
        joined=True,
        strip=True,
        forbidden=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    ),
    "mistral": ChatTemplate(
        special=("<s>", "</s>"),
        start=("<s>",),
        user=("[INST] {content} [/INST]",),
        assistant=(" {content}", "</s>"),
        joined=True,
        strip=True,
        forbidden=("[INST]", "[/INST]"),
    ),
    "gemma": ChatTemplate(
        special=("<bos>", "<start_of_turn>", "<end_of_turn>"),
        start=("<bos>",),
        user=("<start_of_turn>", "user\n{content}", "<end_of_turn>", "\n"),
        assistant=("<start_of_turn>", "model\n", "{content}", "<end_of_turn>", "\n"),
        joined=True,
        strip=True,
        stop=("<end_of_turn>",),
    ),
    "baichuan": ChatTemplate(
        special=("<reserved_102>", "<reserved_103>", "</s>"),
        user=("<reserved_102>", "{content}"),
        assistant=("<reserved_103>", "{content}", "</s>"),
        stop=("<reserved_102>",),
    ),
    "baichuan2": ChatTemplate(
        special=("<reserved_106>", "<reserved_107>"),
        system=("{content}",),
        user=("<reserved_106>", "{content}"),
        assistant=("<reserved_107>", "{content}"),
        stop=("<reserved_106>",),
    ),
    "falcon": ChatTemplate(
        user=("User: {content}\n\n",),
        assistant=("Assistant:", " {content}\n\n"),
        joined=True,
        stop_strings=("\nUser:",),
    ),
    "falcon_180b": ChatTemplate(
        system=("System: {content}\n",),
        user=("User: {content}\n",),
        assistant=("Falcon:", " {content}\n"),
        joined=True,
        stop_strings=("\nUser:",),
    ),
    "chatglm2": ChatTemplate(
        special=("[gMASK]", "sop"),
        start=("[gMASK]", "sop"),
        user=("[Round {round}]\n\n问：{content}\n\n答：",),
        assistant=("{content}\n\n",),
        joined=True,
    ),
    "chatglm3": ChatTemplate(
        special=("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        start=("[gMASK]", "sop"),
        system=("<|system|>", "{metadata}\n", "{content}"),
        user=("<|user|>", "{metadata}\n", "{content}"),
        assistant=("<|assistant|>", "{metadata}\n", "{content}"),
        observation=("<|observation|>", "{metadata}\n", "{content}"),
        tools="{content}\n{tools}",
        stop=("<|user|>", "<|observation|>"),
    ),
}


@preset
def chat_template(name: str) -> ChatTemplate:
    """A published chat format, by name; a format itself is given back as it is.

    plain is ours, for models trained on text alone. The others: chatml is the first Qwen's, falcon
    that of Falcon-7B and 40B, mistral that of Mistral-7B-Instruct v0.1 and v0.2, baichuan that of
    Baichuan-13B; the rest bear their models' names.

    Raises:
      UserError: an unknown name.
    """
    if isinstance(name, ChatFormat):
        return name
    if name not in TEMPLATES:
        raise UserError(f"there is no chat template {name!r}, only {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


# By family, the newest first: formats that its public chat models have if their folders do not say,
# and tokens that the tokenizers of just these models have besides those of the format.
PUBLISHED: dict[str, dict[str, tuple[str, ...]]] = {
    "qwen": {"chatml": ()},
    "qwen2": {"qwen2.5": ("<|object_ref_start|>",), "qwen2": ()},
    "qwen3": {"qwen3": ()},
    "gemma": {"gemma": ()},
    "gemma2": {"gemma": ()},
    "baichuan": {"baichuan": ()},
    "baichuan2": {"baichuan2": ()},
    "falcon": {"falcon": ()},
    "falcon_180b": {"falcon_180b": ()},
    "chatglm": {"chatglm3": (), "chatglm2": ()},
}
# Names to try where models of a family were trained in many formats, and nothing tells which.
LIKELY = {"llama": ("llama2", "LLaMA 2 Chat"), "mistral": ("mistral", "its Instruct v0.1 or v0.2")}


def fitting_template(family: str, tokenizer: Tokenizer) -> str:
    """The name of the chat format that a public model of this family was trained with.

    The newest one all of whose special tokens the tokenizer has.

    Raises:
      UserError: there is none, or the family's models were trained in many formats.
    """
    for name, besides in PUBLISHED.get(family, {}).items():
        if {*TEMPLATES[name].special, *besides} <= tokenizer.special.keys():
            return name
    name, model = LIKELY.get(family, ("plain", ""))
    fits = set(TEMPLATES[name].special) <= tokenizer.special.keys()
    likely = f" ({name} if it is {model})" if model and fits else ""
    raise UserError(
        f"no chat format is known for a {family} model with this tokenizer; give the name of one"
        f"{likely}: {', '.join(TEMPLATES)}"
    )
