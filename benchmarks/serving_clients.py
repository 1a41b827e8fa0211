"""Clients of a server that is under test: good ones, slow ones, ones that leave, and wrong ones.

A client asks one thing after another. Each kind of request says which statuses it may be answered
with; anything else, and an answer that is not whole, is a fault.
"""

import asyncio
import contextlib
import dataclasses
import json
import random
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import h11

BUSY = 429  # a full queue: the client has to come again
SERVED = (200, BUSY)


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
      path: of the address.
      body: bytes that are sent; a value is sent as JSON; None: it is a GET.
      chunked: send the body without its length.
      key: send the key.
    """

    path: str
    body: Any = None
    chunked: bool = False
    key: bool = True

    @property
    def data(self) -> bytes:
        """The body as it is sent."""
        if self.body is None or isinstance(self.body, bytes):
            return self.body or b""
        return json.dumps(self.body).encode()


@dataclasses.dataclass(frozen=True)
class Reply:
    """A response that is whole."""

    status: int
    body: bytes

    @property
    def value(self) -> Any:
        """The JSON value."""
        return json.loads(self.body)


class Fault(Exception):
    """The server did not do what it should have."""


class Connection:
    """A connection to the server, over which requests go one after another."""

    def __init__(self, address: tuple[str, int], key: str, pause: float = 0.0, portion: int = 0):
        """Takes the address and the key; a slow reader pauses after each portion of bytes."""
        self._address, self._key = address, key
        self._pause, self._portion = pause, portion or 65_536
        self._socket: socket.socket | None = None
        self._http = h11.Connection(h11.CLIENT)

    async def __aenter__(self) -> "Connection":
        self._socket = socket.socket()
        if self._pause:  # what is not read then waits at the server
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self._socket.setblocking(False)
        await asyncio.get_running_loop().sock_connect(self._socket, self._address)
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._socket.close()

    def vanish(self, abrupt: bool) -> None:
        """Closes the connection, perhaps with a reset."""
        if abrupt:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    async def send(self, ask: Ask) -> None:
        """Sends a request."""
        await self._send(self._written(self._http, ask))

    async def send_together(self, asks: Sequence[Ask]) -> None:
        """Sends several requests before a response is read."""
        await self._send(b"".join(self._written(h11.Connection(h11.CLIENT), one) for one in asks))

    async def receive(self) -> bytes:
        """Some bytes of a response; none at its end."""
        await asyncio.sleep(self._pause)
        return await asyncio.get_running_loop().sock_recv(self._socket, self._portion)

    async def reply(self) -> Reply:
        """The response to the last request. Fault: it is not whole."""
        status, parts = 0, []
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                raise Fault(f"a response of status {status} is not whole: {error}") from None
            if event is h11.NEED_DATA:
                self._http.receive_data(await self.receive())
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                parts.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                return Reply(status, b"".join(parts))
            elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                raise Fault("the connection ended without a response")

    async def replies(self, asks: Sequence[Ask]) -> list[Reply]:
        """The responses to requests that were sent together, in their order."""
        found, rest = [], b""
        for ask in asks:
            self._http = h11.Connection(h11.CLIENT)
            self._written(self._http, ask)
            if rest:
                self._http.receive_data(rest)
            found.append(await self.reply())
            rest = self._http.trailing_data[0]
        return found

    async def ask(self, ask: Ask) -> Reply:
        """Sends a request, and returns the response."""
        await self.send(ask)
        return await self.reply()

    @property
    def reusable(self) -> bool:
        """Returns whether another request may follow."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    async def _send(self, data: bytes) -> None:
        # A refusal may be there all the same.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            await asyncio.get_running_loop().sock_sendall(self._socket, data)

    def _written(self, http: h11.Connection, ask: Ask) -> bytes:
        headers = [("Host", "{}:{}".format(*self._address))]
        if ask.key:
            headers.append(("Authorization", f"Bearer {self._key}"))
        if ask.body is not None:
            length = ("Content-Length", str(len(ask.data)))
            headers.append(("Transfer-Encoding", "chunked") if ask.chunked else length)
        method = "GET" if ask.body is None else "POST"
        events = [h11.Request(method=method, target=ask.path, headers=headers)]
        events += [h11.Data(data=ask.data)] if ask.data else []
        return b"".join(http.send(event) for event in [*events, h11.EndOfMessage()])


@dataclasses.dataclass
class Load:
    """Requests of the clients, and their outcome.

    Attributes:
      address, key: of the server.
      most_bytes: of a body that it takes.
      end: by `time.monotonic`; no request begins later.
      counts: responses by kind and status, those that were not waited for under "left".
      faults: descriptions of the first ones.
      seconds: from each request to its whole response.
    """

    address: tuple[str, int]
    key: str
    most_bytes: int
    end: float
    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    faults: list[str] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def count(self, kind: str, status: int | str) -> None:
        """Counts what became of a request."""
        of_kind = self.counts.setdefault(kind, {})
        of_kind[str(status)] = of_kind.get(str(status), 0) + 1

    def check(self, kind: str, reply: Reply, allowed: Sequence[int]) -> None:
        """Counts a response. Fault: it is not one of those allowed, or has not the form of it."""
        self.count(kind, reply.status)
        shown = reply.body[:300].decode("utf-8", "replace")
        if reply.status not in allowed:
            raise Fault(f"status {reply.status}, not {allowed}: {shown}")
        if reply.status != 200:
            error = reply.value.get("error", {})
            if set(error) != {"message", "type", "param", "code"} or not error["message"]:
                raise Fault(f"status {reply.status} without the shape of an error: {shown}")


Kind = Callable[[Load, random.Random], Awaitable[None]]


def _text(draw: random.Random, most: int = 60) -> str:
    return "".join(draw.choice("the list of all words and ") for _ in range(draw.randint(1, most)))


def _written_body(draw: random.Random, **changes: Any) -> Ask:
    settings = {"max_tokens": draw.randint(1, 40), "temperature": draw.choice((0, 1.0))}
    return Ask("/v1/completions", {"prompt": _text(draw), **settings, **changes})


async def whole(load: Load, draw: random.Random) -> None:
    """Whole answers, several of them over one connection."""
    async with Connection(load.address, load.key) as connection:
        for _ in range(draw.randint(1, 4)):
            number = draw.randint(1, 3)
            reply = await connection.ask(
                _written_body(draw, n=number, logprobs=draw.choice((0, 2)))
            )
            load.check("whole", reply, SERVED)
            if reply.status == 200 and len(reply.value["choices"]) != number:
                raise Fault("not as many answers as were asked for")
            if not connection.reusable:
                return


async def stream(load: Load, draw: random.Random) -> None:
    """An answer as a stream."""
    async with Connection(load.address, load.key) as connection:
        reply = await connection.ask(_written_body(draw, stream=True))
        load.check("stream", reply, SERVED)
        check_stream(reply)


async def slow(load: Load, draw: random.Random) -> None:
    """A long stream that is read slowly."""
    async with Connection(load.address, load.key, 0.02, 1500) as connection:
        reply = await connection.ask(_written_body(draw, stream=True, logprobs=5, n=2))
        load.check("slow", reply, SERVED)
        check_stream(reply)


async def vanish(load: Load, draw: random.Random) -> None:
    """A client that leaves in the middle of a stream, or before an answer."""
    streamed = draw.random() < 0.6
    async with Connection(load.address, load.key) as connection:
        await connection.send(_written_body(draw, stream=streamed, max_tokens=60, n=2))
        if streamed:
            await connection.receive()
        await asyncio.sleep(draw.random() * 0.3)
        connection.vanish(abrupt=draw.random() < 0.5)
    load.count("vanish", "left")


async def together(load: Load, draw: random.Random) -> None:
    """Requests that are sent together; their responses come in order."""
    tokens = [draw.randrange(97, 122) for _ in range(draw.randint(1, 9))]
    asks = [
        Ask("/v1/models"),
        Ask("/detokenize", {"tokens": tokens}),
        Ask("/v1/completions", {"prompt": 3}),
        Ask("/v1/models/other"),
    ]
    draw.shuffle(asks)
    wanted = {"/v1/models": 200, "/detokenize": 200, "/v1/completions": 400}
    async with Connection(load.address, load.key) as connection:
        await connection.send_together(asks)
        for ask, reply in zip(asks, await connection.replies(asks)):
            load.check("together", reply, (wanted.get(ask.path, 404),))
            if ask.path == "/detokenize" and reply.value["prompt"] != bytes(tokens).decode():
                raise Fault("responses are not in the order of the requests")


def _chat(text: str, **settings: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **settings}


def _single(make: Callable[[Load, random.Random], tuple[Ask, Sequence[int]]], name: str) -> Kind:
    async def kind(load: Load, draw: random.Random) -> None:
        ask, allowed = make(load, draw)
        async with Connection(load.address, load.key) as connection:
            load.check(name, await connection.ask(ask), allowed)

    kind.__doc__ = name
    return kind


def _other(load: Load, draw: random.Random) -> tuple[Ask, Sequence[int]]:
    text = _text(draw, 30)
    asks = [
        Ask("/v1/chat/completions", _chat(text, max_tokens=8)),
        Ask("/v1/embeddings", {"input": [text] * draw.randint(1, 3)}),
        Ask("/tokenize", {"prompt": text}),
        Ask("/v1/models"),
        Ask("/metrics"),
    ]
    return draw.choice(asks), SERVED


def _wrong(load: Load, draw: random.Random) -> tuple[Ask, Sequence[int]]:
    completion = {"prompt": "a", "max_tokens": 2}
    cases = [
        (b"{", 400),
        (b"", 400),
        (b"[" * 20_000, 400),
        (b"\xff\x00", 400),
        (b'{"prompt": "\\ud800"}', 400),
        (completion | {"temperature": "warm"}, 400),
        (completion | {"temperature": -1}, 400),
        (completion | {"n": 10**30}, 400),
        (completion | {"max_tokens": 10**6}, 400),
        (completion | {"logit_bias": {"x": 1}}, 400),
        (completion | {"stop": [3]}, 400),
        ({"prompt": {"a": []}}, 400),
        ({"prompt": "word " * 4000}, 400),
        (completion | {"model": "other"}, 404),
    ]
    body, status = draw.choice(cases)
    return Ask("/v1/completions", body, chunked=draw.random() < 0.2), (status,)


def _refused(load: Load, draw: random.Random) -> tuple[Ask, Sequence[int]]:
    completion = {"prompt": "a", "max_tokens": 2}
    cases = [
        (Ask("/v1/completions", completion, key=False), 401),
        (Ask("/metrics", key=False), 401),
        (Ask("/v1/nothing"), 404),
        (Ask("/v1/chat/completions"), 405),
    ]
    ask, status = draw.choice(cases)
    return ask, (status,)


def _large(load: Load, draw: random.Random) -> tuple[Ask, Sequence[int]]:
    size = load.most_bytes + draw.choice((1, 1000, 4 * load.most_bytes))
    return Ask("/v1/completions", b" " * size, chunked=draw.random() < 0.5), (413,)


# With how often each comes.
KINDS: dict[Kind, int] = {
    whole: 6,
    stream: 5,
    slow: 2,
    vanish: 4,
    together: 2,
    _single(_other, "other calls"): 4,
    _single(_wrong, "wrong body"): 5,
    _single(_refused, "refused"): 2,
    _single(_large, "too large"): 1,
}


def check_stream(reply: Reply) -> None:
    """Checks the form of a stream. Fault: it does not end as one, or tells of a failure."""
    if reply.status != 200:
        return
    events = reply.body.decode().removesuffix("\n\n").split("\n\n")
    values = [json.loads(one.removeprefix("data: ")) for one in events if "[DONE]" not in one]
    if errors := [value["error"] for value in values if "error" in value]:
        if errors[0]["code"] != "queue_full":
            raise Fault(f"a stream broke off: {errors[0]}")
    elif events[-1] != "data: [DONE]":
        raise Fault(f"a stream does not end: {events[-1][:200]}")


async def client(load: Load, number: int, patience: float = 120.0) -> None:
    """Asks until the time is over.

    Args:
      load: takes what comes of it.
      number: of the client, which says what it asks.
      patience: seconds after which a response counts as missing.
    """
    draw = random.Random(number)
    kinds, weights = list(KINDS), list(KINDS.values())
    while time.monotonic() < load.end:
        (kind,) = draw.choices(kinds, weights)
        name = (kind.__doc__ or "").split(".")[0]
        begin = time.monotonic()
        try:
            await asyncio.wait_for(kind(load, draw), patience)
            load.seconds.append(time.monotonic() - begin)
        except TimeoutError:
            load.faults.append(f"{name}: no response in {patience} s")
        except Fault as fault:
            load.faults.append(f"{name}: {fault}")
        except (OSError, ValueError, KeyError) as error:
            load.faults.append(f"{name}: {type(error).__name__}: {error}")
        await asyncio.sleep(draw.random() * 0.1)


def tasks(load: Load, clients: int) -> Iterator[Awaitable[None]]:
    """The clients."""
    return (client(load, number) for number in range(clients))
