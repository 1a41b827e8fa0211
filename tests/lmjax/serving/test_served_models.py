"""Models that fill blanks, adapters by name, tools, and checkpoints that come later."""

import json
import urllib.error
import urllib.request

import jax
import pytest

from lmjax.config import UserError
from lmjax.data.chat.jinja_format import JinjaFormat
from lmjax.data.chat.messages import ToolCall
from lmjax.data.chat.templates import PLAIN
from lmjax.generation import Generator, Sampling, TextGenerator
from lmjax.generation.fill import BlankInfiller, MaskedTokenInfiller, SentinelInfiller
from lmjax.models import initialize
from lmjax.parallel import generation_layout
from lmjax.serving import start
from lmjax.serving.conversation import calls_schema, read_calls, read_messages
from lmjax.serving.request import CollectedAnswer
from lmjax.serving.schemas import ChatBody
from lmjax.serving.settings import EngineSettings
from tests.lmjax.generation.test_fill import BERT, GLM, T5, TOKENIZER
from tests.lmjax.serving.engines import answered, request
from tests.lmjax.serving.servers import KEY, mesh, served, text_generator

GREEDY = Sampling(temperature=0.0)


def filling(model, how):
    """A model of random weights that fills blanks."""
    with jax.set_mesh(mesh()):
        _, params = initialize(model, generation_layout(), jax.random.key(3))
        return TextGenerator(Generator(model, params), TOKENIZER, how)


def post(server, path, **body):
    """Status and value of a response."""
    headers = {"Authorization": f"Bearer {KEY}"}
    sent = urllib.request.Request(server.url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(sent, timeout=120) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize(
    "model, how, prompt",
    [
        (GLM, BlankInfiller(), "a [MASK] b [MASK]."),
        (T5, SentinelInfiller(), "a <extra_id_0> b <extra_id_1>."),
    ],
    ids=["glm", "t5"],
)
def test_blanks_are_filled(model, how, prompt):
    text = filling(model, how)
    with jax.set_mesh(mesh()):
        (wanted,) = text.fill([prompt], GREEDY, 5)
    with served(text, "the model fills blanks") as server:
        status, value = post(server, "/v1/fill", prompt=prompt, max_tokens=5, temperature=0)
        assert status == 200
        (choice,) = value["choices"]
        assert (choice["text"], choice["blanks"]) == (wanted.text, wanted.blanks)
        status, value = post(server, "/v1/fill", prompt="no blank")
        assert status == 400 and "has no blank" in value["error"]["message"]
        status, value = post(server, "/v1/completions", prompt="a")
        assert status == 400 and "use /v1/fill" in value["error"]["message"]
        talk = [{"role": "user", "content": "a"}]
        assert post(server, "/v1/chat/completions", messages=talk)[0] == 400


def test_masks_are_guessed():
    text = filling(BERT, MaskedTokenInfiller())
    with jax.set_mesh(mesh()):
        wanted = text.guess("a [MASK] b", 3)
    with served(text, "the model fills blanks") as server:
        status, value = post(server, "/v1/fill", prompt="a [MASK] b", guesses=3)
    assert status == 200
    found = [[(one["text"], one["probability"]) for one in mask] for mask in value["masks"]]
    assert [[text for text, _ in mask] for mask in found] == [
        [text for text, _ in mask] for mask in wanted
    ]


def changed(weights):
    """Weights of which one array is another."""
    weights = dict(weights)
    weights["blocks"] = jax.tree.map(lambda a: a, weights["blocks"])
    first = jax.tree.leaves(weights["blocks"])[-1]
    return jax.tree.map(lambda a: a * 1.5 if a is first else a, weights)


def test_adapters_have_names_and_share_what_is_the_same(monkeypatch):
    base = text_generator()
    with jax.set_mesh(mesh()):
        own = Generator(base.generator.config, changed(base.generator.params))
        monkeypatch.setattr(start, "is_adapter_folder", lambda folder: folder != "runs/none")
        monkeypatch.setattr(start, "load", lambda *_: TextGenerator(own, base.tokenizer))
        settings = EngineSettings(slots=4, cache_tokens=512, page=8, chunk=64)
        model = start.served_model("tiny", base, PLAIN, settings, 100, ["runs/style"])
        assert model.names == ["tiny", "style"]
        pair = [model.engine._weights[name].params for name in model.names]
        leaves = list(zip(*map(jax.tree.leaves, pair)))
        assert sum(ours is not theirs for ours, theirs in leaves) == 1
        requests = [request([256, 97], model=name) for name in model.names]
        found = answered(model.engine, requests)
        for answer, generator in zip(found, (base.generator, own)):
            assert answer.ids == generator.generate([[256, 97]], GREEDY, 12)[0]
        with pytest.raises(UserError, match="runs/none holds no adapters"):
            start.served_model("tiny", base, PLAIN, settings, 100, ["runs/none"])
        with pytest.raises(UserError, match="two of the name 'style'"):
            start.served_model("tiny", base, PLAIN, settings, 100, ["a/style", "b/style"])


def test_a_newer_checkpoint_takes_over(monkeypatch):
    import threading

    text, steps, told = text_generator(), [1], threading.Event()
    with jax.set_mesh(mesh()):
        newer = Generator(text.generator.config, changed(text.generator.params))
        new = TextGenerator(newer, text.tokenizer)
        wanted = newer.generate([[256, 97]], GREEDY, 12)[0]
        settings = EngineSettings(slots=4, cache_tokens=512, page=8, chunk=64)
        model = start.served_model("tiny", text, PLAIN, settings, 100)
        monkeypatch.setattr(start, "served_step", lambda folder: steps[-1])
        monkeypatch.setattr(start, "load_run", lambda *_: new)
        monkeypatch.setattr(start, "tell", lambda note: told.set())
        before = CollectedAnswer()
        model.engine.submit(request([256, 97]), before)
        model.engine.step()
        with start.watch_run("runs/x", model, mesh(), 1, 0.01):
            steps.append(2)
            assert told.wait(30)
        after = CollectedAnswer()
        model.engine.submit(request([256, 97]), after)
        while model.engine.step():
            pass
        assert after.ids == wanted
        assert before.ids == text.generator.generate([[256, 97]], GREEDY, 12)[0]


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"day": {"enum": ["today", "tomorrow"]}},
            "required": ["day"],
            "additionalProperties": False,
        },
    },
}


def chat(**changes):
    """A body of a conversation."""
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL]} | changes
    return ChatBody.model_validate_json(json.dumps(body))


def test_calls_are_read_as_models_write_them():
    call = {"name": "weather", "arguments": {"day": "today"}}
    text = json.dumps(call)
    other = json.dumps({"name": "weather", "parameters": {}})
    today, nothing = ToolCall("weather", {"day": "today"}), ToolCall("weather", {})
    for written, rest, calls in [
        (f"I look.\n<tool_call>\n{text}\n</tool_call>", "I look.", [today]),
        (f"<tool_call>{text}</tool_call><tool_call>{other}</tool_call>", "", [today, nothing]),
        (f" {other}\n", "", [nothing]),
        (f"[{text}, {other}]", "", [today, nothing]),
        ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
        (text.replace("weather", "other"), text.replace("weather", "other"), []),
        ("[]", "[]", []),
        ("plain", "plain", []),
    ]:
        assert read_calls(written, ["weather"]) == (rest, calls)


def test_tools_stand_in_the_system_message():
    (system, user) = read_messages(chat(), PLAIN)
    assert system.tools == (TOOL,) and user.content == "x"
    assert len(read_messages(chat(tool_choice="none"), PLAIN)) == 1
    past = [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    *_, said, seen = read_messages(chat(messages=past), PLAIN)
    assert said.calls == (ToolCall("weather", {}),) and seen.role == "observation"
    past[1]["tool_calls"][0]["function"]["arguments"] = "["
    with pytest.raises(UserError, match="no JSON object"):
        read_messages(chat(messages=past), PLAIN)
    with pytest.raises(UserError, match="no tool 'other'"):
        calls_schema(chat(tool_choice={"type": "function", "function": {"name": "other"}}))
    assert calls_schema(chat()) is None


def test_a_call_can_be_required():
    """Held to the tool's schema, whatever the model is; other formats have no words for tools."""
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    source = "{{ tools }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    told = JinjaFormat(source, "of the test", frozenset(), {})
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL]}
    body |= {"max_tokens": 60, "tool_choice": "required", "temperature": 0.5}
    with served(chat=told) as server:
        finished = []
        for seed in range(4):
            status, value = post(server, "/v1/chat/completions", **body, seed=seed)
            assert status == 200
            (choice,) = value["choices"]
            if choice["finish_reason"] == "tool_calls":
                (call,) = choice["message"]["tool_calls"]
                assert call["function"]["name"] == "weather"
                finished.append(json.loads(call["function"]["arguments"])["day"])
        assert finished and set(finished) <= {"today", "tomorrow"}
    with served() as server:
        status, value = post(server, "/v1/chat/completions", **body)
        assert status == 400 and "tools" in value["error"]["message"]
