"""JSON schemas of the server's responses, by address."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SCORE: Schema = {"type": "number", "maximum": 0}


def record(optional: tuple[str, ...] = (), **fields: Schema) -> Schema:
    """Schema of an object with these fields and no others; all are there but the optional ones."""
    required = [name for name in fields if name not in optional]
    form = {"type": "object", "properties": fields, "required": required}
    return form | {"additionalProperties": False}


def listed(items: Schema) -> Schema:
    """Schema of an array."""
    return {"type": "array", "items": items}


def either(*schemas: Schema) -> Schema:
    """Schema of what has one of several forms."""
    return {"anyOf": list(schemas)}


NONE: Schema = {"type": "null"}
ERROR = record(
    error=record(message=TEXT, type=TEXT, param=either(TEXT, NONE), code=either(TEXT, NONE))
)
CARD = record(
    id=TEXT,
    object={"const": "model"},
    created=COUNT,
    owned_by=TEXT,
    max_model_len=either(COUNT, NONE),
)
USAGE = record(
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    total_tokens=COUNT,
    prompt_tokens_details=record(cached_tokens=COUNT),
)
CALL = record(id=TEXT, type={"const": "function"}, function=record(name=TEXT, arguments=TEXT))
_one_token = {"token": TEXT, "logprob": SCORE, "bytes": listed(COUNT)}
CHAT_SCORES = record(
    content=listed(record(**_one_token, top_logprobs=listed(record(**_one_token)))), refusal=NONE
)
TEXT_SCORES = record(
    tokens=listed(TEXT),
    token_logprobs=listed(either(SCORE, NONE)),
    top_logprobs=listed(either({"type": "object", "additionalProperties": SCORE}, NONE)),
    text_offset=listed(COUNT),
)
MESSAGE = record(
    ("tool_calls",),
    role={"const": "assistant"},
    content=either(TEXT, NONE),
    tool_calls=listed(CALL),
)


def _answers(kind: str, scores: Schema, **shown: Schema) -> Schema:
    """Schema of the whole answers of a call."""
    choice = record(
        index=COUNT,
        **shown,
        logprobs=either(scores, NONE),
        finish_reason={"enum": ["stop", "length", "tool_calls"]},
    )
    return record(
        id=TEXT,
        object={"const": kind},
        created=COUNT,
        model=TEXT,
        choices=listed(choice),
        usage=USAGE,
    )


VECTOR = either(listed({"type": "number"}), TEXT)
CHOICE = record(index=COUNT, text=TEXT, blanks=listed(TEXT))
MASK = listed(record(text=TEXT, probability={"type": "number", "minimum": 0, "maximum": 1}))
# Of the JSON responses that are no refusals.
REPLIES: dict[str, Schema] = {
    "/v1/chat/completions": _answers("chat.completion", CHAT_SCORES, message=MESSAGE),
    "/v1/completions": _answers("text_completion", TEXT_SCORES, text=TEXT),
    "/v1/embeddings": record(
        object={"const": "list"},
        data=listed(record(object={"const": "embedding"}, index=COUNT, embedding=VECTOR)),
        model=TEXT,
        usage=record(prompt_tokens=COUNT, total_tokens=COUNT),
    ),
    "/v1/fill": record(
        ("choices", "masks"),
        object={"const": "fill"},
        model=TEXT,
        choices=listed(CHOICE),
        masks=listed(MASK),
    ),
    "/tokenize": record(tokens=listed(COUNT), count=COUNT, max_model_len=either(COUNT, NONE)),
    "/detokenize": record(prompt=TEXT),
    "/v1/models": record(object={"const": "list"}, data=listed(CARD)),
    "/v1/models/{name}": CARD,
    "/health": record(status={"const": "ok"}),
}
STREAMED = ("/v1/chat/completions", "/v1/completions")  # with stream=true
