"""Tools: what a model is told of them, calls that cannot be made, and ten tasks with a script.

In place of a model a script calls the tools as a good one would, so that the loop, the sandbox and
the forms of the calls are tested, and not a model.
"""

import datetime
import functools
import json
from typing import Literal

import pytest

from lmjax.config import UserError
from lmjax.data.chat.catalogue import chat_template
from lmjax.data.chat.messages import ToolCall
from lmjax.evaluation.chat_endpoint import ChatEndpoint
from lmjax.evaluation.tasks.sandbox import run_cell
from lmjax.serving.conversation import read_messages, read_python_call, writes_python
from lmjax.serving.schemas import ChatBody
from lmjax.serving.tool_loop import AskWithTools, with_tools
from lmjax.serving.tools import python_tool, tool_of
from tests.lmjax.evaluation.test_judge import served

# Also where the system takes no network away.
cell = functools.partial(run_cell, allow_network=True)


def weather(city: str, unit: Literal["C", "F"] = "C", days: int | None = None) -> dict:
    """The weather of a city."""
    degrees = {"Oslo": 3, "Rome": 17}[city]
    return {"degrees": degrees if unit == "C" else degrees * 9 / 5 + 32, "days": days}


def weekday(date: str) -> str:
    """The day of the week of a date such as 2024-02-29."""
    return datetime.date.fromisoformat(date).strftime("%A")


def add(numbers: list[float]) -> float:
    """The sum of numbers."""
    return sum(numbers)


TOOLS = [tool_of(function) for function in (weather, weekday, add)]


def called(*calls):
    """A model's message that calls tools, in OpenAI's form."""
    entries = [
        {"id": f"c{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for n, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": None, "tool_calls": entries}


class Script:
    """Calls what it is told to, and answers with the last result."""

    def __init__(self, *turns):
        self.turns, self.asked = list(turns), []

    def complete(self, messages, **more):
        self.asked.append((list(messages), more))
        if self.turns and more.get("tool_choice") != "none":
            calls = [(name, json.dumps(given)) for name, given in self.turns.pop(0)]
            return called(*calls)
        return {"role": "assistant", "content": f"It is {messages[-1]['content']}."}


def asked(*turns, tools=None, **settings):
    script = Script(*turns)
    tools = [python_tool(allow_network=True), *TOOLS] if tools is None else tools
    return with_tools(
        script.complete, [{"role": "user", "content": "?"}], tools, **settings
    ), script


def python(code):
    return [("python", {"code": code})]


TASKS = {
    "the 30th prime": (
        [python("primes = [n for n in range(2, 200) if all(n % d for d in range(2, n))]"),
         python("primes[29]")],
        "113",
    ),
    "a factorial": ([python("import math\nmath.factorial(20)")], "2432902008176640000"),
    "letters": ([python("print('strawberry'.count('r'))")], "3"),
    "a table": ([python("rows = {'a': 2, 'b': 5}"), python("max(rows, key=rows.get)")], "'b'"),
    "an error is mended": ([python("1 / 0"), python("1 / 4")], "0.25"),
    "the weather": ([[("weather", {"city": "Oslo"})]], '{"degrees": 3, "days": null}'),
    "in other degrees": (
        [[("weather", {"city": "Rome", "unit": "F", "days": 2})]], '{"degrees": 62.6, "days": 2}'
    ),
    "a weekday": ([[("weekday", {"date": "2024-02-29"})]], "Thursday"),
    "two calls at once": (
        [[("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})],
         [("add", {"numbers": [3, 17]})]],
        "20",
    ),
    "one tool after another": (
        [[("weekday", {"date": "2026-01-01"})], python("len('Thursday')")], "8"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_ten_tasks(name):
    turns, result = TASKS[name]
    messages, script = asked(*turns)
    assert messages[-1] == {"role": "assistant", "content": f"It is {result}."}
    assert len(script.asked) == len(turns) + 1
    for message in messages[1:-1]:  # each result says whose it is
        if message["role"] == "assistant":
            ids = [call["id"] for call in message["tool_calls"]]
        else:
            assert message["tool_call_id"] == ids.pop(0)


def test_a_tool_is_described_by_its_function():
    function = tool_of(weather).openai["function"]
    assert function["description"] == "The weather of a city."
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"enum": ["C", "F"]},
            "days": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        },
        "required": ["city"],
    }


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (("wether", {}), "there is no tool 'wether', only python, weather, weekday, add"),
        (("weather", {"town": "Oslo"}), "there is no argument 'town', only city, unit, days"),
        (("weather", {}), "the argument 'city' is missing"),
        (("weather", {"city": "Bern"}), "KeyError: 'Bern'"),
        (("weather", ["Oslo"]), "the arguments are no JSON object"),
        (("python", {"code": "while True: pass"}), "more than 0.5 seconds"),
        (("python", {"code": "import os; os._exit(3)"}), "exit code 3"),
    ],
)
def test_the_model_is_told_what_was_wrong(call, words, monkeypatch):
    monkeypatch.setattr("lmjax.serving.tools.run_cell", lambda *a, **_: cell(*a, seconds=0.5))
    messages, _ = asked([call])
    assert words in messages[2]["content"]


def test_in_the_last_turn_nothing_is_called():
    messages, script = asked(*[python("1")] * 5, most_turns=3)
    assert [more.get("tool_choice") for _, more in script.asked] == [None, None, "none"]
    assert messages[-1]["content"] == "It is 1."


def test_a_cell_keeps_what_was_defined_and_shows_little_of_much():
    assert cell("x + 1", ["x = 1\nprint('once')"]) == (True, "2")
    ended, text = cell("print('a' * 10_000)")
    assert ended and text.startswith("aaa") and text.endswith("(10,000 characters)")
    assert cell("def f(:") == (False, cell("def f(:")[1])
    assert "SyntaxError" in cell("def f(:")[1]


def no_words(x: int) -> int:
    return x


def no_type(x):
    """A function."""


def spread(*x: int) -> int:
    """A function."""


@pytest.mark.parametrize(
    ("function", "words"),
    [(no_words, "no docstring"), (no_type, "its type must be"), (spread, "with names")],
)
def test_functions_that_are_no_tools(function, words):
    with pytest.raises(UserError, match=words):
        tool_of(function)


def test_the_command(capsys, monkeypatch):
    monkeypatch.setenv("LMJAX_API_KEY", "k")
    script = Script(python("6 * 7"))
    reply = lambda body: (200, {"choices": [{"message": script.complete(body["messages"])}]})  # noqa: E731
    with served(reply) as (model, bodies):
        AskWithTools(
            prompt="6 x 7?",
            system="Be short.",
            model="m",
            address=model.address,
            python=True,
            allow_network=True,
            functions=("tests.lmjax.serving.test_tools.add",),
        ).run()
    said = capsys.readouterr().out
    assert 'python({"code": "6 * 7"})' in said and "It is 42." in said
    (_, headers, body), *_ = bodies
    assert headers["Authorization"] == "Bearer k" and body["messages"][0]["role"] == "system"
    assert [tool["function"]["name"] for tool in body["tools"]] == ["python", "add"]
    for wrong in ({"functions": ("no.such",)}, {"model": None}):
        with pytest.raises(UserError):
            AskWithTools(**{"prompt": "?", "model": "m"} | wrong).run()
    assert ChatEndpoint(address="http://x", model="m").settings["model"] == "m"


def test_chatglm3_calls_in_python():
    chat = chat_template("chatglm3")
    assert writes_python(chat) and not writes_python(chat_template("chatml"))
    text = "weather\n```python\ntool_call(city='Oslo', days=2)\n```"
    wanted = ToolCall("weather", {"city": "Oslo", "days": 2})
    assert read_python_call(text, ["weather"], chat) == ("", [wanted])
    assert read_python_call("\nIt is 3 degrees.", ["weather"], chat) == ("It is 3 degrees.", [])
    assert read_python_call("weather\nnot a call", ["weather"], chat)[1] == []
    body = ChatBody(
        messages=[
            {"role": "user", "content": "Oslo?"},
            called(("weather", '{"city": "Oslo", "days": 2}')),
            {"role": "tool", "tool_call_id": "c0", "content": "3"},
        ],
        tools=[tool_of(weather).openai],
    )
    system, _, call, result = read_messages(body, chat)
    assert system.tools[0]["name"] == "weather"
    assert call.metadata == "weather" and 'tool_call(city="Oslo", days=2)' in call.content
    assert result.role == "observation"
