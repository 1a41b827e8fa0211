"""HTTP server of the annotation page, for browsers of this machine alone.

It listens on 127.0.0.1. Requests that name another host are refused, as a page of a stranger's that
has its name point to 127.0.0.1 sends them (DNS rebinding), and so are judgements that another page
sends. The page loads nothing from elsewhere, and runs no script but its own.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from lmjax.annotation.desk import Desk, StaleRequest
from lmjax.config import UserError
from lmjax.serving.local_server import HOST, listen, serve

__all__ = ["listen", "make_app", "serve"]

NAMES = (HOST, "localhost")
PAGE = Path(__file__).with_name("page.html")
LARGEST = 1 << 20  # bytes of a judgement
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(desk: Desk, annotator: str | None = None) -> Starlette:
    """The page, and what it asks for.

    GET / is the page, GET /state what it shows to the annotator of its query, and POST /judgements
    keeps a judgement and answers with the next state. What is wrong has an `error`, status 400; a
    judgement of what is judged already has the present state beside it, status 409.

    Args:
      desk: of items and judgements.
      annotator: where an address names none.
    """
    page = PAGE.read_text("utf-8")

    async def show_page(request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        headers = HEADERS | {"Content-Security-Policy": POLICY.format(nonce=nonce)}
        return HTMLResponse(page.replace("__NONCE__", nonce), headers=headers)

    async def show_state(request: Request) -> Response:
        name = request.query_params.get("annotator") or annotator
        if name is None:
            return _answer({"annotator": None})
        return await _answered(lambda: desk.state(name))

    async def keep_judgement(request: Request) -> Response:
        if refusal := _refusal(request):
            return _answer({"error": refusal}, 403)
        given = await _read_object(request)
        if given is None or not isinstance(given.get("annotator"), str):
            return _answer({"error": "not a judgement: a JSON object with an annotator"}, 400)
        name = given["annotator"]
        try:
            return await _answered(lambda: desk.submit(name, given))
        except StaleRequest as error:
            state = await run_in_threadpool(desk.state, name)
            return _answer({"error": str(error), "state": state}, 409)

    routes = [
        Route("/", show_page),
        Route("/state", show_state),
        Route("/judgements", keep_judgement, methods=["POST"]),
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=list(NAMES), www_redirect=False)
    return Starlette(routes=routes, middleware=[hosts])


def _answer(values: dict[str, Any], status: int = 200) -> JSONResponse:
    return JSONResponse(values, status, HEADERS)


async def _answered(find: Callable[[], dict[str, Any]]) -> JSONResponse:
    """Answers with what `find` gives, or with its error; in a thread of its own: it may wait."""
    try:
        return _answer(await run_in_threadpool(find))
    except StaleRequest:
        raise
    except UserError as error:
        return _answer({"error": str(error)}, 400)


def _refusal(request: Request) -> str | None:
    """Reason to refuse what a page of another origin sends; browsers say which one it is."""
    origin = request.headers.get("origin")
    if origin is not None and origin != f"http://{request.headers.get('host')}":
        return f"a page of {origin} may not send judgements"
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return "a judgement is sent as application/json"
    return None


async def _read_object(request: Request) -> dict[str, Any] | None:
    """The JSON object that was sent; None for anything else, or too much."""
    body = b""
    async for block in request.stream():
        body += block
        if len(body) > LARGEST:
            return None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
