"""The command: its settings, its mistakes, a model that answers, and a kill."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import jax
import pytest

from lmjax.annotation.__main__ import Annotate
from lmjax.annotation.server import listen
from lmjax.config import UserError
from lmjax.data.chat.comparisons import Comparisons
from lmjax.data.chat.messages import Message
from lmjax.data.chat.templates import PLAIN
from lmjax.generation import Sampling, load
from lmjax.launch import run
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.parallel import Mesh
from tests.lmjax.annotation.desks import LINES, read_lines, write_lines
from tests.lmjax.jobs.base_run import write_base

ROOT = Path(__file__).parents[3]
MODEL = TransformerConfig(  # the one of tests/lmjax/jobs/test_finetune.py: compiled once
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=96,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
)
PROMPTS = ({"prompt": "one"}, {"prompt": "two"}, LINES[1])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a run whose model has read a few lines."""
    folder = tmp_path_factory.mktemp("model")
    write_base(folder, MODEL)
    return str(folder / "base")


@pytest.fixture
def settings(model, tmp_path):
    """Of the command, with prompts that a model is to answer."""
    prompts = str(write_lines(tmp_path / "prompts.jsonl", PROMPTS))
    output = str(tmp_path / "out")
    return {"model": model, "prompts": prompts, "output": output, "port": 0, "max_tokens": 6}


def prepared(settings):
    """Items and answers, as the command makes them."""
    command = Annotate(**settings)
    items, sampler = command._prepare()
    return items, command._answers(items, Path(command.output), sampler)


def test_the_model_answers_in_the_format_of_its_folder(settings, model):
    """As `reply` writes them, one by one; a line that has answers keeps them."""
    with jax.set_mesh(Mesh().build()):
        items, answers = prepared(settings | {"temperature": 2.0, "samples": 3})
        assert [item.prompt for item in answers.missing()] == ["one", "two"]
        answers.write_missing(threading.Event())
        generator = load(model)
        for item in items[:2]:
            seed, replies = int(item.identity, 16) % 2**31, []
            for number in range(3):
                sampling = Sampling(temperature=2.0, seed=(seed + number) % 2**31)
                asked = [Message("user", item.prompt)]
                replies.append("".join(generator.reply(PLAIN, asked, sampling, 6)).strip())
            assert answers.of(item) == tuple(dict.fromkeys(filter(None, replies)))
        assert answers.of(items[2]) == tuple(LINES[1]["answers"])
        lines = read_lines(Path(settings["output"]) / "answers.jsonl")
        assert [line["item"] for line in lines] == [item.identity for item in items[:2]]
        assert lines[0]["sampled_by"]["temperature"] == 2.0
        assert prepared(settings | {"temperature": 2.0, "samples": 3})[1].missing() == []


def test_a_model_is_loaded_only_where_one_is_needed(settings):
    nowhere = settings | {"model": "nowhere"}
    with jax.set_mesh(Mesh().build()):
        assert len(prepared(nowhere | {"task": "write"})[0]) == 3
        write_lines(Path(settings["prompts"]), LINES)
        assert prepared(nowhere)[1].missing() == []


def test_a_prompt_that_leaves_no_room_is_told_before_the_page_opens(settings):
    write_lines(Path(settings["prompts"]), [{"prompt": "fine"}, {"prompt": "long " * 20}])
    with pytest.raises(UserError, match=r"prompts\.jsonl, line 2: the prompt has \d+ tokens"):
        Annotate(**settings).run()
    assert not Path(settings["output"]).exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": None}, "Which prompts"),
        ({"prompts": "nowhere.jsonl"}, r"no file matches 'nowhere\.jsonl'"),
        ({"model": None}, r"prompts\.jsonl, line 1: there are no 'answers', and no model"),
        ({"model": "nowhere"}, "nowhere"),
        ({"chat": "klingon"}, "there is no chat template 'klingon'"),
    ],
)
def test_what_cannot_serve_is_told(settings, change, words):
    with pytest.raises(UserError, match=words):
        Annotate(**settings | change).run()
    assert not Path(settings["output"]).exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": 1}, "samples=1: 2 or more"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"port": 70000}, "port=70000"),
        ({"annotator": "a/b"}, "a name has"),
        ({"temperature": -1.0}, "temperature"),
        ({"output": "gs://bucket/x"}, "output=gs://bucket/x: this is a URL"),
    ],
)
def test_wrong_settings_are_told(change, words):
    with pytest.raises(UserError, match=words):
        Annotate(**change)


def test_a_busy_port_is_told(settings):
    with listen(0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port={port}: Address already in use"):
            Annotate(**settings | {"port": port}).run()


def test_a_folder_that_is_in_use_is_told(settings):
    folder = Path(settings["output"])
    folder.mkdir()
    write_lines(Path(settings["prompts"]), LINES)
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is serving it"):
            Annotate(**settings).run()


def test_a_missing_extra_is_named(settings, monkeypatch, capsys):
    for name in ("starlette", "starlette.applications", "lmjax.annotation.server"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as ended:
        run(Annotate(**settings), [], positional=("model", "prompts"))
    assert ended.value.code == 2
    assert "pip install 'lmjax[serve]'" in capsys.readouterr().err


class Served:
    """The command in a process of its own."""

    def __init__(self, *arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
        command = [sys.executable, "-m", "lmjax.annotation", *arguments, "port=0"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.told = ""
        for line in self.process.stdout:
            self.told += line
            if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                self.url = found[0]
                return
        raise AssertionError(self.told)

    def ask(self, path, body=None):
        headers = {"Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, data, headers)
        ) as reply:
            return json.load(reply)

    def end(self, how):
        self.process.send_signal(how)
        rest, _ = self.process.communicate(timeout=60)
        return self.told + rest


@pytest.mark.slow
def test_a_kill_loses_nothing_and_ctrl_c_ends_well(tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", LINES)
    arguments = f"prompts={prompts}", f"output={tmp_path / 'out'}", "annotator=ada"
    first = Served(*arguments)
    try:
        state = first.ask("state")
        given = {"annotator": "ada", "turn": 0, "item": state["item"]["id"], "event": "ranked"}
        after = first.ask("judgements", given | {"ranks": [0, 1, 2, 3]})
    finally:
        first.end(signal.SIGKILL)
    second = Served(*arguments)
    try:
        assert second.ask("state") == after and after["judged"] == 1
        state = second.ask("state?annotator=bo")
        second.ask("judgements", given | {"annotator": "bo", "ranks": [3, 2, 1, 0]})
    finally:
        told = second.end(signal.SIGINT)
    assert second.process.returncode == 0, told
    assert "?annotator=ada" in told and "ada, bo: 1 items, 6 pairs" in told
    assert len(read_lines(tmp_path / "out/ada/comparisons.jsonl")) == 1


@pytest.mark.slow
def test_the_whole_way_with_a_model(model, tmp_path):
    """The page is there before the answers; what it shows is what the model wrote."""
    prompts = write_lines(tmp_path / "prompts.jsonl", PROMPTS)
    page = Served(model, str(prompts), f"output={tmp_path / 'out'}", "max_tokens=6")
    try:
        begin = time.monotonic()
        while (state := page.ask("state?annotator=ada"))["waiting"]:
            assert time.monotonic() - begin < 120
            time.sleep(0.2)
        answers = state["item"]["answers"]
        given = {"annotator": "ada", "turn": 0, "item": state["item"]["id"], "event": "ranked"}
        page.ask("judgements", given | {"ranks": [*range(len(answers))]})
    finally:
        told = page.end(signal.SIGINT)
    assert page.process.returncode == 0 and "4 to each of 2 prompts" in told
    (line,) = read_lines(tmp_path / "out/ada/comparisons.jsonl")
    assert [line["answers"][number] for number in line["shown"]] == answers
    (first, *_) = read_lines(tmp_path / "out/answers.jsonl")
    assert (line["prompt"], line["answers"]) == ("one", first["answers"])
    (document, *_) = Comparisons(path=str(tmp_path / "out/*/comparisons.jsonl")).documents()
    assert answers[0] in document.text
