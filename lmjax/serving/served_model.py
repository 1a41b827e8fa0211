"""A model that is served: from bodies of requests to prompts, settings and constraints."""

from __future__ import annotations

import dataclasses
import functools
import json
import secrets
from collections.abc import Sequence
from typing import Any

from lmjax.config import UserError, replace
from lmjax.data.chat.messages import ChatFormat
from lmjax.generation.embeddings import LoadedStates
from lmjax.generation.prompts import SMALLEST, round_up
from lmjax.generation.sampling import Sampling
from lmjax.generation.stream import TextStream
from lmjax.generation.text import TextGenerator, prompt_tokens
from lmjax.serving.conversation import calls_schema, read_messages
from lmjax.serving.grammar import GrammarMaker
from lmjax.serving.replicas import AnyEngine
from lmjax.serving.request import TokenConstraint, TokenRequest
from lmjax.serving.schemas import ChatBody, CompletionBody, DrawingBody, WritingBody
from lmjax.serving.worker import Worker

ANY_OBJECT = {"type": "object"}
SEEDS = 2**31


@dataclasses.dataclass(frozen=True)
class PreparedText:
    """A prompt that is ready for the engine, for several answers.

    Attributes:
      requests: one for each answer.
      stop: strings that end the answers.
      at_start: the answers begin a text.
    """

    requests: list[TokenRequest]
    stop: tuple[str, ...]
    at_start: bool

    def stream(self, model: ServedModel) -> TextStream:
        """Text of one of the answers."""
        return TextStream(model.text.tokenizer, self.stop, self.at_start)


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model with what serves it.

    Attributes:
      name: of the model; adapters have their own.
      text: the model, and its tokenizer.
      worker: has the devices; an engine, or replicas of it, where the model continues texts.
      chat: the format of conversations; where there is none, why.
      most_tokens: most tokens of an answer.
    """

    name: str
    text: TextGenerator
    worker: Worker | AnyEngine
    chat: ChatFormat | str
    most_tokens: int

    @property
    def engine(self) -> AnyEngine:
        """The engine. UserError for a model that does not continue texts."""
        if isinstance(self.worker, AnyEngine):
            return self.worker
        raise UserError(f"{self.name} fills blanks, and continues no text: use /v1/fill")

    @property
    def names(self) -> list[str]:
        """Names that requests may call for."""
        return self.worker.models if isinstance(self.worker, AnyEngine) else [self.name]

    @functools.cached_property
    def states(self) -> LoadedStates:
        """The model as it reads whole texts."""
        return LoadedStates(self.text)

    @functools.cached_property
    def grammars(self) -> GrammarMaker:
        """Makes constraints. UserError where llguidance is not installed."""
        try:
            return GrammarMaker(self.text.tokenizer, self.text.generator.config.vocab_size)
        except ImportError:
            raise UserError(
                "this server has no grammars: pip install 'lmjax[serve]' (llguidance)"
            ) from None

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest text."""
        return self.text.generator.config.max_length

    def chat_tokens(self, body: ChatBody) -> list[int]:
        """The prompt of a conversation. UserError: it cannot be expressed."""
        if isinstance(self.chat, str):
            raise UserError(self.chat)
        return self.chat.encode(self.text.tokenizer, read_messages(body, self.chat))

    def prepare_chat(self, body: ChatBody, client: str) -> list[PreparedText]:
        """The one prompt of a conversation.

        Raises:
          UserError: a conversation, or settings, that the model cannot answer.
        """
        tokens, given = self.chat_tokens(body), _strings(body.stop)
        ends = sorted({*self.chat.stop_tokens(self.text.tokenizer), *self.text.stop_tokens(given)})
        stop = (*given, *self.chat.stop_strings)
        if body.top_logprobs is not None and not body.logprobs:
            raise UserError("top_logprobs: it needs logprobs=true")
        schema = self._schema(body)
        requests = self._requests(
            tokens,
            body,
            self._most(body.max_completion_tokens or body.max_tokens, len(tokens)),
            ends,
            client,
            tops=body.top_logprobs or 0,
            schema=schema,
        )
        return [PreparedText(requests, stop, at_start=True)]

    def prepare_completion(self, body: CompletionBody, client: str) -> list[PreparedText]:
        """The prompts of a completion. UserError: as `prepare_chat`."""
        if body.suffix:
            raise UserError("suffix: the model continues texts alone; leave it out")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise UserError("best_of: must be as n, or be left out")
        prompt, stop = body.prompt, _strings(body.stop)
        prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        ends, found = self.text.stop_tokens(stop), []
        for one in prompts:
            tokens = one if not isinstance(one, str) else prompt_tokens(self.text.tokenizer, one)
            most = self._most(16 if body.max_tokens is None else body.max_tokens, len(tokens))
            requests = self._requests(
                tokens,
                body,
                most,
                ends,
                client,
                first=len(found) * (body.n or 1),
                tops=body.logprobs or 0,
                score_prompt=bool(body.echo) and body.logprobs is not None,
            )
            found.append(PreparedText(requests, stop, at_start=not one))
        return found

    def _most(self, asked: int | None, length: int) -> int:
        """Most tokens of an answer. UserError where more are asked for than are allowed."""
        if asked is not None and asked > self.most_tokens:
            raise UserError(f"max_tokens={asked}: this server allows {self.most_tokens} at most")
        return self.most_tokens if asked is None else asked

    def _requests(
        self,
        tokens: Sequence[int],
        body: WritingBody,
        most: int,
        ends: Sequence[int],
        client: str,
        first: int = 0,
        schema: tuple[str, dict[str, Any]] | None = None,
        **settings: Any,
    ) -> list[TokenRequest]:
        sampling, count = drawing(body), body.n or 1
        try:
            bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        except ValueError:
            raise UserError("logit_bias: its keys are ids of tokens") from None
        base = TokenRequest(
            tokens=list(tokens),
            sampling=sampling,
            max_tokens=most,
            stop_tokens=tuple(ends),
            model=body.model or self.name,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=bias,
            client=body.user or client,
            **settings,
        )
        return [
            dataclasses.replace(
                base,
                sampling=replace(sampling, seed=(sampling.seed + first + number) % SEEDS),
                constraint=self._constraint(schema, ends),
            )
            for number in range(count)
        ]

    def _schema(self, body: ChatBody) -> tuple[str, dict[str, Any]] | None:
        """The schema that an answer is bound to, and the parameter that it comes from."""
        calls, form = calls_schema(body), body.response_format
        if calls is not None:
            return "tools", calls
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return "response_format", ANY_OBJECT
        if form.json_schema is None:
            raise UserError("response_format: json_schema is missing")
        return "response_format", form.json_schema.schema_

    def _constraint(
        self, schema: tuple[str, dict[str, Any]] | None, ends: Sequence[int]
    ) -> TokenConstraint | None:
        if schema is None:
            return None
        try:
            return self.grammars.of_schema(schema[1], ends)
        except UserError as error:
            raise UserError(f"{schema[0]}: {error}") from None

    def token_text(self, token: int) -> tuple[str, list[int]]:
        """A token as text and as bytes; a special one by its name."""
        data = self.text.tokenizer.token_bytes(token) or self._special.get(token, "").encode()
        return data.decode("utf-8", "replace"), list(data)

    def named_text(self, tokens: Sequence[int]) -> str:
        """Text of tokens, with the names of special ones in it."""
        special, tokenizer = self._special, self.text.tokenizer
        parts = (
            special.get(token, "").encode() or tokenizer.token_bytes(token) for token in tokens
        )
        return b"".join(parts).decode("utf-8", "replace")

    @functools.cached_property
    def _special(self) -> dict[int, str]:
        return {token: name for name, token in self.text.tokenizer.special.items()}

    def embed(self, texts: Sequence[str]) -> tuple[list[Any], int]:
        """A vector for each text, and the number of tokens; in the worker's thread.

        Raises:
          UserError: a text longer than the context.
        """
        tokenizer = self.text.tokenizer
        opening = len(tokenizer.opening)
        lengths = [opening + max(1, len(tokens)) for tokens in tokenizer.encode_batch(list(texts))]
        most = self.max_length
        if most is not None and max(lengths) > most:
            raise UserError(f"input: a text has {max(lengths)} tokens, more than {most}")
        length = round_up(max(*lengths, SMALLEST))
        rows = 1 << (len(texts) - 1).bit_length()
        found = self.states.vectors(texts, rows, length if most is None else min(length, most))
        return list(found), sum(lengths)


def drawing(body: DrawingBody) -> Sampling:
    """The way that tokens are chosen; without a seed, with one of chance."""
    top_p = None if body.top_p in (None, 1.0) else body.top_p
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k,
        top_p=top_p,
        min_p=body.min_p or None,
        repetition_penalty=body.repetition_penalty or 1.0,
        seed=secrets.randbelow(SEEDS) if body.seed is None else body.seed,
    )


def _strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """Stop strings. UserError for an empty one."""
    found = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in found:
        raise UserError("stop: an empty string stands everywhere; leave it out")
    return found


def arguments_text(arguments: Any) -> str:
    """Arguments of a call as the JSON text that clients read."""
    return json.dumps(arguments, ensure_ascii=False)
