"""Each wrong parameter is refused by its name, in OpenAI's shape, before anything is computed."""

import json
import urllib.error
import urllib.request

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmjax.serving.openapi import POSTS, describe
from tests.lmjax.serving.servers import KEY, served

CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
TEXT = {"prompt": "x", "max_tokens": 1}
VALID = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": TEXT,
    "/v1/embeddings": {"input": "x"},
    "/v1/fill": TEXT,
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [97]},
}
TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
TYPES |= {413: "invalid_request_error", 429: "rate_limit_error"}


@pytest.fixture(scope="module")
def server():
    with served() as server:
        yield server


def error_of(server, path, body, key=KEY):
    """Status and error of a refusal; of an answer, no error."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, None
    except urllib.error.HTTPError as refusal:
        value = json.loads(refusal.read())
        assert refusal.headers["content-type"] == "application/json"
        assert set(value) == {"error"}
        error = value["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and error["type"] == TYPES[refusal.code]
        return refusal.code, error


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=6), values, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = [(path, field) for path, body in POSTS.items() for field in sorted(body.model_fields)]


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(field=st.sampled_from(FIELDS), value=JSON)
def test_what_the_description_forbids_is_refused_by_its_name(server, field, value):
    """jsonschema says what is forbidden."""
    path, name = field
    schemas = describe()["components"]["schemas"]
    if name == "schema_":  # of no body
        return
    schema = {
        "$ref": f"#/components/schemas/{POSTS[path].__name__}",
        "components": {"schemas": schemas},
    }
    body = VALID[path] | {name: value}
    allowed = jsonschema.Draft202012Validator(schema).is_valid(body)
    status, error = error_of(server, path, body)
    if allowed:  # the model may yet have reasons against it
        assert status in (200, 400, 404), error
    else:
        assert status == 400
        assert error["param"].split(".")[0] == name, error


def test_what_the_types_do_not_show_is_refused_by_its_name(server):
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "no"}}}
    for path, body, param, code in [
        ("/v1/completions", TEXT | {"max_tokens": 201}, "max_tokens", None),
        ("/v1/completions", TEXT | {"logit_bias": {"x": 1}}, "logit_bias", None),
        ("/v1/completions", TEXT | {"logit_bias": {"257": 1}}, "logit_bias", None),
        ("/v1/completions", TEXT | {"stop": ["a", ""]}, "stop", None),
        ("/v1/completions", TEXT | {"suffix": "a"}, "suffix", None),
        ("/v1/completions", TEXT | {"best_of": 2}, "best_of", None),
        ("/v1/completions", {"prompt": [[97], []]}, "prompt", None),
        ("/v1/completions", {"prompt": [97, 257]}, "prompt", None),
        ("/v1/completions", {"prompt": "a" * 300}, "prompt", "context_length_exceeded"),
        ("/v1/chat/completions", CHAT | {"max_tokens": 201}, "max_tokens", None),
        ("/v1/chat/completions", CHAT | {"top_logprobs": 1}, "top_logprobs", None),
        ("/v1/chat/completions", CHAT | {"tool_choice": "required"}, "tool_choice", None),
        ("/v1/chat/completions", CHAT | {"response_format": form}, "response_format", None),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a" * 300}]},
            "messages",
            "context_length_exceeded",
        ),
        ("/v1/embeddings", {"input": "a" * 300}, "input", None),
        ("/v1/embeddings", {"input": "a", "dimensions": 3}, "dimensions", None),
        ("/tokenize", {}, "prompt", None),
        ("/detokenize", {"tokens": [257]}, "tokens", None),
    ]:
        status, error = error_of(server, path, body)
        assert (status, error["param"], error["code"]) == (400, param, code), (body, error)
        assert error["message"]


@pytest.mark.parametrize("path", POSTS)
def test_other_refusals(server, path):
    """A wrong key, another model, and a body that is too large."""
    valid = VALID[path]
    assert error_of(server, path, valid, KEY[:-1])[0] == 401
    status, error = error_of(server, path, b" " * 100_001)
    assert status == 413
    status, error = error_of(server, path, valid | {"model": "other"})
    assert (status, error["param"], error["code"]) == (404, "model", "model_not_found")
