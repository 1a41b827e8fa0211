"""Connections between the first process of a run and the others, over which they exchange words.

A word is a JSON object on a line. The first process listens at the port after the coordinator's;
what is sent to it and is no such word is dropped.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable

from lmjax.launch.cluster import ProcessGroup

LONGEST = 1 << 14  # bytes of a word
AGAIN = 1.0  # seconds until a process that is not answered calls again

# (process, what it says; None: the connection broke)
Hear = Callable[[int, dict | None], None]


def port_of(cluster: ProcessGroup) -> tuple[str, int]:
    """Address at which the first process listens."""
    host, _, port = cluster.address.rpartition(":")
    return host.strip("[]"), int(port) + 1


class Station:
    """The first process's end: one thread reads what all others say."""

    def __init__(self, cluster: ProcessGroup, hear: Hear) -> None:
        """`hear` is called in that thread."""
        self.cluster, self.hear = cluster, hear
        self._selector = selectors.DefaultSelector()
        self._callers: dict[socket.socket, _Caller] = {}
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None

    def open(self) -> None:
        """Begins to listen; OSError where the port is taken."""
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._listener = socket.create_server(
            ("", port_of(self.cluster)[1]),
            family=family,
            dualstack_ipv6=family == socket.AF_INET6,
            backlog=max(128, self.cluster.count),
        )
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        threading.Thread(target=self._serve, name="line", daemon=True).start()

    def send(self, word: dict) -> None:
        """Says a word to all who have called."""
        line = _line(word)
        with self._lock:
            callers = list(self._callers)
        for caller in callers:
            # A buffer that is full has an end which does not read: its silence will tell.
            with contextlib.suppress(OSError):
                caller.send(line)

    def close(self) -> None:
        """Hangs up."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            if self._listener is not None:
                self._listener.close()
            for caller in list(self._callers):
                caller.close()

    def _serve(self) -> None:
        while True:
            try:
                ready = self._selector.select()
            except (OSError, ValueError):
                return
            for key, _ in ready:
                with contextlib.suppress(OSError, ValueError, KeyError):
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._read(key.fileobj)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        with self._lock:
            self._callers[connection] = _Caller()
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        caller = self._callers[connection]
        try:
            data = connection.recv(LONGEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data and len(caller.rest) < LONGEST:
            for word in caller.words(data):
                index = word.get("index")
                if isinstance(index, int) and caller.index in (None, index):
                    caller.index = index
                    self.hear(index, word)
            return
        self._selector.unregister(connection)
        with self._lock:
            del self._callers[connection]
        connection.close()
        if caller.index is not None:
            self.hear(caller.index, None)


class Connection:
    """The end of a process that is not the first."""

    def __init__(self, cluster: ProcessGroup, hear: Hear) -> None:
        """`hear` is called in a thread, with 0 for the first process."""
        self.cluster, self.hear = cluster, hear
        self._socket: socket.socket | None = None
        self._over = False

    def open(self) -> None:
        """Begins to call the first process, again and again until it answers."""
        threading.Thread(target=self._listen, name="line", daemon=True).start()

    def send(self, word: dict) -> None:
        """Says a word to the first process, if it has answered."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendall(_line({"index": self.cluster.index, **word}))

    def close(self) -> None:
        """Hangs up."""
        self._over = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()

    def _listen(self) -> None:
        while self._socket is None and not self._over:
            try:
                connection = socket.create_connection(port_of(self.cluster), timeout=10)
            except OSError:
                time.sleep(AGAIN)
                continue
            connection.settimeout(None)
            self._socket = connection
        reader = _Caller()
        while not self._over:
            try:
                data = self._socket.recv(LONGEST)
            except OSError:
                data = b""
            if not data:
                break
            for word in reader.words(data):
                self.hear(0, word)
        if not self._over:
            self.hear(0, None)


class _Caller:
    """Messages that have come over a connection."""

    def __init__(self) -> None:
        self.index: int | None = None  # of the process at its other end
        self.rest = b""

    def words(self, data: bytes) -> list[dict]:
        """The words that are complete with this data."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                word = json.loads(line)
                if isinstance(word, dict):
                    found.append(word)
        return found


def _line(word: dict) -> bytes:
    return json.dumps(word).encode() + b"\n"
