"""Answers in the shapes of OpenAI's interface: whole, and as the chunks of a stream."""

from __future__ import annotations

import abc
import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any

from lmjax.data.chat.messages import ToolCall
from lmjax.serving.conversation import read_calls, read_python_call, writes_python
from lmjax.serving.request import ScoredToken
from lmjax.serving.schemas import ChatBody, CompletionBody
from lmjax.serving.served_model import ServedModel, arguments_text
from lmjax.serving.text_answer import AnswerPiece

Json = dict[str, Any]


@dataclasses.dataclass
class WholeAnswer:
    """An answer as it comes together from its pieces.

    Attributes:
      text: so far.
      tokens: so far.
      prompt: see `AnswerPiece`.
      cached: see `AnswerPiece`.
      reason: why it ended.
    """

    text: str = ""
    tokens: list[ScoredToken] = dataclasses.field(default_factory=list)
    prompt: list[ScoredToken] = dataclasses.field(default_factory=list)
    cached: int = 0
    reason: str | None = None

    def add(self, piece: AnswerPiece) -> None:
        """Adds what is new."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.prompt += piece.prompt
        self.cached += piece.cached or 0
        self.reason = piece.reason or self.reason


class CallReply(abc.ABC):
    """Base of the shapes of one call's answers.

    Attributes:
      answers: what has come of each, so far.
    """

    kind: str  # of the whole
    chunk_kind: str
    prefix: str

    def __init__(self, model: ServedModel, name: str, lengths: Sequence[int], count: int):
        """Takes the lengths of the prompts, and the number of answers to each."""
        self.model, self.name = model, name
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self._lengths = lengths
        self.answers = [WholeAnswer() for _ in range(len(lengths) * count)]

    def usage(self) -> Json:
        """Counts of tokens."""
        prompt, written = sum(self._lengths), sum(len(one.tokens) for one in self.answers)
        cached = sum(one.cached for one in self.answers[:: self._count])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    @property
    def _count(self) -> int:
        return len(self.answers) // len(self._lengths)

    def whole(self) -> Json:
        """All answers, when they have ended."""
        choices = [self.choice(index) for index in range(len(self.answers))]
        return {**self._head(self.kind), "choices": choices, "usage": self.usage()}

    def chunk(self, choices: Sequence[Json], usage: Json | None = None) -> Json:
        """A part of a stream."""
        more = {} if usage is None else {"usage": usage}
        return {**self._head(self.chunk_kind), "choices": list(choices), **more}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def begin(self, index: int) -> list[Json]:
        """Choices of the chunks before an answer's text."""
        return []

    @abc.abstractmethod
    def choice(self, index: int) -> Json:
        """An answer that has ended."""

    @abc.abstractmethod
    def delta(self, piece: AnswerPiece) -> Json | None:
        """The choice of a chunk, of what is new of an answer; None where nothing is shown of it.

        The piece is in `answers` already.
        """


class ChatReply(CallReply):
    """Answers of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: ServedModel, body: ChatBody, lengths: Sequence[int]):
        super().__init__(model, body.model or model.name, lengths, body.n or 1)
        self._logprobs = bool(body.logprobs)
        self._tools = [tool.function.name for tool in body.tools or ()]
        if body.tool_choice == "none":
            self._tools = []

    def begin(self, index: int) -> list[Json]:
        """See `CallReply.begin`."""
        return [_choice(index, {"delta": {"role": "assistant", "content": ""}}, None)]

    def choice(self, index: int) -> Json:
        """See `CallReply.choice`."""
        answer = self.answers[index]
        text, calls = self._read(answer)
        message: Json = {"role": "assistant", "content": text}
        if calls:
            message |= {"content": text or None, "tool_calls": [_call(call) for call in calls]}
        reason = "tool_calls" if calls else answer.reason
        return _choice(index, {"message": message}, reason, self._scores(answer.tokens))

    def delta(self, piece: AnswerPiece) -> Json | None:
        """See `CallReply.delta`; where tools may be called, the text comes when it is whole."""
        index, reason = piece.index, piece.reason
        if not self._tools:
            if not (piece.text or piece.tokens or reason):
                return None
            delta: Json = {"content": piece.text} if piece.text or piece.tokens else {}
            return _choice(index, {"delta": delta}, reason, self._scores(piece.tokens))
        if reason is None:
            return None
        answer = self.answers[index]
        text, calls = self._read(answer)
        delta = {"content": text} if text else {}
        if calls:
            numbered = [{"index": n, **_call(call)} for n, call in enumerate(calls)]
            delta["tool_calls"] = numbered
        reason = "tool_calls" if calls else reason
        return _choice(index, {"delta": delta}, reason, self._scores(answer.tokens))

    def _read(self, answer: WholeAnswer) -> tuple[str, list[ToolCall]]:
        """The text of an answer, and the calls in it."""
        if not self._tools:
            return answer.text, []
        if writes_python(self.model.chat):
            return read_python_call(answer.text, self._tools, self.model.chat)
        named = self.model.named_text([token.token for token in answer.tokens])
        text, calls = read_calls(named, self._tools)
        return (text, calls) if calls else (answer.text, [])

    def _scores(self, tokens: Sequence[ScoredToken]) -> Json | None:
        if not self._logprobs:
            return None
        return {"content": [self._score(token) for token in tokens], "refusal": None}

    def _score(self, token: ScoredToken) -> Json:
        def one(number: int, score: float) -> Json:
            text, data = self.model.token_text(number)
            return {"token": text, "logprob": _finite(score), "bytes": data}

        tops = [one(*top) for top in token.tops]
        return {**one(token.token, token.log_probability), "top_logprobs": tops}


class CompletionReply(CallReply):
    """Answers of /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: ServedModel, body: CompletionBody, prompts: Sequence[Sequence[int]]):
        super().__init__(model, body.model or model.name, list(map(len, prompts)), body.n or 1)
        self._logprobs, self._echo = body.logprobs is not None, bool(body.echo)
        self._prompts = [self._echoed(body, number, one) for number, one in enumerate(prompts)]
        self._offsets = [0] * len(self.answers)

    def _echoed(self, body: CompletionBody, number: int, tokens: Sequence[int]) -> str:
        """A prompt as it is shown before its answers."""
        prompt = body.prompt if isinstance(body.prompt, str) else body.prompt[number]
        return prompt if isinstance(prompt, str) else self.model.named_text(tokens)

    def begin(self, index: int) -> list[Json]:
        """See `CallReply.begin`; the prompt, where it is shown and its probabilities are not."""
        if not self._echo or self._logprobs:
            return []
        return [_choice(index, {"text": self._prompt(index)}, None)]

    def _prompt(self, index: int) -> str:
        return self._prompts[index // self._count]

    def choice(self, index: int) -> Json:
        """See `CallReply.choice`."""
        answer, before = self.answers[index], self._prompt(index) if self._echo else ""
        scores = self._scores(index, [*answer.prompt, *answer.tokens])
        return _choice(index, {"text": before + answer.text}, answer.reason, scores)

    def delta(self, piece: AnswerPiece) -> Json | None:
        """See `CallReply.delta`."""
        text = piece.text
        if self._echo and self._logprobs and piece.cached is not None:
            text = self._prompt(piece.index)
        tokens = [*piece.prompt, *piece.tokens]
        if not (text or tokens or piece.reason):
            return None
        return _choice(piece.index, {"text": text}, piece.reason, self._scores(piece.index, tokens))

    def _scores(self, index: int, tokens: Sequence[ScoredToken]) -> Json | None:
        """Probabilities; offsets count the characters of the tokens so far."""
        if not self._logprobs:
            return None
        found: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            text, _ = self.model.token_text(token.token)
            found["tokens"].append(text)
            score = token.log_probability
            found["token_logprobs"].append(None if score is None else _finite(score))
            tops = {self.model.token_text(n)[0]: _finite(value) for n, value in token.tops}
            found["top_logprobs"].append(tops or None)
            found["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(text)
        return found


def _choice(index: int, value: Json, reason: str | None, scores: Json | None = None) -> Json:
    return {"index": index, **value, "logprobs": scores, "finish_reason": reason}


def _call(call: ToolCall) -> Json:
    """A call of a tool in OpenAI's form."""
    function = {"name": call.name, "arguments": arguments_text(call.arguments)}
    return {"id": f"call_{secrets.token_hex(8)}", "type": "function", "function": function}


def _finite(score: float) -> float:
    """A log-probability that JSON can write."""
    return max(score, -9999.0)
