"""The server refuses what is wrong, forgets who leaves, and ends in order."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.launch import run
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.serving import local_server
from lmjax.serving.__main__ import Serve
from lmjax.serving.app import PAGE
from lmjax.serving.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    TokenizeBody,
)
from tests.lmjax.jobs.base_run import write_base
from tests.lmjax.serving.servers import KEY, served

ROOT = Path(__file__).parents[3]
MODEL = TransformerConfig(  # the one of tests/lmjax/jobs/test_finetune.py: compiled once
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=96,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
)
POSTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/fill",
    "/tokenize",
    "/detokenize",
)


@pytest.fixture(scope="module")
def server():
    with served() as server:
        yield server


def ask(server, path, body=None, key=KEY, **headers):
    """Status and JSON value of a response."""
    headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            data, status = reply.read(), reply.status
    except urllib.error.HTTPError as error:
        data, status = error.read(), error.code
    try:
        return status, json.loads(data)
    except ValueError:
        return status, data.decode()


def test_wrong_requests_have_the_shape_of_errors(server):
    completion = {"prompt": "a", "max_tokens": 2}
    for status, path, body, changes in [
        (401, "/v1/models", None, {"key": None}),
        (401, "/v1/models", None, {"key": KEY + "x"}),
        (401, "/metrics", None, {"key": None}),
        (404, "/v1/nothing", None, {}),
        (404, "/v1/models/other", None, {}),
        (404, "/v1/models/../../etc/passwd", None, {}),
        (404, "/chat.css/../../app.py", None, {}),
        (404, "/v1/completions", completion | {"model": "other"}, {}),
        (405, "/v1/completions", None, {}),
        (400, "/v1/completions", b"{", {}),
        (400, "/v1/completions", b"", {}),
        (400, "/v1/completions", b"[]", {}),
        (400, "/v1/completions", b"\xff\xfe", {}),
        (400, "/v1/completions", b'{"prompt": "\\ud800"}', {}),
        (400, "/v1/completions", b"[" * 50_000, {}),
        (400, "/v1/completions", b'{"temperature": NaN}', {}),
        (400, "/v1/completions", b'{"temperature": 1e999}', {}),
        (400, "/v1/completions", completion | {"temperature": "1"}, {}),
        (400, "/v1/completions", completion | {"max_tokens": True}, {}),
        (400, "/v1/completions", completion | {"max_tokens": 10**30}, {}),
        (400, "/v1/completions", completion | {"suffix": "b"}, {}),
        (400, "/v1/completions", {"prompt": [256, 99999]}, {}),
        (400, "/v1/completions", {"prompt": []}, {}),
        (400, "/v1/embeddings", {"input": "a", "dimensions": 3}, {}),
        (400, "/v1/embeddings", {"input": "a" * 400}, {}),
        (400, "/v1/fill", {"prompt": "a [MASK]"}, {}),
        (400, "/tokenize", {}, {}),
        (400, "/detokenize", {"tokens": [9999]}, {}),
        (413, "/v1/completions", b'{"prompt": "' + b"a" * 200_000 + b'"}', {}),
    ]:
        found, value = ask(server, path, body, **changes)
        assert found == status, (path, body and body[:40], value)
        error = value["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
    server.wait_idle()


def test_what_needs_no_key(server):
    assert ask(server, "/health", key=None) == (200, {"status": "ok"})
    for path, kind in (("/", "<!doctype html>"), ("/chat.js", '"use strict"'), ("/chat.css", ":")):
        status, text = ask(server, path, key=None)
        assert status == 200 and text.startswith(kind)
    text = "".join(path.read_text("utf-8") for path in PAGE.iterdir())
    for word in ("http://", "https://", "innerHTML", "insertAdjacentHTML", "onclick=", "eval("):
        assert word not in text
    with urllib.request.urlopen(server.url) as reply:
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy


def test_another_host_is_refused(server):
    """As a name that a stranger's page has point here sends it."""
    status, _ = ask(server, "/v1/models", Host="evil.example")
    assert status == 400


def test_metrics_and_log_count(server):
    ask(server, "/v1/completions", {"prompt": "count me", "max_tokens": 3})
    status, text = ask(server, "/metrics")
    assert status == 200
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    path = 'lmjax_requests_total{path="/v1/completions",status="200"}'
    assert int(values[path]) >= 1 and int(values["lmjax_written_tokens_total"]) >= 3
    assert values["lmjax_pages"] == "0" and int(values["lmjax_first_token_seconds_count"]) >= 1
    line = server.lines[-1]
    assert line["path"] in ("/v1/completions", "/metrics")
    done = [line for line in server.lines if line["path"] == "/v1/completions"][-1]
    assert (done["status"], done["prompt_tokens"], done["completion_tokens"]) == (200, 9, 3)
    assert "count me" not in "".join(server.log) and KEY not in "".join(server.log)


def test_who_leaves_is_forgotten(server):
    """In the middle of a stream, and before a whole answer; slots and pages come back."""
    engine = server.model.engine
    step, before = engine.step, engine.counts["finished_cancelled"]
    engine.step = lambda: (time.sleep(0.02), step())[1]
    (end,) = server.model.text.stop_tokens(())
    # Nothing ends by itself before its writer leaves.
    body = {"prompt": "a", "max_tokens": 200, "n": 2, "logit_bias": {str(end): -100}}
    try:
        for stream in (True, False):
            connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
            headers = {"Authorization": f"Bearer {KEY}"}
            request = json.dumps(body | {"stream": stream})
            connection.request("POST", "/v1/completions", request, headers)
            if stream:
                assert connection.getresponse().read(20)
            else:
                time.sleep(0.5)
            for _ in range(100):
                if engine.load().writing == 2:
                    break
                time.sleep(0.05)
            assert engine.load().writing == 2
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            server.wait_idle()
    finally:
        engine.step = step
    assert engine.counts["finished_cancelled"] == before + 4


def test_a_full_queue_refuses(server):
    engine = server.model.engine
    step = engine.step
    engine.step = lambda: (time.sleep(0.2), False)[1]  # nothing is answered for now
    try:
        body = {"prompt": "a", "max_tokens": 2, "n": 16}
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        headers = {"Authorization": f"Bearer {KEY}"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        while engine.load().waiting < 16:
            time.sleep(0.05)
        status, value = ask(server, "/v1/completions", {"prompt": "b"})
        assert status == 429 and value["error"]["code"] == "queue_full"
    finally:
        engine.step = step
    assert connection.getresponse().status == 200
    connection.close()
    server.wait_idle()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=6), values),
    max_leaves=6,
)
FIELDS = [*ChatBody.model_fields, *CompletionBody.model_fields, *EmbeddingBody.model_fields]
FIELDS = sorted({*FIELDS, *TokenizeBody.model_fields, *DetokenizeBody.model_fields})
VALID = st.fixed_dictionaries(
    {"prompt": st.text(max_size=5), "input": st.text(max_size=5), "max_tokens": st.integers(1, 3)}
    | {"messages": st.just([{"role": "user", "content": "x"}])}
)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    path=st.sampled_from(POSTS),
    valid=VALID,
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
)
def test_no_body_makes_the_server_fail(server, path, valid, changes):
    body = json.dumps(valid | changes).encode()
    status, value = ask(server, path, body)
    assert status < 500, value
    if status != 200:
        assert value["error"]["message"]


def test_the_description_is_of_all_addresses(server):
    status, value = ask(server, "/openapi.json", key=None)
    assert status == 200 and set(POSTS) <= set(value["paths"])
    names = json.dumps(value)
    assert "$defs" not in names
    for part in names.split('"#/components/schemas/')[1:]:
        assert part.split('"')[0] in value["components"]["schemas"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run whose model has read a few lines."""
    folder = tmp_path_factory.mktemp("model")
    write_base(folder, MODEL)
    return str(folder / "base")


def test_the_command_serves_and_ends_in_order(folder):
    """Answers a request, and at SIGTERM one that is under way, before it ends."""
    environment = os.environ | {"LMJAX_API_KEY": KEY, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lmjax.serving", folder, "port=0", "name=mine"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        lines = iter(process.stdout.readline, "")
        page = next(line for line in lines if "http" in line and "Ctrl-C" in line)
        url = page.split("page")[1].split()[0].split("#")[0].rstrip("/")

        class Here:
            pass

        here = Here()
        here.url = url
        status, value = ask(here, "/v1/models")
        assert status == 200 and value["data"][0]["id"] == "mine" and KEY not in page
        status, value = ask(here, "/v1/completions", {"prompt": "line", "max_tokens": 5})
        assert status == 200 and value["usage"]["completion_tokens"] <= 5
        status, value = ask(
            here,
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5},
        )
        assert status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_a_folder_that_cannot_be_served_says_why(tmp_path, capsys):
    for argv, text in [
        ([], "Which model?"),
        ([str(tmp_path)], str(tmp_path)),
        (["nowhere", "port=99999"], "port=99999"),
        (["x", "engine.slots=0"], "slots=0"),
        (["x", "max_tokens=0"], "max_tokens=0"),
    ]:
        with pytest.raises(SystemExit) as ended:
            run(Serve(), positional="model", argv=argv)
        assert ended.value.code == 2
        assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda folder: shutil.rmtree(folder / "checkpoints"), "checkpoint"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: cut(next(folder.glob("checkpoints/*/manifest.json"))), "manifest"),
    ],
)
def test_a_damaged_folder_says_why_before_the_port_opens(
    folder, tmp_path, monkeypatch, damage, text
):
    monkeypatch.setattr(local_server, "listen", lambda *_: pytest.fail("it listens"))
    shutil.copytree(folder, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    with pytest.raises(UserError, match=text):
        Serve(model=str(tmp_path / "damaged"), port=0).run()


def cut(path):
    """Leaves half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_port_that_is_taken_is_told(folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match="port="):
            Serve(model=folder, port=other.getsockname()[1]).run()
