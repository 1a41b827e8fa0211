"""The server of the page: what it answers, what it keeps, and whom it refuses."""

import json
import logging
import socket

import pytest
from starlette.testclient import TestClient

from lmjax.annotation import server
from lmjax.annotation.server import PAGE, listen, make_app, serve
from lmjax.config import UserError
from tests.lmjax.annotation.desks import LINES, make_desk, read_lines


@pytest.fixture
def desk(tmp_path):
    return make_desk(tmp_path)


@pytest.fixture
def client(desk):
    return TestClient(make_app(desk), base_url="http://127.0.0.1:8765")


def ranking(client, **values):
    """A judgement of the item that is shown to ada."""
    state = client.get("/state?annotator=ada").json()
    common = {"annotator": "ada", "turn": state["turn"], "item": state["item"]["id"]}
    return common | {"event": "ranked", "ranks": [0, 1, 2, 3]} | values


def test_the_page_is_one_file_that_loads_nothing(client):
    answer = client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    (nonce,) = {piece for piece in policy.split("'") if piece.startswith("nonce-")}
    assert answer.text.count(f'nonce="{nonce.removeprefix("nonce-")}"') == 2
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "__NONCE__" not in answer.text
    assert client.get("/").headers["content-security-policy"] != policy
    assert "http://" not in PAGE.read_text("utf-8") and "https://" not in PAGE.read_text("utf-8")
    for markup in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "onclick="):
        assert markup not in PAGE.read_text("utf-8")


def test_a_judgement_is_answered_with_the_next_item(client, tmp_path):
    before = client.get("/state?annotator=ada").json()
    assert before["item"]["messages"] == [{"role": "user", "text": LINES[0]["prompt"]}]
    answer = client.post("/judgements", json=ranking(client, reason="素"))
    assert answer.status_code == 200 and answer.json() == client.get("/state?annotator=ada").json()
    assert answer.json()["judged"] == 1
    (line,) = read_lines(tmp_path / "out/ada/judgements.jsonl")
    assert line["reason"] == "素" and line["item"] == before["item"]["id"]


def test_a_judgement_that_was_sent_again_is_kept_once(client, tmp_path):
    given = ranking(client)
    assert client.post("/judgements", json=given).status_code == 200
    again = client.post("/judgements", json=given)
    assert again.status_code == 409 and "nothing was saved twice" in again.json()["error"]
    assert again.json()["state"] == client.get("/state?annotator=ada").json()
    assert len(read_lines(tmp_path / "out/ada/judgements.jsonl")) == 1


def test_who_annotates_is_asked_or_set(client, desk):
    assert client.get("/state").json() == {"annotator": None}
    named = TestClient(make_app(desk, "Bo"), base_url="http://localhost")
    assert named.get("/state").json()["annotator"] == "bo"
    assert named.get("/state?annotator=Ada").json()["annotator"] == "ada"
    wrong = client.get("/state?annotator=../x")
    assert wrong.status_code == 400 and "a name has" in wrong.json()["error"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", ""]
)
def test_another_host_is_refused(client, host, tmp_path):
    """As a name that a stranger's page has point here sends it."""
    given = ranking(client)
    for answer in (
        client.get("/", headers={"Host": host}),
        client.get("/state?annotator=ada", headers={"Host": host}),
        client.post("/judgements", json=given, headers={"Host": host}),
    ):
        assert answer.status_code == 400 and "item" not in answer.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("host", ["localhost", "localhost:8765", "127.0.0.1"])
def test_this_machine_has_two_names(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 200


def test_another_page_may_not_judge(client, tmp_path):
    given = ranking(client)
    foreign = client.post("/judgements", json=given, headers={"Origin": "https://evil.example"})
    assert foreign.status_code == 403 and "evil.example" in foreign.json()["error"]
    # A form of another page can send text without asking the server first.
    plain = client.post(
        "/judgements", content=json.dumps(given), headers={"Content-Type": "text/plain"}
    )
    assert plain.status_code == 403
    assert not (tmp_path / "out").exists()
    own = {"Origin": "http://127.0.0.1:8765"}
    assert client.post("/judgements", json=given, headers=own).status_code == 200


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"\xff", b'{"annotator": 3}', b"[" * 99999])
def test_what_is_no_judgement_is_told(client, body):
    headers = {"Content-Type": "application/json"}
    answer = client.post("/judgements", content=body, headers=headers)
    assert answer.status_code == 400 and "not a judgement" in answer.json()["error"]


def test_too_much_is_refused(client, monkeypatch):
    monkeypatch.setattr(server, "LARGEST", 1000)
    answer = client.post("/judgements", json=ranking(client, reason="x" * 1000))
    assert answer.status_code == 400 and "not a judgement" in answer.json()["error"]


def test_a_wrong_judgement_says_what_is_wrong(client):
    answer = client.post("/judgements", json=ranking(client, ranks=[0, 1]))
    assert answer.status_code == 400 and "each of the 4 answers" in answer.json()["error"]


def test_a_disk_that_takes_nothing_is_told(client, tmp_path):
    given = ranking(client)
    (tmp_path / "out").write_text("no folder")
    answer = client.post("/judgements", json=given)
    assert answer.status_code == 400 and "cannot write" in answer.json()["error"]
    (tmp_path / "out").unlink()
    assert client.post("/judgements", json=given).status_code == 200


def test_it_listens_on_this_machine_alone():
    with listen(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=rf"port={port}: Address already in use; choose"):
            listen(port)
    with listen(port):
        pass  # free again


def test_work_that_fails_ends_the_server(desk):
    def work(stop):
        raise UserError("the model is gone")

    listener = listen(0)
    with pytest.raises(UserError, match="the model is gone"):
        serve(make_app(desk), listener, work)
    with pytest.raises(OSError), socket.create_connection(listener.getsockname(), 1):
        pass


def test_a_server_leaves_the_logging_of_other_libraries_alone(desk, monkeypatch):
    """absl's handler would close what was stderr when it was imported."""
    closed, handler = [], logging.NullHandler()
    monkeypatch.setattr(handler, "close", lambda: closed.append(True))

    def work(stop):
        raise UserError("that is all")

    with pytest.raises(UserError):
        serve(make_app(desk), listen(0), work)
    assert not closed
