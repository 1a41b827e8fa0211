"""The description of the server's addresses, in OpenAPI's form."""

from __future__ import annotations

from typing import Any

from lmjax.serving.reply_schemas import ERROR, REPLIES, STREAMED
from lmjax.serving.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    FillBody,
    RequestBody,
    TokenizeBody,
)

POSTS: dict[str, type[RequestBody]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/embeddings": EmbeddingBody,
    "/v1/fill": FillBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
GETS = ("/v1/models", "/v1/models/{name}", "/health", "/metrics")
REFUSALS = {
    "400": "the request is wrong, and the message says where",
    "401": "the key is missing or wrong",
    "404": "there is no such model, or nothing at the address",
    "408": "the body has not come in time",
    "413": "the body is too large",
    "429": "too many requests wait; come again",
    "503": "the server stops",
}
OPEN = ("/health",)  # needs no key


def describe() -> dict[str, Any]:
    """The description, as a JSON value."""
    schemas: dict[str, Any] = {"Error": ERROR}
    paths: dict[str, Any] = {path: {"get": _get(path)} for path in GETS}
    for path, body in POSTS.items():
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[body.__name__] = schema
        reference = {"$ref": f"#/components/schemas/{body.__name__}"}
        paths[path] = {
            "post": {
                "summary": (body.__doc__ or "").splitlines()[0],
                "requestBody": {"required": True, "content": _json(reference)},
                "responses": _responses(path),
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "lmjax.serving", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _get(path: str) -> dict[str, Any]:
    """The description of an address that is read alone."""
    found: dict[str, Any] = {"responses": _responses(path)}
    if "{name}" in path:
        text = {"type": "string"}
        found["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": text}]
    if path in OPEN:
        found["security"] = []
    return found


def _responses(path: str) -> dict[str, Any]:
    content = _json(REPLIES[path]) if path in REPLIES else {"text/plain": {}}
    if path in STREAMED:
        content["text/event-stream"] = {}
    refused = {"$ref": "#/components/schemas/Error"}
    refusals = {
        status: {"description": text, "content": _json(refused)}
        for status, text in REFUSALS.items()
    }
    return {"200": {"description": "the answer", "content": content}, **refusals}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
