"""What went wrong, as clients of OpenAI's API expect it: a status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import logging
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from jaxchat.engine import QueueFull
from jaxchat.errors import JaxchatError

from .schemas import FIELDS
from .sse import ClientGone
from .worker import EngineStopped, Unavailable

log = logging.getLogger("jaxchat.serve")
RETRY_SECONDS = 1  # after which a client may try again where the queue is full or the model still loads

OTHER_FORM = ("string_type", "list_type", "int_type")  # not of the form that was tried: says little
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {
    401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large",
    429: "rate_limit_exceeded",
}  # fmt: skip


class ApiError(HTTPException):
    """An answer with an error in it. An HTTPException, so that FastAPI lets it pass wherever it is raised."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.param, self.code = param, code or CODES.get(status)

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(orjson.dumps(self.body()), self.status_code, self.headers, "application/json")


def bad_request(param: str | None, message: str, code: str | None = None) -> ApiError:
    return ApiError(400, f"{param}: {message}" if param else message, param, code)


def too_long(param: str, tokens: int, context: int) -> ApiError:
    message = f"the prompt has {tokens} tokens; this model's context holds {context}"
    return ApiError(400, message, param, "context_length_exceeded")


def retry(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, round(seconds + 0.5)))}


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about an error of the engine or the worker."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers=retry(RETRY_SECONDS))
    if isinstance(error, EngineStopped):
        return ApiError(503, "the engine has stopped", code="engine_dead")  # the reason stands in the log
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), code=error.state, headers=retry(RETRY_SECONDS))
    if isinstance(error, JaxchatError):
        return ApiError(400, str(error))
    if isinstance(error, HTTPException):  # routing, or a body that cannot be read
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, (RequestValidationError, ValidationError)):
        return _of_validation(error)
    return ApiError(500, "an internal error; it stands in the log of the service", code="internal_error")


def install(app: FastAPI) -> None:
    """Every error of the API leaves in this form; what nobody expected shows no trace outside."""

    async def answer(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def unexpected(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()  # uvicorn logs it

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nginx's number for it; nobody reads this

    app.add_exception_handler(ClientGone, gone)
    for kind in (HTTPException, RequestValidationError, ValidationError, JaxchatError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(Exception, unexpected)


def _of_validation(error: RequestValidationError | ValidationError) -> ApiError:
    """The first thing that pydantic found, without what was sent."""
    found = error.errors()  # of a field that may have several forms, what is wrong with each
    first = next((e for e in found if e["type"] not in OTHER_FORM), found[0])
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    names = [part for part in first["loc"] if isinstance(part, int) or part in FIELDS]  # not: which of several types
    if first["type"] == "value_error" and not names:  # `schemas.py` names the field itself
        return ApiError(400, first["msg"].removeprefix("Value error, "), first["msg"].split(", ", 1)[1].split(":")[0])
    if not names:
        return ApiError(400, "the body must be a JSON object, sent as Content-Type: application/json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names).lstrip(".")
    return ApiError(400, f"{param}: {first['msg'].removeprefix('Value error, ')}", param)
