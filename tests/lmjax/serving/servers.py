"""A server of a tiny model of bytes, which runs in threads of the test."""

import dataclasses
import functools
import json
import threading
from contextlib import contextmanager, suppress

import jax

from lmjax.config import replace
from lmjax.data.chat.templates import PLAIN
from lmjax.data.tokenizers.base import ByteTokenizer
from lmjax.generation import Generator
from lmjax.generation.text import TextGenerator
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    Rotary,
    TransformerConfig,
    initialize,
)
from lmjax.parallel import Mesh, generation_layout
from lmjax.serving.app import make_app
from lmjax.serving.local_server import listen, serve
from lmjax.serving.settings import EngineSettings
from lmjax.serving.start import served_model
from tests.larger import larger

KEY = "sk-of-the-tests"
MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=256,
    positions=None,
    attention=AttentionConfig(num_heads=2, head_dim=8, positions=Rotary()),
    feed_forward=FeedForwardConfig(size=32),
)
SETTINGS = EngineSettings(slots=4, cache_tokens=2048, page=8, chunk=64, queue=16)


@functools.cache
def mesh():
    """One device."""
    return Mesh(fsdp=1).build(jax.devices()[:1])


@functools.cache
def text_generator():
    """A model of random weights that writes bytes."""
    with jax.set_mesh(mesh()):
        _, params = initialize(MODEL, generation_layout(), jax.random.key(3))
        params = larger(params, 4, axes=2)
        return TextGenerator(Generator(MODEL, params), ByteTokenizer())


class Over(Exception):
    """Ends the server of a test."""


@dataclasses.dataclass
class TestServer:
    """A server that runs.

    Attributes:
      url: of it.
      model: that it serves.
      log: its lines.
    """

    __test__ = False

    url: str
    model: object
    log: list[str]

    @property
    def lines(self):
        """The lines of its log, as values."""
        return [json.loads(line) for line in self.log]

    def wait_idle(self, seconds=20.0):
        """Waits until nothing is held."""
        for _ in range(int(seconds / 0.05)):
            load = self.model.engine.load()
            if not (load.waiting or load.reading or load.writing or load.pages):
                return load
            threading.Event().wait(0.05)
        raise AssertionError(load)


@contextmanager
def served(text=None, chat=PLAIN, settings=SETTINGS, key=KEY, most_tokens=200, **changes):
    """A server of a model, which ends with the block."""
    with jax.set_mesh(mesh()):
        text = text or text_generator()
        model = served_model("tiny", text, chat, replace(settings, **changes), most_tokens)
    log, end, listener = [], threading.Event(), listen(0)
    app = make_app(model, key, most_bytes=100_000, log=log.append)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def work(stop):
        threading.Thread(target=lambda: (end.wait(), stop.set(), model.worker.wake())).start()
        with jax.set_mesh(mesh()):
            model.worker.run(stop)
        raise Over

    def run():
        with suppress(Over):
            serve(app, listener, work, grace=1.0)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield TestServer(url, model, log)
    finally:
        end.set()
        thread.join()
