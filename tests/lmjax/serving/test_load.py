"""The server under many clients, good and bad, and with clients that only hold on to it.

`python -m benchmarks.serving_load` is the same with 200 clients, for a minute.
"""

import importlib
import json
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from lmjax.config import UserError
from lmjax.generation.stream import TextStream
from lmjax.serving import api, local_server
from tests.lmjax.serving.engines import assert_idle
from tests.lmjax.serving.servers import KEY, served, text_generator

ROOT = Path(__file__).parents[3]
LONG = {"prompt": "a", "max_tokens": 190, "stream": True, "logprobs": 5, "n": 4, "temperature": 0}


@pytest.mark.slow
def test_many_clients_leave_nothing_behind(monkeypatch, tmp_path):
    """Memory may grow more than in a minute's run: not all shapes are compiled before."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    module = importlib.import_module("benchmarks.serving_load")
    settings = module.ServingLoad(clients=20, seconds=5.0, warm=5.0, queue=12, growth=64.0)
    result = module.put_under_load(settings, tmp_path)
    assert result.faults == []
    assert result.numbers["requests"] > 20 and result.numbers["pages held after"] == 0
    statuses = {status for one in result.counts.values() for status in one}
    assert {"200", "400", "left"} <= statuses


def test_what_is_held_is_told(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    held = importlib.import_module("benchmarks.serving_load").held
    before = {"memory": 100.0, "files": 9} | dict.fromkeys(("waiting", "reading", "writing"), 0)
    before["pages"] = 0
    assert held(before, before | {"memory": 110.0, "files": 10}, 16.0) == []
    after = before | {"memory": 120.0, "files": 14, "pages": 3}
    names = [line.split(":")[0] for line in held(before, after, 16.0)]
    assert names == ["pages", "open files", "memory"]


@contextmanager
def connected(server, size=None):
    """A connection, with a small buffer of what is received where `size` says so."""
    with socket.socket() as connection:
        if size:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", urlsplit(server.url).port))
        yield connection


def head(length, path="/v1/completions"):
    """The head of a request with a body."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEY}"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def ended(connection):
    """All that a connection gives until the server ends it."""
    found = b""
    try:
        while block := connection.recv(65_536):
            found += block
    except ConnectionResetError:
        pass
    return found


def test_connections_that_send_nothing_are_closed(monkeypatch):
    """No head, half of one, and half of one after a request; one in time is answered."""
    monkeypatch.setattr(local_server, "PATIENCE", 0.5)
    with served() as server:
        with connected(server) as connection:
            assert ended(connection) == b""
        with connected(server) as connection:
            connection.sendall(head(3)[:40])
            assert ended(connection) == b""
        with connected(server) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
            connection.sendall(b"GET /heal")
            assert ended(connection) == b""
        with connected(server) as connection:
            time.sleep(0.2)
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")


def test_a_body_that_does_not_come_is_refused(monkeypatch):
    monkeypatch.setattr(api, "PATIENCE", 0.3)
    with served() as server, connected(server) as connection:
        connection.sendall(head(100) + b'{"prompt": ')
        found = connection.recv(65_536)
        assert found.startswith(b"HTTP/1.1 408")
        assert json.loads(found.split(b"\r\n\r\n", 1)[1])["error"]["message"]


def test_who_reads_nothing_holds_up_nobody(monkeypatch):
    """Its answers end, their slots and pages are free, and its connection is closed."""
    monkeypatch.setattr(local_server, "PATIENCE", 1.0)
    open_ones, before = [], local_server.PatientProtocol.connection_lost

    def lost(self, exc):
        open_ones.remove(self)
        before(self, exc)

    made = local_server.PatientProtocol.connection_made

    def opened(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        open_ones.append(self)
        made(self, transport)

    monkeypatch.setattr(local_server.PatientProtocol, "connection_made", opened)
    monkeypatch.setattr(local_server.PatientProtocol, "connection_lost", lost)
    body = json.dumps(LONG).encode()
    with served() as server, connected(server, 2048) as connection:
        connection.sendall(head(len(body)) + body)
        time.sleep(0.3)
        server.wait_idle()
        for _ in range(200):
            if not open_ones:
                break
            time.sleep(0.1)
        assert open_ones == []
        assert_idle(server.model.engine)


def test_a_long_stop_string_costs_nothing():
    """Each token took as many steps as the square of its length, in the engine's thread."""
    text = TextStream(text_generator().tokenizer, ("b" * 2_000_000, "xy"))
    assert text.add([97]) == "a" and text.add([120]) == ""
    assert text.add([98]) == "x" and text.rest() == "b"


def test_schemas_that_nothing_satisfies_are_refused():
    """They let the model write anything."""
    with served() as server:
        for schema in ({"$ref": "#"}, {"anyOf": [{"$ref": "#"}]}):
            with pytest.raises(UserError, match="JSON schema cannot be held to"):
                server.model.grammars.of_schema(schema, [256])
