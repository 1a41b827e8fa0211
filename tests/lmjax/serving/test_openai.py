"""OpenAI's own client drives every address; answers are those of `lmjax.generation`."""

import base64
import json
import math

import jax
import numpy as np
import pytest

from lmjax.data.chat.messages import Message
from lmjax.data.chat.templates import PLAIN
from lmjax.generation import Sampling
from tests.lmjax.serving.servers import KEY, mesh, served, text_generator

openai = pytest.importorskip("openai", reason="openai is not installed")
GREEDY = Sampling(temperature=0.0)
TALK = [{"role": "user", "content": "héllo"}]


@pytest.fixture(scope="module")
def server():
    with served() as server:
        yield server


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60)


def generated(prompt, sampling=GREEDY, most=12, stop=(), samples=1):
    """What the generator writes."""
    with jax.set_mesh(mesh()):
        return text_generator().generate([prompt], sampling, most, stop, samples)


def test_completions_are_those_of_the_generator(client, server):
    found = client.completions.create(model="tiny", prompt="abc", max_tokens=12, temperature=0)
    assert found.choices[0].text == generated("abc")[0]
    assert found.choices[0].finish_reason == "length" and found.object == "text_completion"
    assert found.usage.prompt_tokens == 4  # the beginning of a document, and three bytes
    assert found.usage.completion_tokens == 12 and found.usage.total_tokens == 16
    draws = client.completions.create(
        model="tiny", prompt="abc", max_tokens=12, temperature=0.9, seed=7, n=3
    )
    assert [c.index for c in draws.choices] == [0, 1, 2]
    wanted = generated("abc", Sampling(temperature=0.9, seed=7), samples=3)
    assert [c.text for c in draws.choices] == wanted
    two = client.completions.create(model="tiny", prompt=["abc", ""], max_tokens=12, temperature=0)
    assert [c.text for c in two.choices] == generated("abc") + generated("")
    ids = client.completions.create(
        model="tiny", prompt=[256, 97, 98, 99], max_tokens=12, temperature=0
    )
    assert ids.choices[0].text == found.choices[0].text
    server.wait_idle()


def test_a_stream_joins_to_the_whole(client):
    """Through characters of several bytes, and stop strings."""
    whole = client.completions.create(model="tiny", prompt="é", max_tokens=60, temperature=0)
    text = whole.choices[0].text
    for stop in (None, text[9:11], [text[20:22], "never"]):
        settings = dict(model="tiny", prompt="é", max_tokens=60, temperature=0, stop=stop)
        whole = client.completions.create(**settings)
        chunks = list(
            client.completions.create(
                **settings, stream=True, stream_options={"include_usage": True}
            )
        )
        assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
        assert whole.choices[0].finish_reason == ("length" if stop is None else "stop")
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert chunks[-1].usage == whole.usage.model_copy(
            update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
        )
        if isinstance(stop, str):
            assert whole.choices[0].text == text[: text.index(stop)]


def test_chat_is_the_reply_of_the_generator(client):
    with jax.set_mesh(mesh()):
        talk = [Message("user", "héllo")]
        wanted = "".join(text_generator().reply(PLAIN, talk, GREEDY, 12))
    settings = dict(model="tiny", messages=TALK, temperature=0, max_completion_tokens=12)
    found = client.chat.completions.create(**settings)
    assert found.choices[0].message.content == wanted and found.choices[0].message.role
    chunks = list(client.chat.completions.create(**settings, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == wanted
    reasons = [c.choices[0].finish_reason for c in chunks]
    assert reasons[-1] == found.choices[0].finish_reason and not any(reasons[:-1])
    parts = [{"role": "user", "content": [{"type": "text", "text": "héllo"}]}]
    again = client.chat.completions.create(**settings | {"messages": parts})
    assert again.choices[0].message.content == wanted


def test_probabilities_have_the_shape_of_their_address(client):
    settings = dict(model="tiny", messages=TALK, temperature=0, max_tokens=8, logprobs=True)
    for tops in (None, 3):
        more = {} if tops is None else {"top_logprobs": tops}
        whole = client.chat.completions.create(**settings, **more)
        scores = whole.choices[0].logprobs.content
        assert len(scores) == whole.usage.completion_tokens
        for score in scores:
            assert score.logprob <= 0 and len(score.top_logprobs) == (tops or 0)
            if tops:
                assert score.top_logprobs[0].logprob == score.logprob
        data = b"".join(bytes(score.bytes) for score in scores)
        assert data.decode("utf-8", "replace") == whole.choices[0].message.content
        chunks = client.chat.completions.create(**settings, **more, stream=True)
        streamed = [
            score
            for chunk in chunks
            if chunk.choices[0].logprobs
            for score in chunk.choices[0].logprobs.content
        ]
        assert [s.bytes for s in streamed] == [s.bytes for s in scores]
        assert [s.logprob for s in streamed] == pytest.approx([s.logprob for s in scores], abs=1e-5)


def test_a_prompt_is_shown_with_its_probabilities(client):
    settings = dict(model="tiny", prompt="abc", max_tokens=4, temperature=0, echo=True, logprobs=2)
    whole = client.completions.create(**settings).choices[0]
    assert whole.text == "abc" + generated("abc", most=4)[0]
    scores = whole.logprobs
    assert len(scores.tokens) == 4 + 4 and scores.token_logprobs[0] is None
    assert all(value <= 0 for value in scores.token_logprobs[1:])
    # One after another, each token is scored as the next one of what stands before.
    for count in (2, 3):
        one = client.completions.create(
            model="tiny",
            prompt=[256, *b"abc"[: count - 1]],
            max_tokens=1,
            temperature=0,
            logprobs=5,
        )
        best = one.choices[0].logprobs
        value = scores.token_logprobs[count]
        assert value <= best.token_logprobs[0] + 1e-4
        if "abc"[count - 1] in best.top_logprobs[0]:
            assert best.top_logprobs[0]["abc"[count - 1]] == pytest.approx(value, abs=1e-4)
    chunks = list(client.completions.create(**settings, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.text
    streamed = [v for c in chunks if c.choices[0].logprobs for v in c.choices[0].logprobs.tokens]
    assert streamed == scores.tokens
    scored = client.completions.create(**settings | {"max_tokens": 0}).choices[0]
    assert scored.text == "abc" and scored.logprobs.token_logprobs[1:] == pytest.approx(
        scores.token_logprobs[1:4], abs=1e-4
    )


def test_embeddings_are_the_model_s_states(client):
    found = client.embeddings.create(model="tiny", input=["abc", "a longer text"])
    vectors = np.array([one.embedding for one in found.data])
    assert vectors.shape == (2, 16) and found.usage.prompt_tokens == 4 + 14
    (alone,) = client.embeddings.create(model="tiny", input="abc", encoding_format="float").data
    np.testing.assert_allclose(alone.embedding, vectors[0], atol=1e-5)
    raw = client.embeddings.with_raw_response.create(
        model="tiny", input="abc", encoding_format="base64"
    )
    (data,) = json.loads(raw.text if isinstance(raw.text, str) else raw.text())["data"]
    decoded = np.frombuffer(base64.b64decode(data["embedding"]), "<f4")
    np.testing.assert_allclose(decoded, vectors[0], atol=1e-5)


def test_models_are_told(client):
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.models.retrieve("other")


def test_tokens_are_told(client):
    found = client.post("/../tokenize", body={"prompt": "aé"}, cast_to=dict)
    assert found == {"tokens": [97, 195, 169], "count": 3, "max_model_len": 256}
    talk = client.post("/../tokenize", body={"messages": TALK}, cast_to=dict)
    assert talk["tokens"] == PLAIN.encode(text_generator().tokenizer, [Message("user", "héllo")])
    back = client.post("/../detokenize", body={"tokens": found["tokens"]}, cast_to=dict)
    assert back == {"prompt": "aé"}


def test_json_is_json(client):
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["x", "yy"]}, "n": {"type": "integer", "maximum": 9}},
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    for seed in range(3):
        found = client.chat.completions.create(
            model="tiny", messages=TALK, seed=seed, max_tokens=120, response_format=form, n=2
        )
        for choice in found.choices:
            if choice.finish_reason == "stop":
                value = json.loads(choice.message.content)
                assert value["name"] in ("x", "yy") and value["n"] <= 9 and len(value) == 2
    assert any(choice.finish_reason == "stop" for choice in found.choices)
    wrong = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError, match="JSON schema"):
        client.chat.completions.create(model="tiny", messages=TALK, response_format=wrong)


def test_refusals_are_the_client_s_errors(client, server):
    def refused(kind, text, **changes):
        settings = {"model": "tiny", "messages": TALK, "max_tokens": 4} | changes
        with pytest.raises(kind, match=text) as error:
            client.chat.completions.create(**settings)
        assert error.value.body["message"] and error.value.body["type"]

    bad = openai.BadRequestError
    refused(bad, "temperature", temperature=-1)
    refused(bad, "n: ", n=1000)
    refused(bad, "messages", messages=[])
    refused(bad, "role", messages=[{"role": "king", "content": "x"}])
    refused(bad, "top_logprobs", top_logprobs=3)
    refused(bad, "this server allows 200", max_tokens=201)
    refused(bad, "logit_bias", logit_bias={"x": 1})
    refused(bad, "logit_bias: 999", logit_bias={"999": 1})
    refused(
        bad,
        "more than the 256 of the model's context",
        messages=[{"role": "user", "content": "x" * 300}],
    )
    refused(bad, "stop: an empty string", stop=[""])
    refused(openai.NotFoundError, "there is no model", model="gpt-5")
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="the key is missing or wrong"):
        stranger.models.list()
    server.wait_idle()


def test_answers_do_not_depend_on_the_load(client, server):
    """Sixteen at once, more than there are slots, each as alone; and nothing is left behind."""
    import concurrent.futures

    prompts = [f"text {n} " * (1 + n % 3) for n in range(12)]
    wanted = [generated(prompt)[0] for prompt in prompts[:3]]

    def ask(prompt):
        found = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0)
        return found.choices[0].text

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, prompts))
    assert found[:3] == wanted
    assert [ask(prompt) for prompt in prompts] == found
    server.wait_idle()


def test_numbers_are_finite(client):
    found = client.completions.create(
        model="tiny", prompt="abc", max_tokens=2, temperature=0, logit_bias={"5": 100}, logprobs=1
    )
    assert all(math.isfinite(value) for value in found.choices[0].logprobs.token_logprobs)
    assert found.choices[0].logprobs.tokens == ["\x05", "\x05"]


def test_guesses_do_not_change_what_is_written(client):
    with served(guesses=4) as guessing:
        other = openai.OpenAI(base_url=f"{guessing.url}/v1", api_key=KEY, max_retries=0, timeout=60)
        settings = dict(model="tiny", prompt="abcabcabcabc", max_tokens=60, temperature=0)
        assert other.completions.create(**settings).choices[0].text == (
            client.completions.create(**settings).choices[0].text
        )
        assert guessing.model.engine.counts["guessed"] > 0
