"""Refusals in the shape that OpenAI's clients read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse

from lmjax.config import UserError
from lmjax.generation.prompts import PromptTooLong

TOO_LONG = "context_length_exceeded"  # code, as OpenAI's
BEGIN = re.compile(r"(\w+)[:=.]|(prompt|the prompt) ")  # of a message about a parameter


class Refusal(Exception):
    """A request that is not served, and why.

    Attributes:
      status: of HTTP.
      param: the field of the request that is wrong.
      code: that programs look for.
      headers: of the response.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def response(self) -> JSONResponse:
        """The refusal as a response."""
        body = error_body(str(self), self.status, self.param, self.code)
        return JSONResponse(body, self.status, self.headers)


KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


def error_body(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON value of a refusal."""
    kind = KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refused(error: UserError, body: BaseModel) -> Refusal:
    """The refusal of a body for a reason that its types do not show.

    The parameter is the one that the message begins with.
    """
    message, fields = str(error), type(body).model_fields
    found = BEGIN.match(message)
    param = found[1] if found and found[1] in fields else None
    if isinstance(error, PromptTooLong) or (found and found[2]):
        param = next(name for name in ("messages", "prompt", "input") if name in fields)
    return Refusal(message, 400, param, TOO_LONG if isinstance(error, PromptTooLong) else None)


def invalid(error: ValidationError) -> Refusal:
    """The refusal of a body that is not as its model says."""
    first, *others = error.errors(include_url=False, include_context=False, include_input=False)
    path = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(others)} more)" if others else ""
    return Refusal(f"{path or 'the body'}: {first['msg']}{more}", param=path or None)
