"""A conversation with a model that calls tools, until it has its answer.

python -m lmjax.serving.tool_loop "What is the 30th prime?" model=qwen python=true
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from lmjax.config import UserError, config
from lmjax.console import make_console
from lmjax.evaluation.chat_endpoint import ChatEndpoint
from lmjax.launch import run
from lmjax.serving.tools import Tool, python_tool, tool_of

Messages = list[dict[str, Any]]


def with_tools(
    complete: Callable[..., dict[str, Any]],
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Tool],
    most_turns: int = 8,
    told: Callable[[dict[str, Any]], None] = lambda message: None,
) -> Messages:
    """A conversation up to an answer that calls no tool, in OpenAI's form.

    Args:
      complete: gives a model's next message, as `ChatEndpoint.complete` does.
      messages: so far; the last one is the user's.
      tools: that the model may call.
      most_turns: replies of the model; in the last one it may call nothing.
      told: is given each new message.

    Raises:
      UserError: two tools have one name, or there is no reply.
    """
    known = {tool.name: tool for tool in tools}
    if len(known) < len(tools):
        raise UserError(f"two tools have one name: {', '.join(tool.name for tool in tools)}")
    found = list(messages)

    def add(message: dict[str, Any]) -> None:
        found.append(message)
        told(message)

    for turn in range(most_turns):
        more = {"tools": [tool.openai for tool in tools]} if tools else {}
        if more and turn + 1 == most_turns:
            more["tool_choice"] = "none"
        reply = complete(found, **more)
        calls = reply.get("tool_calls") or []
        said = {"role": "assistant", "content": reply["content"]}
        add(said | ({"tool_calls": calls} if calls else {}))
        if not calls:
            break
        for call in calls:
            add({"role": "tool", "tool_call_id": call["id"], "content": result_of(call, known)})
    return found


def result_of(call: dict[str, Any], tools: dict[str, Tool]) -> str:
    """The result of a call in OpenAI's form; of one that cannot be made, the reason."""
    name, given = call["function"]["name"], call["function"].get("arguments") or "{}"
    if name not in tools:
        return f"ToolError: there is no tool {name!r}, only {', '.join(tools)}"
    try:
        arguments = json.loads(given)
    except (ValueError, RecursionError):
        return "ToolError: the arguments are no JSON object"
    return tools[name].result(arguments)


@config
class AskWithTools:
    """Asks a model behind OpenAI's interface, which may call tools."""

    prompt: str | None = None  # what it is asked
    system: str | None = None  # what it is told before
    model: str | None = None  # its name at the address
    address: str = "http://127.0.0.1:8000/v1"  # of a server with OpenAI's interface
    key_variable: str | None = "LMJAX_API_KEY"  # environment variable with the key; none: no key
    max_tokens: int | None = 1024  # most tokens of a reply; none: the server's limit
    python: bool = False  # it may run Python, in a sandbox
    # run it also where the system cannot take its network away
    allow_network: bool = False
    functions: tuple[str, ...] = ()  # functions of yours that it may call, as module.function
    most_turns: int = 8  # replies; in the last one it calls nothing

    def validate(self) -> None:
        """Raises UserError for no turns."""
        if self.most_turns < 1:
            raise UserError(f"most_turns={self.most_turns}: must be 1 or more")

    def tools(self) -> list[Tool]:
        """The tools. UserError: a function is none, or Python cannot be run safely."""
        found = [python_tool(self.allow_network)] if self.python else []
        for path in self.functions:
            module, _, name = path.rpartition(".")
            try:
                function = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError, ValueError) as error:
                raise UserError(f"functions: {path!r} is no module.function: {error}") from None
            found.append(tool_of(function))
        return found

    def run(self) -> None:
        """Prints each call with its result, and the answer. UserError: there is none."""
        if not self.prompt or not self.model:
            raise UserError("give a prompt, and model=, its name at the server")
        endpoint = ChatEndpoint(
            address=self.address,
            model=self.model,
            key_variable=self.key_variable,
            max_tokens=self.max_tokens,
        )
        console = make_console()

        def tell(message: dict[str, Any]) -> None:
            for call in message.get("tool_calls", ()):
                function = call["function"]
                console.print(f"{function['name']}({function['arguments']})", markup=False)
            if message["content"]:
                before = "  -> " if message["role"] == "tool" else ""
                console.print(before + message["content"], markup=False)

        asked = [{"role": "user", "content": self.prompt}]
        if self.system:
            asked.insert(0, {"role": "system", "content": self.system})
        with_tools(endpoint.complete, asked, self.tools(), self.most_turns, tell)


if __name__ == "__main__":
    run(AskWithTools(), positional="prompt")
