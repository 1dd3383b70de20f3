"""Errors in the shape of OpenAI's API: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from flexlora.errors import UserError
from flexlora.printable import printable

__all__ = ["ApiError", "add_handlers", "error_body", "error_response"]

LONGEST = 500  # characters of a message, which may quote what was sent
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A refusal with a sentence for the client; ``retry_after`` in seconds where it may help."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of a refusal; nothing that does not print reaches a client's log."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    text = printable(message, LONGEST)
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def error_response(error: ApiError) -> JSONResponse:
    """The answer to a client."""
    body = error_body(error.status_code, error.detail, error.param, error.code)
    return JSONResponse(body, error.status_code, error.headers)


def add_handlers(app: FastAPI) -> None:
    """Every refusal of ``app``, whoever raises it, has OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: UserError) -> JSONResponse:
        return error_response(ApiError(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_of_validation(error.errors()[0]))

    @app.exception_handler(AnyHTTPException)
    async def other(request: Request, error: AnyHTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(
            error_body(error.status_code, text), error.status_code, headers=error.headers
        )

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        text = f"the server failed ({type(error).__name__}); its log has the cause."
        return JSONResponse(error_body(500, text), 500)


def _of_validation(found: Mapping[str, Any]) -> ApiError:
    """The first of pydantic's errors as a sentence."""
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {found['ctx']['error']}.")
    where = [str(part) for part in found["loc"][1:]]
    if found["type"] == "missing" and not where:
        return ApiError(400, "the body is empty, expected a JSON object.")
    text = str(found["msg"]).removeprefix("Value error, ")
    param = ".".join(where) or None
    message = f"{param}: {text}" if param and found["type"] != "value_error" else text
    return ApiError(400, message, param=where[0] if where else None)
