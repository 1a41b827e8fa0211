"""Refusals in the shape that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse


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


def invalid(error: ValidationError) -> Refusal:
    """The refusal of a body that is not as its model says."""
    first, *others = error.errors(include_url=False, include_context=False, include_input=False)
    path = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(others)} more)" if others else ""
    return Refusal(f"{path or 'the body'}: {first['msg']}{more}", param=path or None)
