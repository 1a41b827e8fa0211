"""The addresses of the server, whom it refuses, and what it writes down of each request."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmjax.serving.api import ServerApi
from lmjax.serving.errors import Refusal, error_body
from lmjax.serving.metrics import ServerMetrics
from lmjax.serving.openapi import describe
from lmjax.serving.served_model import ServedModel

PAGE = Path(__file__).with_name("page")
# The files of the page, by address; no address of a client's becomes a path.
FILES = {
    "/": ("chat.html", "text/html; charset=utf-8"),
    "/chat.css": ("chat.css", "text/css; charset=utf-8"),
    "/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
}
OPEN = {*FILES, "/health", "/openapi.json"}  # addresses that need no key
LOCAL = ("127.0.0.1", "localhost", "[::1]")
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}
CLOSED = 499  # status in the log where the client had gone


def make_app(
    model: ServedModel,
    key: str | None,
    most_bytes: int = 1 << 20,
    names: Sequence[str] | None = LOCAL,
    log: Callable[[str], object] | None = None,
) -> Starlette:
    """The server's application.

    Args:
      model: that is served.
      key: that requests have to bring, as a bearer's; None: none.
      most_bytes: of a body.
      names: hosts that requests may name; others are refused, as a page of a stranger's sends them
        that has its name point to this machine. None: any.
      log: takes a line of JSON for each request; None: standard error.
    """
    metrics = ServerMetrics()
    api = ServerApi(model, metrics, most_bytes)
    posts = {
        "/v1/chat/completions": api.chat,
        "/v1/completions": api.complete,
        "/v1/embeddings": api.embed,
        "/v1/fill": api.fill,
        "/tokenize": api.tokenize,
        "/detokenize": api.detokenize,
    }
    gets = {
        "/v1/models": api.models,
        "/v1/models/{name:path}": api.models,
        "/health": api.health,
        "/metrics": api.show_metrics,
        "/openapi.json": _describe,
    }
    routes = [Route(path, call, methods=["POST"]) for path, call in posts.items()]
    routes += [Route(path, call, methods=["GET"]) for path, call in gets.items()]
    routes += [Route(path, _file(*file), methods=["GET"]) for path, file in FILES.items()]
    middleware = [Middleware(_Guard, key=key, metrics=metrics, log=log or _to_stderr)]
    if names is not None:
        middleware.insert(
            0, Middleware(TrustedHostMiddleware, allowed_hosts=list(names), www_redirect=False)
        )
    handlers = {Refusal: _refused, HTTPException: _unknown, ClientDisconnect: _gone}
    handlers[Exception] = _failed
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


class _Guard:
    """Asks for the key, and counts and writes down each request."""

    def __init__(self, app: ASGIApp, key: str | None, metrics: ServerMetrics, log: Callable):
        self._app, self._metrics, self._log = app, metrics, log
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun, status = time.monotonic(), CLOSED
        request = Request(scope)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    *((k.lower().encode(), v.encode()) for k, v in HEADERS.items()),
                ]
            await send(message)

        try:
            if scope["path"] in OPEN or self._allowed(request):
                await self._app(scope, receive, sending)
            else:
                refusal = Refusal(
                    "the key is missing or wrong: send it as Authorization: Bearer KEY",
                    401,
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await refusal.response()(scope, receive, sending)
        finally:
            self._note(request, status, time.monotonic() - begun)

    def _allowed(self, request: Request) -> bool:
        """Compares the key in a time that does not depend on what is wrong."""
        if self._key is None:
            return True
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        known = secrets.compare_digest(given.strip().encode(), self._key)
        return kind.lower() == "bearer" and known

    def _note(self, request: Request, status: int, seconds: float) -> None:
        path = request.scope["path"]
        # Of addresses that are not there none is a name of its own: there is no end of them.
        known = getattr(request.scope.get("route"), "path", None) or "other"
        self._metrics.count(known, status, seconds)
        if path in FILES or path in ("/health", "/metrics"):
            return
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "client": request.client.host if request.client else None,
            "method": request.method,
            "path": path[:200],
            "status": status,
            "seconds": round(seconds, 3),
        }
        if (usage := getattr(request.state, "usage", None)) is not None:
            counts = usage()
            line |= {name: counts[name] for name in ("prompt_tokens", "completion_tokens")}
        self._log(json.dumps(line))


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _file(name: str, kind: str) -> Callable[[Request], Any]:
    """The handler of a file of the page."""
    data = (PAGE / name).read_bytes()

    async def show(request: Request) -> Response:
        return Response(data, headers={"Content-Type": kind})

    return show


async def _describe(request: Request) -> Response:
    return JSONResponse(describe())


async def _refused(request: Request, error: Refusal) -> Response:
    return error.response()


async def _unknown(request: Request, error: HTTPException) -> Response:
    message = {
        404: f"there is nothing at {request.url.path[:200]}",
        405: f"{request.method} is not served at {request.url.path[:200]}",
    }.get(error.status_code, str(error.detail))
    body = error_body(message, error.status_code)
    return JSONResponse(body, error.status_code, error.headers)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=CLOSED)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body("the server has made a mistake", 500), 500)
