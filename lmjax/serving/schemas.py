"""Bodies of requests, as OpenAI's interface has them, with their types and limits.

Fields that are not known are passed over, as clients send many. What is known and not served is
refused by its name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lmjax.serving.choice import MOST_TOPS

MOST_CHOICES = 16
Token = Annotated[int, Field(ge=0, lt=2**31)]
Stop = str | Annotated[list[str], Field(max_length=16)] | None


class RequestBody(BaseModel):
    """Base of the bodies: JSON's types are taken as they are, and numbers are finite."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())


class DrawingBody(RequestBody):
    """Settings of how tokens are chosen; those that OpenAI does not have are lmjax's own."""

    model: str = ""
    temperature: float | None = Field(1.0, ge=0, le=100)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(1.0, gt=0, le=100)
    seed: int | None = Field(None, ge=0, lt=2**31)


class WritingBody(DrawingBody):
    """Settings of how a text is written."""

    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=1024
    )
    n: int | None = Field(1, ge=1, le=MOST_CHOICES)
    stop: Stop = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256)


class StreamOptions(RequestBody):
    """Wishes about a stream."""

    include_usage: bool | None = False


class CompletionBody(WritingBody):
    """A body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[list[Token]], Field(min_length=1, max_length=MOST_CHOICES)]
    ) = ""
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOPS)
    echo: bool | None = False
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES)
    suffix: str | None = None


class TextPart(RequestBody):
    """A part of a message that is text; others are not served."""

    type: Literal["text"]
    text: str


class FunctionCall(RequestBody):
    """Name of a tool and its arguments, a JSON object as text."""

    name: str
    arguments: str


class CallBody(RequestBody):
    """A call of a tool, in a message."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class MessageBody(RequestBody):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[CallBody] | None = None
    tool_call_id: str | None = None


class FunctionBody(RequestBody):
    """A tool's name, purpose and the JSON schema of its arguments."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(RequestBody):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionBody


class NamedFunction(RequestBody):
    """Name of a tool."""

    name: str


class ToolChoice(RequestBody):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


class SchemaBody(RequestBody):
    """A JSON schema, with its name."""

    name: str = "answer"
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(RequestBody):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaBody | None = None


class ChatBody(WritingBody):
    """A body of /v1/chat/completions."""

    messages: list[MessageBody] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOPS)
    tools: list[ToolBody] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    response_format: ResponseFormat | None = None


class EmbeddingBody(RequestBody):
    """A body of /v1/embeddings."""

    model: str = ""
    input: str | Annotated[list[str], Field(min_length=1, max_length=256)]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = None
    user: str | None = None


class TokenizeBody(RequestBody):
    """A body of /tokenize: a text, or a conversation."""

    model: str = ""
    prompt: str | None = None
    messages: list[MessageBody] | None = Field(None, max_length=4096)


class DetokenizeBody(RequestBody):
    """A body of /detokenize."""

    model: str = ""
    tokens: list[Token] = Field(max_length=1_000_000)


class FillBody(DrawingBody):
    """A body of /v1/fill: a text with blanks, as the model marks them."""

    prompt: str
    max_tokens: int | None = Field(64, ge=1)
    n: int | None = Field(1, ge=1, le=MOST_CHOICES)
    guesses: int | None = Field(5, ge=1, le=100)


WritingBody.model_rebuild()
