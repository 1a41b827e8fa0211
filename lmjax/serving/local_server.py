"""A socket and a loop of uvicorn's, beside a thread that works."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette

from lmjax.config import UserError

HOST = "127.0.0.1"


def listen(port: int, host: str = HOST) -> socket.socket:
    """A socket that listens on `port`; 0 takes one that is free.

    Args:
      port: its number.
      host: address of this machine that others reach it by; as it stands, this machine alone does.

    Raises:
      UserError: another program has the port, or it is not allowed.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise UserError(f"host={host}: {error.strerror}") from None
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UserError(
            f"port={port}: {error.strerror}; choose another, or port=0 for one that is free"
        ) from None
    return listener


def serve(
    app: Starlette,
    listener: socket.socket,
    work: Callable[[threading.Event], None],
    name: str = "work",
    grace: float | None = None,
) -> None:
    """Serves until Ctrl-C or SIGTERM, while a thread does some work.

    Args:
      app: of `make_app`.
      listener: of `listen`; is closed at the end.
      work: ends soon after the event that it is given is set. Where it fails, serving ends.
      name: of the thread.
      grace: seconds that responses under way have at the end; None: any.

    Raises:
      Exception: of `work`.
    """
    quiet = {"log_level": "warning", "access_log": False, "server_header": False}
    settings = {"lifespan": "off", "ws": "none", "timeout_graceful_shutdown": grace, **quiet}
    server = uvicorn.Server(uvicorn.Config(app, **settings))
    stop, failures = threading.Event(), []

    def work_on() -> None:
        try:
            work(stop)
        except Exception as error:
            failures.append(error)
            server.should_exit = True

    thread = threading.Thread(target=work_on, name=name)
    thread.start()
    try:
        with _interrupted_by(signal.SIGTERM):  # which uvicorn raises again when it has ended
            server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # the usual way to end
    finally:
        stop.set()
        thread.join()
        listener.close()
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _interrupted_by(number: signal.Signals) -> Iterator[None]:
    """Has a signal do what Ctrl-C does; in other threads than the main one it stays as it is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)
