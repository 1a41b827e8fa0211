"""The calls of the interface: each reads a body, asks the model, and answers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from lmjax.config import UserError
from lmjax.generation.fill import MaskedTokenInfiller
from lmjax.serving.conversation import own_messages
from lmjax.serving.engine import UnknownModel
from lmjax.serving.errors import Refusal, error_body, invalid, refused
from lmjax.serving.metrics import ServerMetrics
from lmjax.serving.replicas import AnyEngine
from lmjax.serving.replies import CallReply, ChatReply, CompletionReply
from lmjax.serving.request import STOPS, WAITED
from lmjax.serving.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    FillBody,
    RequestBody,
    TokenizeBody,
)
from lmjax.serving.served_model import PreparedText, ServedModel, drawing
from lmjax.serving.text_answer import AnswerPiece, TextAnswer
from lmjax.serving.worker import QueueFull

Body = TypeVar("Body", bound=RequestBody)
Made = TypeVar("Made")
STARTED = int(time.time())
PATIENCE = 60.0  # seconds for which a body may be on its way


@dataclasses.dataclass(frozen=True)
class ServerApi:
    """The handlers of all addresses below /v1, and of what is beside them.

    Attributes:
      model: that is served.
      metrics: of the server.
      most_bytes: of a body.
    """

    model: ServedModel
    metrics: ServerMetrics
    most_bytes: int

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await self._read(request, ChatBody)
        texts = await self._made(lambda: self.model.prepare_chat(body, client_of(request)), body)
        lengths = [len(one.requests[0].tokens) for one in texts]
        return await self._answer(request, body, texts, ChatReply(self.model, body, lengths))

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = await self._read(request, CompletionBody)
        texts = await self._made(
            lambda: self.model.prepare_completion(body, client_of(request)), body
        )
        prompts = [one.requests[0].tokens for one in texts]
        reply = CompletionReply(self.model, body, prompts)
        return await self._answer(request, body, texts, reply)

    async def embed(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        body = await self._read(request, EmbeddingBody)
        self._check_name(body.model)
        if body.dimensions is not None:
            text = "dimensions: vectors have the model's width; leave it out"
            raise Refusal(text, param="dimensions")
        texts = [body.input] if isinstance(body.input, str) else body.input
        vectors, count = await self._called(lambda: self.model.embed(texts), body)
        data = [
            {"object": "embedding", "index": index, "embedding": _written(vector, body)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        name = body.model or self.model.name
        return JSONResponse({"object": "list", "data": data, "model": name, "usage": usage})

    async def fill(self, request: Request) -> Response:
        """POST /v1/fill: blanks of a text, by GLM, T5 or BERT."""
        body = await self._read(request, FillBody)
        self._check_name(body.model)
        most = body.max_tokens or 64
        if most > self.model.most_tokens:
            text = f"max_tokens={most}: this server allows {self.model.most_tokens} at most"
            raise Refusal(text, param="max_tokens")
        text = self.model.text
        if isinstance(text.filling, MaskedTokenInfiller):
            found = await self._called(lambda: text.guess(body.prompt, body.guesses or 5), body)
            masks = [
                [{"text": guess, "probability": value} for guess, value in one] for one in found
            ]
            return JSONResponse({"object": "fill", "model": self.model.name, "masks": masks})
        sampling = await self._made(lambda: drawing(body), body)
        filled = await self._called(
            lambda: text.fill([body.prompt], sampling, most, body.n or 1), body
        )
        choices = [
            {"index": index, "text": one.text, "blanks": one.blanks}
            for index, one in enumerate(filled)
        ]
        return JSONResponse({"object": "fill", "model": self.model.name, "choices": choices})

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        body = await self._read(request, TokenizeBody)
        self._check_name(body.model)
        if (body.prompt is None) == (not body.messages):
            raise Refusal("give a prompt or messages, one of them", param="prompt")

        def tokens() -> list[int]:
            if body.messages:
                if isinstance(self.model.chat, str):
                    raise UserError(self.model.chat)
                messages = own_messages(body.messages, self.model.chat)
                return self.model.chat.encode(self.model.text.tokenizer, messages)
            return self.model.text.tokenizer.encode(body.prompt)

        found = await self._made(tokens, body)
        length = self.model.max_length
        return JSONResponse({"tokens": found, "count": len(found), "max_model_len": length})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        body = await self._read(request, DetokenizeBody)
        self._check_name(body.model)
        size = self.model.text.tokenizer.vocab_size
        if wrong := [token for token in body.tokens if token >= size]:
            raise Refusal(f"tokens: {wrong[0]} is none; they are 0 to {size - 1}", param="tokens")
        return JSONResponse({"prompt": self.model.text.tokenizer.decode(body.tokens)})

    async def models(self, request: Request) -> Response:
        """GET /v1/models, and /v1/models/NAME."""
        name = request.path_params.get("name")
        cards = [
            {
                "id": one,
                "object": "model",
                "created": STARTED,
                "owned_by": "lmjax",
                "max_model_len": self.model.max_length,
            }
            for one in self.model.names
        ]
        if name is None:
            return JSONResponse({"object": "list", "data": cards})
        self._check_name(name)
        return JSONResponse(next(card for card in cards if card["id"] == name))

    async def health(self, request: Request) -> Response:
        """GET /health."""
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics."""
        worker, counts, gauges = self.model.worker, {}, {}
        if isinstance(worker, AnyEngine):
            counts, gauges = dict(worker.counts), dataclasses.asdict(worker.load())
        return PlainTextResponse(self.metrics.text(counts, gauges))

    async def _read(self, request: Request, kind: type[Body]) -> Body:
        """The body of a request. Refusal: it is too large or too slow, or not as it should be."""
        length = request.headers.get("content-length", "0")
        data, large = b"", Refusal(f"the body has more than {self.most_bytes} bytes", 413)
        if not length.isdigit() or int(length) > self.most_bytes:
            raise large
        try:
            async with asyncio.timeout(PATIENCE):
                async for block in request.stream():
                    data += block
                    if len(data) > self.most_bytes:
                        raise large
        except TimeoutError:
            raise Refusal(f"the body did not come within {PATIENCE:.0f} s", 408) from None
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            raise invalid(error) from None
        except (ValueError, RecursionError) as error:
            raise Refusal(f"the body cannot be read: {error}") from None

    def _check_name(self, name: str) -> None:
        """Refuses the name of another model."""
        if name and name not in self.model.names:
            known = ", ".join(self.model.names)
            raise Refusal(
                f"there is no model {name!r}, only {known}", 404, "model", "model_not_found"
            )

    async def _made(self, make: Callable[[], Made], body: RequestBody) -> Made:
        """Makes something of a request, in another thread; its mistakes are the client's."""
        try:
            return await run_in_threadpool(make)
        except UserError as error:
            raise refused(error, body) from None

    async def _called(self, function: Callable[[], Made], body: RequestBody) -> Made:
        """Calls a function in the thread that has the devices."""
        with refusals(body):
            return await asyncio.wrap_future(self.model.worker.call(function))

    async def _answer(
        self, request: Request, body: Any, texts: list[PreparedText], reply: CallReply
    ) -> Response:
        """Submits all answers of a call, and gives them whole or as a stream."""
        call = AnswerCall(self, reply)
        with refusals(body):
            call.submit(texts)
        request.state.usage = reply.usage
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            return StreamingResponse(call.events(usage), media_type="text/event-stream")
        return JSONResponse(await call.whole(request))


class AnswerCall:
    """The answers of one call, while they are written."""

    def __init__(self, api: ServerApi, reply: CallReply):
        """Takes the shape of the answers."""
        self._api, self._reply = api, reply
        self._pieces: asyncio.Queue[AnswerPiece] = asyncio.Queue()
        self._numbers: list[int] = []
        self._begun = time.monotonic()

    def submit(self, texts: list[PreparedText]) -> None:
        """Puts all requests into the queue, or none. See `Engine.submit`."""
        engine = self._api.model.engine
        try:
            for text in texts:
                for one in text.requests:
                    stream = text.stream(self._api.model)
                    answer = TextAnswer(len(self._numbers), stream, self._pieces)
                    self._numbers.append(engine.submit(one, answer))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ends what is still written."""
        for number in self._numbers:
            self._api.model.engine.cancel(number)

    async def whole(self, request: Request) -> dict[str, Any]:
        """All answers, when they have ended; a client that has gone cancels them."""
        reading = asyncio.ensure_future(self._collect())
        gone = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({reading, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise ClientDisconnect
            reading.result()
            return self._reply.whole()
        finally:
            self.cancel()
            reading.cancel()
            gone.cancel()

    async def _collect(self) -> None:
        async for piece in self._each():
            if piece.error:
                raise _failure(piece.error)

    async def _each(self) -> AsyncIterator[AnswerPiece]:
        """The pieces of all answers, as they come."""
        left, last = len(self._numbers), None
        while left:
            piece = await self._pieces.get()
            self._reply.answers[piece.index].add(piece)
            if piece.tokens:
                now = time.monotonic()
                name = "first_token_seconds" if last is None else "token_seconds"
                self._api.metrics.time(name, now - (self._begun if last is None else last))
                last = now
            left -= piece.reason is not None
            yield piece

    async def events(self, usage: bool) -> AsyncIterator[str]:
        """The stream's events; a client that has gone cancels the answers."""
        reply = self._reply
        try:
            for index in range(len(self._numbers)):
                for choice in reply.begin(index):
                    yield _event(reply.chunk([choice]))
            async for piece in self._each():
                if piece.error:
                    refusal = _failure(piece.error)
                    yield _event(error_body(str(refusal), refusal.status, None, refusal.code))
                    return
                if (choice := reply.delta(piece)) is not None:
                    yield _event(reply.chunk([choice]))
            if usage:
                yield _event(reply.chunk([], reply.usage()))
            yield "data: [DONE]\n\n"
        finally:
            self.cancel()


def client_of(request: Request) -> str:
    """The client whose turn it is in the queue."""
    return request.client.host if request.client is not None else ""


@contextlib.contextmanager
def refusals(body: RequestBody):
    """Turns what the worker raises for a body into refusals."""
    try:
        yield
    except QueueFull as error:
        raise Refusal(str(error), 429, code="queue_full", headers={"Retry-After": "1"}) from None
    except UnknownModel as error:
        raise Refusal(str(error), 404, "model", "model_not_found") from None
    except UserError as error:
        raise refused(error, body) from None


def _failure(error: str) -> Refusal:
    """The refusal of a request that has waited too long, or whose answer broke off."""
    if error == WAITED:
        return Refusal(error, 429, code="queue_full", headers={"Retry-After": "5"})
    return Refusal(error, 503 if error == STOPS else 500)


async def _left(request: Request) -> None:
    """Returns when the client has gone."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _written(vector: np.ndarray, body: EmbeddingBody) -> Any:
    """A vector as the client wants it."""
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.astype(float).tolist()
