"""Desks that the tests of annotations share."""

import json
import threading
from contextlib import contextmanager, suppress

from lmjax.annotation.answers import ItemAnswers
from lmjax.annotation.desk import Desk
from lmjax.annotation.items import read_items
from lmjax.annotation.server import listen, make_app, serve

LINES = (
    {"prompt": "Why is the sky blue?", "answers": ["zero", "one", "two", "three"]},
    {"prompt": [{"role": "user", "content": "Hi"}], "answers": ["<b>hello</b>", "hey"]},
    {"prompt": "素数とは?", "answers": ["a", "b", "c"]},
)


def write_lines(path, lines=LINES):
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return path


def make_desk(folder, lines=LINES, task="rank", seed=0):
    """A desk over `lines` with answers, whose judgements are in folder/out."""
    folder.mkdir(exist_ok=True)
    items = read_items(str(write_lines(folder / "prompts.jsonl", lines)), lambda item: None)
    return Desk(items, ItemAnswers(items, folder / "out"), folder / "out", task, seed)


def read_lines(path):
    """The objects of a file of JSON lines; none where there is no file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def judge(desk, annotator, event, **values):
    """Submits a judgement of the item that the desk shows; returns the state after it."""
    state = desk.state(annotator)
    item = state["item"] and state["item"]["id"]
    return desk.submit(annotator, {"turn": state["turn"], "item": item, "event": event, **values})


class Over(Exception):
    """Ends the server of a test."""


@contextmanager
def served(desk, annotator=None):
    """The address of a server of the desk, which runs in a thread."""
    listener, end = listen(0), threading.Event()
    port = listener.getsockname()[1]

    def work(stop):
        end.wait()
        raise Over

    def run():
        with suppress(Over):
            serve(make_app(desk, annotator), listener, work)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        end.set()
        thread.join()
