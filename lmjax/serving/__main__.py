"""Serves a model to programs that speak OpenAI's interface, and on a chat page.

python -m lmjax.serving runs/quickstart
python -m lmjax.serving models/Qwen3-8B port=9000 engine.slots=16
python -m lmjax.serving Qwen3-8B-Q8_0.gguf
python -m lmjax.serving models/base adapters=runs/style,runs/law engine.guesses=4
python -m lmjax.serving models/Qwen3-8B mesh.tensor=4 mesh.data=2   # two replicas, 4 devices each
python -m lmjax.serving models/t5-base       # blanks: POST /v1/fill
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax

from lmjax.config import UserError, config
from lmjax.console import RunLog, make_console
from lmjax.data.chat.messages import ChatFormat
from lmjax.generation.chat import chat_format, check_chat
from lmjax.generation.run import load
from lmjax.generation.text import TextGenerator
from lmjax.interop.gguf_source import as_folder
from lmjax.launch import import_modules, run
from lmjax.parallel import Mesh, serving_layout
from lmjax.remote import check_path, local_copy
from lmjax.serving.settings import EngineSettings

if TYPE_CHECKING:
    from lmjax.serving.served_model import ServedModel

KEY = "LMJAX_API_KEY"  # variable of the environment that the key is taken from


@config
class Serve:
    """A server of one model, and of its adapters."""

    model: str | None = None  # the run folder, the model folder, or the GGUF file
    name: str | None = None  # that requests call it by; none: the name of folder or file
    # folders of LoRA adapters of the model, as PEFT writes them; each is served by its folder's
    # name
    adapters: tuple[str, ...] = ()
    host: str = "127.0.0.1"  # address that it listens on; 0.0.0.0: others reach it too
    port: int = 8000  # 0: one that is free
    # key that requests have to bring; none: that of $LMJAX_API_KEY, or one that is drawn and told;
    # empty: none is asked for
    api_key: str | None = None
    chat: str = "true"  # chat format: true, the folder's own or its family's; or the name of one
    max_tokens: int = 2048  # most tokens of an answer
    max_bytes: int = 1 << 20  # of a request
    engine: EngineSettings = EngineSettings()
    # devices of each model, fsdp x tensor, and data replicas of it behind one queue
    mesh: Mesh = Mesh(fsdp=1)
    # folder of a smaller model with the same tokens, which guesses engine.guesses tokens ahead;
    # none: they are guessed from the text
    draft: str | None = None
    # seconds between two looks for a newer checkpoint of the run, which then takes the place; 0:
    # none
    reload: float = 0.0
    grace: float = 30.0  # seconds that answers under way have when the server is told to stop
    # what is computed in; none: what the run was trained in, but float32 on a CPU
    dtype: Literal["float32", "bfloat16"] | None = None
    imports: tuple[str, ...] = ()  # modules of your own whose classes the run has

    def validate(self) -> None:
        """Raises UserError for settings that no server could satisfy."""
        check_path(self.model or "", "model")
        check_path(self.draft or "", "draft")
        if self.draft is not None and not self.engine.guesses:
            raise UserError("draft: it guesses engine.guesses tokens; say how many, 4 for instance")
        if not 0 <= self.port < 2**16:
            raise UserError(f"port={self.port}: must be from 0 to {2**16 - 1}")
        for name in ("max_tokens", "max_bytes"):
            if (number := getattr(self, name)) < 1:
                raise UserError(f"{name}={number}: must be 1 or more")
        for name in ("reload", "grace"):
            if not (seconds := getattr(self, name)) >= 0:
                raise UserError(f"{name}={seconds}: must be 0 or more")
        if self.api_key is not None and not self.api_key.isascii():
            raise UserError("api_key: must be of ASCII characters")

    def run(self) -> None:
        """Serves until Ctrl-C or SIGTERM.

        Raises:
            UserError: the model or the settings cannot serve; nothing listens then.
        """
        try:
            from lmjax.serving.app import LOCAL, make_app
            from lmjax.serving.local_server import listen, serve
            from lmjax.serving.start import served_step, serving_meshes, watch_run
        except ImportError as error:
            raise UserError(
                f"the server needs Starlette, uvicorn and pydantic ({error}): pip install"
                " 'lmjax[serve]'"
            ) from None
        if self.model is None:
            raise UserError("Which model? For instance: python -m lmjax.serving runs/quickstart")
        if jax.process_count() > 1:
            raise UserError("a server needs all devices in one process")
        import_modules(self.imports)
        step = served_step(self.model) if self.reload else None
        meshes = serving_meshes(self.mesh, jax.devices())
        mesh = meshes[0]
        with jax.set_mesh(mesh):
            served = self.opened(meshes)
        key = self.key()
        local = self.host in ("127.0.0.1", "localhost", "::1")
        app = make_app(served, key, self.max_bytes, LOCAL if local else None)
        with closing(listen(self.port, self.host)) as listener:
            self._tell(listener.getsockname()[1], key, served.chat)

            def work(stop: threading.Event) -> None:
                threading.Thread(target=lambda: (stop.wait(), served.worker.wake())).start()
                with jax.set_mesh(mesh):  # each thread has its own
                    served.worker.run(stop)

            with watch_run(self.model, served, mesh, step, self.reload, self.dtype):
                serve(app, listener, work, "engine", self.grace)

    def opened(self, meshes: Sequence[jax.sharding.Mesh]) -> ServedModel:
        """The model, ready to be served; the first of the meshes must be set.

        Args:
          meshes: of `serving_meshes`.

        Raises:
          UserError: the model or the settings cannot serve.
        """
        from lmjax.serving.start import served_model

        layout, sizes = serving_layout(), (self.engine, self.max_tokens)
        with as_folder(local_copy(self.model, "model")) as folder:
            text = load(folder, layout, self.dtype)
            chat = conversation_format(folder, text, self.chat)
        draft = None if self.draft is None else load(self.draft, layout, self.dtype)
        return served_model(self.served_name, text, chat, *sizes, self.adapters, draft, meshes)

    @property
    def served_name(self) -> str:
        """Name of the model in requests."""
        return self.name or Path(self.model.rstrip("/")).name

    def key(self) -> str | None:
        """The key that requests bring; None: none is asked for."""
        given = self.api_key if self.api_key is not None else os.environ.get(KEY)
        return secrets.token_urlsafe(24) if given is None else given or None

    def _tell(self, port: int, key: str | None, chat: ChatFormat | str) -> None:
        log = RunLog(make_console())
        log.title("Serving", self.served_name)
        log.fact("chat format", chat if isinstance(chat, str) else chat.title)
        page = f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{port}/"
        log.fact("interface", f"{page}v1   (OpenAI's)")
        if key is None:
            log.fact("key", "none is asked for")
        elif self.api_key is None and KEY not in os.environ:
            log.fact("key", key)
            page += f"#key={key}"
        log.fact("page", f"{page}   Ctrl-C ends it")


def conversation_format(folder: Path, text: TextGenerator, name: str) -> ChatFormat | str:
    """The chat format of a folder; where none is known, and none is named, the reason."""
    if text.filling is not None:
        return "the model fills blanks, and has no conversations: use /v1/fill"
    check_chat(folder, name)
    try:
        return chat_format(folder, text.tokenizer, name)
    except UserError as error:
        if name != "true":
            raise
        return str(error)


if __name__ == "__main__":
    run(Serve(), positional="model")
