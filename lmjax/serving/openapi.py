"""The description of the server's addresses, in OpenAPI's form."""

from __future__ import annotations

from typing import Any

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
GETS = ("/v1/models", "/health", "/metrics")
REFUSALS = ("400", "401", "404", "413", "429")


def describe() -> dict[str, Any]:
    """The description, as a JSON value."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {path: {"get": {"responses": _responses()}} for path in GETS}
    for path, body in POSTS.items():
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[body.__name__] = schema
        reference = {"$ref": f"#/components/schemas/{body.__name__}"}
        content = {"application/json": {"schema": reference}}
        paths[path] = {
            "post": {
                "summary": (body.__doc__ or "").splitlines()[0],
                "requestBody": {"required": True, "content": content},
                "responses": _responses(),
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


def _responses() -> dict[str, Any]:
    refused = {status: {"description": "refused, with the reason"} for status in REFUSALS}
    return {"200": {"description": "the answer"}, **refused}
