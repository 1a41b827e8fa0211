"""Models that reply to one message: behind an OpenAI-compatible endpoint, or in a local folder."""

from __future__ import annotations

import abc
import functools
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from lmjax.config import UserError, config, to_json

LARGEST = 1 << 23  # bytes of a reply that is read
LONGEST_WAIT = 60.0  # seconds between two attempts
SHOWN = 300  # characters of a server's message
AGAIN = {408, 409, 425, 429}  # and all from 500 on: the next attempt may succeed
BEHIND_THOUGHTS = "</think>"


@config
class ReplyModel(abc.ABC):
    """Base of the models that are asked something."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that its replies depend on, as JSON values, without keys."""
        return json.loads(to_json(self))

    @abc.abstractmethod
    def reply(self, message: str) -> str:
        """The reply to a message, without the model's thoughts.

        Raises:
          UserError: there is none.
        """


@config
class ChatEndpoint(ReplyModel):
    """A model behind an endpoint for chat completions, as OpenAI, vLLM, llama.cpp and ours have.

    Attempts that fail for a time, of connections, limits of rates and errors of the server, are
    made again, after 1, 2, 4, ... seconds or as many as the server says.
    """

    address: str = ""  # such as https://api.openai.com/v1 or http://127.0.0.1:8000/v1
    model: str = ""  # its name there
    key_variable: str | None = "OPENAI_API_KEY"  # environment variable with the key; none: no key
    temperature: float | None = 0.0  # none: the server's usual one
    max_tokens: int | None = 1024  # most tokens of a reply; none: the server's limit
    timeout: float = 120.0  # seconds without a byte
    attempts: int = 6  # before giving up

    def validate(self) -> None:
        """Raises UserError for settings that reach nothing."""
        if not self.address.startswith(("http://", "https://")):
            raise UserError(f"address={self.address!r}: give http://... or https://...")
        if not self.model:
            raise UserError("model is empty: give the name of a model that the endpoint serves")
        if self.attempts < 1 or self.timeout <= 0:
            raise UserError(f"attempts={self.attempts}, timeout={self.timeout}: too small")

    @property
    def settings(self) -> dict[str, Any]:
        """See `ReplyModel.settings`: without what changes no reply."""
        apart = {"key_variable", "timeout", "attempts"}
        return {name: value for name, value in super().settings.items() if name not in apart}

    def reply(self, message: str) -> str:
        """See `ReplyModel.reply`."""
        return _content(self.complete([{"role": "user", "content": message}]))

    def complete(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """The message that goes on from a conversation, in OpenAI's form.

        Args:
          messages: in OpenAI's form too.
          more: further fields of the request, such as tools.

        Raises:
          UserError: there is none.
        """
        body: dict[str, Any] = {"model": self.model, "messages": list(messages), **more}
        for name in ("temperature", "max_tokens"):
            if (value := getattr(self, name)) is not None:
                body[name] = value
        problem = ""
        for attempt in range(self.attempts):
            try:
                return _message(self._post(body))
            except _TransientError as error:
                problem = str(error)
                if attempt + 1 < self.attempts:
                    time.sleep(min(LONGEST_WAIT, max(2.0**attempt, error.wait)))
        raise UserError(f"{self.address}: {self.attempts} attempts failed, the last: {problem}")

    def _post(self, body: dict[str, Any]) -> Any:
        url = self.address.rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json"}
        if self.key_variable and (key := os.environ.get(self.key_variable)):
            headers["Authorization"] = f"Bearer {key.strip()}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with _opener().open(request, timeout=self.timeout) as response:
                data = response.read(LARGEST)
        except urllib.error.HTTPError as error:
            said = error.read(LARGEST).decode("utf-8", "replace").strip()[:SHOWN]
            message = f"status {error.code}: {said or error.reason}"
            if error.code in AGAIN or error.code >= 500:
                raise _TransientError(message, _seconds(error.headers.get("Retry-After"))) from None
            raise UserError(f"{url}: {message}") from None
        except (OSError, http.client.HTTPException) as error:  # of time too
            raise _TransientError(f"{type(error).__name__}: {error}") from None
        try:
            return json.loads(data)
        except ValueError:
            raise _TransientError(f"no JSON: {data[:SHOWN]!r}") from None


class _TransientError(Exception):
    """An attempt failed that may succeed later, after `wait` seconds or more."""

    def __init__(self, message: str, wait: float = 0.0):
        super().__init__(message)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nothing: the key is for the address that was given."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_NoRedirect)


def _seconds(given: str | None) -> float:
    """Seconds of a Retry-After; 0 for a date or nothing."""
    try:
        return max(0.0, float(given or 0))
    except ValueError:
        return 0.0


def _message(reply: Any) -> dict[str, Any]:
    """The message of a chat completion."""
    try:
        message = reply["choices"][0]["message"]
        message["content"]
    except (KeyError, IndexError, TypeError):
        raise UserError(f"no chat completion: {json.dumps(reply)[:SHOWN]}") from None
    return message


def _content(message: Mapping[str, Any]) -> str:
    """Text of a message, without the model's thoughts."""
    content = message["content"]
    if not isinstance(content, str):
        raise UserError(f"a chat completion without text: {json.dumps(message)[:SHOWN]}")
    return content.rpartition(BEHIND_THOUGHTS)[2].strip()


@config
class LocalModel(ReplyModel):
    """A model of a run folder or a public model folder, on the mesh that is set."""

    folder: str = ""  # of the model
    chat: str = "true"  # its chat format, as in lmjax.generation
    max_tokens: int = 1024  # most tokens of a reply

    def reply(self, message: str) -> str:
        """See `ReplyModel.reply`: the likeliest tokens."""
        from lmjax.data.chat.messages import Message
        from lmjax.generation.sampling import Sampling

        generator, template = _loaded(self.folder, self.chat)
        asked, greedy = [Message("user", message)], Sampling(temperature=0.0)
        (text,) = generator.replies(template, asked, greedy, self.max_tokens)
        return template.read_reply(text).content.rpartition(BEHIND_THOUGHTS)[2].strip()


@functools.lru_cache(maxsize=1)
def _loaded(folder: str, chat: str) -> Any:
    from lmjax.generation.chat import chat_format
    from lmjax.generation.run import load

    generator = load(folder)
    return generator, chat_format(folder, generator.tokenizer, chat)
