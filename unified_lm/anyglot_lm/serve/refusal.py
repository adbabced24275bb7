"""`Refusal`: why a request is not answered, as a status and OpenAI's error object."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from anyglot_tokenizers.errors import AnyglotError

MAX_MESSAGE = 400
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
OURS = "the server could not answer this; its log says why"
"""All that a client learns of a defect."""


class Refusal(AnyglotError):
    """A request that is not answered.

    Args:
        status: of HTTP, 4xx or 503.
        message: what was wrong, with the value, and the way out; one line.
        param: the entry of the request.
        code: OpenAI's word for it, where there is one.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def response(self) -> JSONResponse:
        """The answer to the client."""
        return JSONResponse(error_object(self.status, str(self), self.param, self.code), self.status, self.headers)


def error_object(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 3] + "..."
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
