"""A socket and a loop of uvicorn's, beside a thread that works."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from lmjax.config import UserError

HOST = "127.0.0.1"
PATIENCE = 60.0  # seconds for which a client may send no request, or read nothing of a response


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
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it
        seconds = int(1000 * PATIENCE)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds)
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
    settings = {"lifespan": "off", "ws": "none", "http": PatientProtocol, **quiet}
    settings["timeout_graceful_shutdown"] = grace
    # Its own configuration of logging closes the handlers of all other libraries, and absl's closes
    # the stream that was stderr when it was imported.
    settings["log_config"] = None
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


class PatientProtocol(H11Protocol):
    """Speaks HTTP, and closes a connection whose client has sent no whole head of a request.

    uvicorn alone would wait for ever for the first one, and for the rest of one that has begun.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._forget()
        super().connection_lost(exc)

    def _expect(self) -> None:
        """Waits for the rest of a head, from the moment that the first wait began."""
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._timer is None:
            self._timer = self.loop.call_later(PATIENCE, self.timeout_keep_alive_handler)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


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
